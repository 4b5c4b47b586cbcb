"""What the flags say about a workload: what goes with it, and whether its requests fit."""

import numpy as np

from pagedkv.errors import ConfigError
from pagedkv.sims.config import GOES_WITH, LoadConfig
from pagedkv.sims.token_lengths import sample_turns
from pagedkv.sims.user_class import UserClass
from pagedkv.sims.workload import Workload
from pagedkv.sims.workload_file import load_workload

_ALLOWED = ("workload", "num_prompts")
"""Settings of a load that go with a workload, besides users and over_length."""
_PROBE_DRAWS = 1 << 14
_LEAST_SHARE = 1e-3
"""As for other lengths: fewer that fit have little to do with the distribution."""


def check_workload_flags(load: LoadConfig) -> None:
    """Refuse what the classes of a workload say themselves.

    Raises:
        ConfigError: For the first such flag.
    """
    if load.workload is None:
        return
    for name in GOES_WITH:
        if name not in _ALLOWED and getattr(load, name) not in (None, False):
            flag = name.replace("_", "-")
            raise ConfigError(
                f"--{flag} does not go with --workload {load.workload}, whose classes say that themselves: "
                f"leave out --{flag}, or write a workload of your own (docs/workloads.md)"
            )


def resolve_workload(
    load: LoadConfig, name: str, max_model_len: int, *, models: tuple[int | None, ...] = (), max_model_lens: tuple[int, ...] = ()
) -> Workload:
    """Return the workload `name` with the users of `load`.

    Args:
        load: What is asked for.
        name: Its name, or its file.
        max_model_len: Of every model.
        models: By class: which of several models it names; None: any.
        max_model_lens: By model, if there are several.

    Raises:
        ConfigError: If there is none, it is wrong, it needs users or has no use for them, or a class has no request that fits.
    """
    classes = load_workload(name)
    shared = [user_class.name for user_class in classes if user_class.share is not None]
    if shared and load.users is None:
        raise ConfigError(f"--workload {name} shares people among {', '.join(shared)}: say how many, e.g. --users 100")
    if load.users is not None and not shared:
        raise ConfigError(
            f"--users {load.users} has no use with --workload {name}: its classes say themselves how many they are; "
            "leave it out, or give classes a share instead of users"
        )
    drops = load.over_length == "drop"
    own = tuple(max_model_len if model is None else max_model_lens[model] for model in models) if max_model_lens else ()
    for user_class, most in zip(classes, own or (max_model_len,) * len(classes), strict=True):
        _check_fits(user_class, name, most, drops=drops)
    return Workload(
        name=name,
        classes=classes,
        users=load.users,
        num_requests_asked=load.num_prompts,
        max_model_len=max_model_len,
        drops_over_length=drops,
        models=models if max_model_lens else (),
        max_model_lens=own,
        num_models=max(len(max_model_lens), 1),
    )


def _check_fits(user_class: UserClass, name: str, max_model_len: int, *, drops: bool) -> None:
    shortest = user_class.system_prompt_tokens + user_class.prompt.least + user_class.output.least
    if shortest > max_model_len:
        raise ConfigError(
            f"{name}, class {user_class.name}: its shortest request has {shortest} tokens, prompt and output, and max-model-len is "
            f"{max_model_len}: needs --max-model-len {shortest} or more"
        )
    if not drops:
        return
    prompts, outputs = sample_turns(user_class.prompt, user_class.output, np.random.default_rng(0), _PROBE_DRAWS)
    if float((user_class.system_prompt_tokens + prompts + outputs <= max_model_len).mean()) < _LEAST_SHARE:
        raise ConfigError(
            f"{name}, class {user_class.name}: fewer than one session in a thousand begins with a request of at most "
            f"{max_model_len} tokens, so that --over-length drop leaves next to nothing; raise --max-model-len"
        )
