"""Which models a configuration names: `--model`, and the classes of its workload."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pagedkv.catalogue import load_model
from pagedkv.errors import ConfigError
from pagedkv.sims.config import ServingConfig, SimulationConfig
from pagedkv.sims.user_class import UserClass
from pagedkv.sims.workload_file import load_workload

_SERVER_SETTINGS = ("max_loaded_models", "keep_alive", "disk_bandwidth")
"""They say how models come and go, one model too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelNames:
    """The models that are served, each once, and who asks which."""

    asked: tuple[str, ...]
    """Those that `--model` names."""
    served: tuple[str, ...]
    """Those and the classes' own; without those of `--model` if every class names its own."""
    of_class: tuple[int | None, ...]
    """By class: the place of its own among `served`; None: any of them. Empty without a workload."""

    @property
    def in_words(self) -> str:
        """What `--model` would say of `asked`."""
        return ",".join(self.asked)


def model_names(config: SimulationConfig) -> ModelNames:
    """Return the models that `config` names.

    Raises:
        ConfigError: If there is none of a name, or the workload cannot be read.
    """
    asked = _asked(config.serving.model)
    classes = () if config.load.workload is None else load_workload(config.load.workload)
    own = [_of_class(user_class, config.load.workload or "") for user_class in classes]
    everybody = bool(own) and None not in own
    served = tuple(dict.fromkeys([*(() if everybody else asked), *(name for name in own if name is not None)]))
    return ModelNames(asked=asked, served=served, of_class=tuple(None if name is None else served.index(name) for name in own))


def is_model_server(serving: ServingConfig, names: Sequence[str]) -> bool:
    """Return whether models come and go: there are several, or it is said how they do.

    Raises:
        ConfigError: If there are several and the engine serves one, or there are replicas too.
    """
    if len(names) > 1 and serving.engine != "ollama":
        raise ConfigError(
            f"several models, {', '.join(names)}, are for --engine ollama, which loads them as requests name them; "
            f"--engine {serving.engine} serves one: give one --model, and classes of a workload no other"
        )
    asked = len(names) > 1 or any(getattr(serving, name) is not None for name in _SERVER_SETTINGS)
    if asked and (serving.replicas > 1 or serving.fault):
        raise ConfigError("models that are loaded on demand go with one replica and no fault: leave out --replicas and --fault")
    return asked and serving.engine == "ollama"


def _asked(text: str) -> tuple[str, ...]:
    if "," not in text or Path(text).exists():
        return (load_model(text).name,)
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise ConfigError(f"--model {text!r} names no model: write --model llama-3.1-8b")
    models = tuple(load_model(name).name for name in names)
    if twice := [name for name in dict.fromkeys(models) if models.count(name) > 1]:
        raise ConfigError(
            f"--model {text} names {' and '.join(twice)} more than once: name each model once; it is loaded once and serves all "
            f"who ask for it, so that --model {','.join(dict.fromkeys(models))} would do"
        )
    return models


def _of_class(user_class: UserClass, workload: str) -> str | None:
    if user_class.model is None:
        return None
    try:
        return load_model(user_class.model).name
    except ConfigError as error:
        raise ConfigError(f"{workload}, class {user_class.name}, model: {error}") from error
