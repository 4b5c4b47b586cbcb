"""What the flags say about a load: that they go together, and who asks then."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from pagedkv.errors import ConfigError
from pagedkv.sims.config import GOES_WITH, LOAD_KINDS, LoadConfig, parse_seconds
from pagedkv.sims.deployment import Deployment
from pagedkv.sims.length_names import load_lengths
from pagedkv.sims.lengths import FileLengths, FixedLengths, LengthDistribution
from pagedkv.sims.load import ClosedLoop, Load, OpenLoop, SharedPrefixes, TraceReplay
from pagedkv.sims.restricted_lengths import restricted
from pagedkv.sims.traces import read_trace
from pagedkv.sims.workload_config import check_workload_flags, resolve_workload

DEFAULT_THINK_TIME_S = 20.0
DEFAULT_LENGTHS = "azure-conv"

LARGEST = {
    "users": 1_000_000,
    "request_rate": 1e6,
    "num_prompts": 10**9,
    "max_concurrency": 10**9,
    "burstiness": 1e6,
    "trace_rate": 1e6,
    "prefix_len": 10**9,
    "num_prefixes": 10**6,
}
_SMALLEST = {"burstiness": 1e-3, "request_rate": 1e-6, "trace_rate": 1e-6, "prefix_len": 0}


def check_load_flags(load: LoadConfig) -> None:
    """Refuse contradictions: there is one kind of load, and every flag that it does not use is unset.

    Raises:
        ConfigError: For the first one, with what would work.
    """
    kinds = [name for name in LOAD_KINDS if getattr(load, name) is not None]
    if load.workload is not None and not kinds:
        kinds = ["users"]  # the workload says how many
    if len(kinds) != 1:
        given = " and ".join(f"--{name.replace('_', '-')}" for name in kinds)
        verb = f"{given} were given" if kinds else "none of them was given"
        raise ConfigError(f"the load is one of --users N, --request-rate R and --trace FILE; {verb}. Try --users 100")
    kind = kinds[0]
    for name in ("trace", "lengths", "workload"):
        if any("\ud800" <= letter <= "\udfff" for letter in getattr(load, name) or ""):
            raise ConfigError(f"--{name} {getattr(load, name)!a}: the name of the file is not UTF-8; rename it, or link to it")
    for name, loads in GOES_WITH.items():
        if getattr(load, name) not in (None, False) and kind not in loads:
            goes_with = " or ".join(f"--{each.replace('_', '-')}" for each in loads)
            raise ConfigError(f"--{name.replace('_', '-')} goes with {goes_with}, not with --{kind.replace('_', '-')}")
    check_workload_flags(load)
    for name, largest in LARGEST.items():
        value, smallest = getattr(load, name), _SMALLEST.get(name, 1)
        if value is not None and not smallest <= value <= largest:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}: needs {smallest:g} to {largest:,.0f}")


def resolve_load(load: LoadConfig, deployments: tuple[Deployment, ...], of_class: tuple[int | None, ...]) -> Load:
    """Return who asks.

    Args:
        load: What is asked for, without contradictions.
        deployments: Who answers, by model; there is one at least.
        of_class: The models that the classes of a workload name, among `deployments`.

    Raises:
        ConfigError: If no request fits, a file is wrong, or lengths are given in two ways.
    """
    longest = tuple(each.scheduler.max_model_len for each in deployments)
    max_model_len = min(longest)
    if load.workload is not None:
        several = longest if len(longest) > 1 else ()
        return resolve_workload(load, load.workload, max_model_len, models=of_class, max_model_lens=several)
    if load.trace is not None:
        trace = _trace(load, deployments, with_content=deployments[0].pool.enable_prefix_caching)
        return replace(trace, num_models=len(deployments), max_concurrency=load.max_concurrency)
    prefixes = _prefixes(load, max_model_len)
    lengths = _lengths(load, deployments, prefixes.length)
    if load.users is not None:
        think_time_s = DEFAULT_THINK_TIME_S if load.think_time is None else parse_seconds(load.think_time, name="think-time")
        return ClosedLoop(
            users=load.users,
            think_time_s=think_time_s,
            lengths=lengths,
            prefixes=prefixes,
            num_requests=load.num_prompts,
            num_models=len(deployments),
        )
    assert load.request_rate is not None
    return OpenLoop(
        request_rate_per_s=load.request_rate,
        burstiness=1.0 if load.burstiness is None else load.burstiness,
        num_requests=load.num_prompts,
        lengths=lengths,
        prefixes=prefixes,
        num_models=len(deployments),
        max_concurrency=load.max_concurrency,
    )


def without_defaults(load: LoadConfig, resolved: Load) -> LoadConfig:
    """Return `load` without the settings that say what would be so anyway."""
    usual = {
        "burstiness": 1.0,
        "trace_rate": 1.0,
        "random_range_ratio": 0.0,
        "lengths": DEFAULT_LENGTHS,
        "prefix_len": 0,
        "num_prefixes": 1,
    }
    changes: dict[str, Any] = {name: None for name, value in usual.items() if getattr(load, name) == value}
    if isinstance(resolved, ClosedLoop) and resolved.think_time_s == DEFAULT_THINK_TIME_S:
        changes["think_time"] = None
    if not load.prefix_len:
        changes["num_prefixes"] = None
    if isinstance(resolved, TraceReplay):
        changes["trace_format"] = None  # a trace that was read is read again
    return replace(load, **changes)


def _prefixes(load: LoadConfig, max_model_len: int) -> SharedPrefixes:
    if load.num_prefixes is not None and load.prefix_len is None:
        raise ConfigError(
            f"--num-prefixes {load.num_prefixes} goes with --prefix-len: say how long they are, e.g. --prefix-len 1000"
        )
    length = load.prefix_len or 0
    if length + 2 > max_model_len:
        raise ConfigError(
            f"a prefix of {length} tokens leaves no room for a prompt and an answer in max-model-len {max_model_len}: "
            f"needs a --prefix-len of at most {max(max_model_len - 2, 0)}, or a --max-model-len of {length + 2} or more"
        )
    return SharedPrefixes(length=length, number=load.num_prefixes or 1)


def _longest(deployments: tuple[Deployment, ...]) -> int:
    return min(each.scheduler.max_model_len for each in deployments)


def _what_holds(deployments: tuple[Deployment, ...], tokens: int) -> str | None:
    """Return the flag with which requests of so many tokens run; None if they are longer than a model was made for."""
    return None if tokens > min(each.model.max_context for each in deployments) else f"--max-model-len {tokens} would hold"


def _made_for(deployments: tuple[Deployment, ...]) -> str:
    shortest = min((each.model for each in deployments), key=lambda model: model.max_context)
    return f"{shortest.title} was made for {shortest.max_context} tokens at most, so use shorter ones, or another --model"


def _lengths(load: LoadConfig, deployments: tuple[Deployment, ...], prefix_len: int) -> LengthDistribution:
    max_model_len = _longest(deployments)
    fixed = (load.random_input_len, load.random_output_len)
    if fixed == (None, None):
        if load.random_range_ratio is not None:
            raise ConfigError("--random-range-ratio goes with --random-input-len and --random-output-len")
        lengths = load_lengths(load.lengths or DEFAULT_LENGTHS)
        if load.lengths_in_order:
            if not isinstance(lengths, FileLengths) or load.request_rate is None:
                raise ConfigError("--lengths-in-order goes with --request-rate and --lengths FILE: only a file has an order")
            lengths = replace(lengths, in_order=True)
        return restricted(lengths, max_model_len - prefix_len) if load.over_length == "drop" else lengths
    if load.lengths is not None:
        raise ConfigError("--lengths and --random-input-len/--random-output-len contradict each other: give one")
    if None in fixed:
        raise ConfigError("--random-input-len and --random-output-len go together: give both")
    if load.lengths_in_order:
        raise ConfigError("--lengths-in-order goes with --lengths FILE: only a file has an order")
    lengths = FixedLengths(
        input_len=load.random_input_len or 0, output_len=load.random_output_len or 0, range_ratio=load.random_range_ratio or 0.0
    )
    if prefix_len + lengths.max_total > max_model_len:
        behind = f" behind a prefix of {prefix_len}" if prefix_len else ""
        held = _what_holds(deployments, prefix_len + lengths.max_total)
        raise ConfigError(
            f"requests of {lengths.name} tokens{behind} are longer than max-model-len {max_model_len}: "
            + (_made_for(deployments) if held is None else f"{held} them")
        )
    return lengths


def _trace(load: LoadConfig, deployments: tuple[Deployment, ...], *, with_content: bool) -> TraceReplay:
    max_model_len = _longest(deployments)
    trace = read_trace(Path(load.trace or ""), format=load.trace_format, with_content=None if with_content else False)
    total = trace.prompt_tokens + trace.output_tokens
    fits = total <= max_model_len
    if not fits.any():
        every, shortest = (_what_holds(deployments, int(tokens)) for tokens in (total.max(), total.min()))
        held = f"{every} all, {total.min()} the shortest" if every else _made_for(deployments)
        if shortest and not every:
            held = f"{shortest} the shortest; {held}"
        raise ConfigError(
            f"every request of {trace.path} is longer than max-model-len {max_model_len}; the first, line {trace.line_numbers[0]} "
            f"(or entry, in a JSON document), has {trace.prompt_tokens[0]} + {trace.output_tokens[0]} tokens: {held}"
        )
    if load.over_length == "drop":
        trace = trace.where(fits)
    if load.num_prompts is not None:
        trace = trace.first(load.num_prompts)
    return TraceReplay(trace=trace.scaled(load.trace_rate or 1.0))
