"""A configuration with every question answered: who serves, who asks, what is measured. Built once, run many times."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pagedkv.allocators import ALLOCATORS
from pagedkv.errors import ConfigError, unknown_name
from pagedkv.sims.config import (
    GOES_WITH,
    LOAD_KINDS,
    LoadConfig,
    MeasurementConfig,
    ServingConfig,
    SimulationConfig,
    parse_seconds,
)
from pagedkv.sims.deployment import Deployment, deploy
from pagedkv.sims.engine_flags import refuse_flags_of_others
from pagedkv.sims.goodput import Goal, parse_goals
from pagedkv.sims.length_names import load_lengths
from pagedkv.sims.lengths import FileLengths, FixedLengths, LengthDistribution
from pagedkv.sims.load import ClosedLoop, Load, OpenLoop, SharedPrefixes, TraceReplay
from pagedkv.sims.model_names import ModelNames, is_model_server, model_names
from pagedkv.sims.model_serving import ModelServing, model_serving
from pagedkv.sims.replication import Replication, replication
from pagedkv.sims.restricted_lengths import restricted
from pagedkv.sims.routing import DEFAULT_ROUTING
from pagedkv.sims.traces import read_trace
from pagedkv.sims.workload_config import check_workload_flags, resolve_workload

DEFAULT_DURATION_S = 600.0
DEFAULT_WARMUP_S = 60.0
DEFAULT_THINK_TIME_S = 20.0
DEFAULT_LENGTHS = "azure-conv"

_LARGEST = {
    "users": 1_000_000,
    "request_rate": 1e6,
    "num_prompts": 10**9,
    "burstiness": 1e6,
    "trace_rate": 1e6,
    "prefix_len": 10**9,
    "num_prefixes": 10**6,
}
_SMALLEST = {"burstiness": 1e-3, "request_rate": 1e-6, "trace_rate": 1e-6, "prefix_len": 0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """What a simulation runs on."""

    config: SimulationConfig
    """As asked for; a setting that says what would be so anyway is left out, so that equal scenarios have equal ones."""
    deployment: Deployment
    load: Load
    allocators: tuple[str, ...]
    goals: tuple[Goal, ...]
    warmup_s: float
    duration_s: float | None
    """Measured time after the warm-up; None: until all requests of the load are answered."""
    replication: Replication
    """How many replicas of the deployment there are, and their faults."""
    model_serving: ModelServing | None = None
    """How several models come and go, of which the deployment is the first; None: there is one, and it stays."""

    @property
    def model_name(self) -> str:
        """The model's, or those of all with commas."""
        return ",".join(deployment.model.name for deployment in self.deployments)

    @property
    def model_titles(self) -> str:
        """What a sentence calls the model, or all of them."""
        return ", ".join(deployment.model.title for deployment in self.deployments)

    @property
    def deployments(self) -> tuple[Deployment, ...]:
        """By model."""
        return (self.deployment,) if self.model_serving is None else self.model_serving.deployments


def resolve(config: SimulationConfig) -> Scenario:
    """Return the scenario that `config` describes.

    Raises:
        ConfigError: For anything that cannot work, with what would.
    """
    _check_load_flags(config.load)
    refuse_flags_of_others(config.serving)
    names, server = model_names(config), None
    if is_model_server(config.serving, names.served):
        server = model_serving(config.serving, names.served)
    deployment = _deployment(config.serving, names, server)
    usual_allocators = deployment.engine.allocators(config.serving)
    allocators = asked_allocators(config.measurement, usual=usual_allocators)
    goals = parse_goals(config.measurement.goodput)
    load = _load(config.load, deployment, names.of_class, (deployment,) if server is None else server.deployments)
    warmup_s, duration_s = _window(config.measurement, load)
    usual = _usual_window(load)
    replicas = replication(config.serving, end_s=None if duration_s is None else warmup_s + duration_s)
    return Scenario(
        config=SimulationConfig(
            load=_without_defaults(config.load, load),
            serving=replace(deployment.config, routing=None if replicas.routing == DEFAULT_ROUTING else replicas.routing),
            measurement=replace(
                config.measurement,
                allocator=None if allocators == usual_allocators else allocators,
                warmup=None if warmup_s == usual[0] else config.measurement.warmup,
                duration=None if duration_s == usual[1] else config.measurement.duration,
            ),
        ),
        deployment=deployment,
        load=load,
        allocators=allocators,
        goals=goals,
        warmup_s=warmup_s,
        duration_s=duration_s,
        replication=replicas,
        model_serving=server,
    )


def _deployment(serving: ServingConfig, names: ModelNames, server: ModelServing | None) -> Deployment:
    if server is None:
        same = names.served == names.asked
        return deploy(serving if same else replace(serving, model=names.served[0]))
    first = server.models[0].usual
    asked = {name: getattr(serving, name) for name in ("max_queue", "ctx_size", "max_model_len")}
    return replace(first, config=replace(first.config, model=names.in_words, **asked))


def _without_defaults(load: LoadConfig, resolved: Load) -> LoadConfig:
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


def asked_allocators(measurement: MeasurementConfig, *, usual: tuple[str, ...]) -> tuple[str, ...]:
    """Return the allocators that `measurement` names, each once; `usual` if it leaves them open.

    Raises:
        ConfigError: If it names none, or one that there is not.
    """
    if measurement.allocator is None:
        return usual
    names = [name.strip() for text in measurement.allocator for name in text.split(",") if name.strip()]
    if not names:
        raise ConfigError(f"no allocator given: choose from {', '.join(ALLOCATORS.names())}")
    for name in names:
        if name not in ALLOCATORS.names():
            raise unknown_name("allocator", name, ALLOCATORS.names())
    return tuple(dict.fromkeys(names))


def _usual_window(load: Load) -> tuple[float, float | None]:
    return (0.0, None) if load.num_requests is not None else (DEFAULT_WARMUP_S, DEFAULT_DURATION_S)


def _window(measurement: MeasurementConfig, load: Load) -> tuple[float, float | None]:
    if measurement.repeats < 1:
        raise ConfigError(f"repeats is {measurement.repeats}: needs 1 or more")
    if measurement.seed < 0:
        raise ConfigError(f"seed is {measurement.seed}: needs 0 or more")
    warmup_s, duration_s = _usual_window(load)
    if measurement.warmup is not None:
        warmup_s = parse_seconds(measurement.warmup, name="warmup")
    if measurement.duration is not None:
        duration_s = parse_seconds(measurement.duration, name="duration")
        if duration_s <= 0:
            raise ConfigError(f"duration is {measurement.duration}: needs more than 0, e.g. 600s")
    return warmup_s, duration_s


def _check_load_flags(load: LoadConfig) -> None:
    """Refuse contradictions: there is one kind of load, and every flag that it does not use is unset."""
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
    for name, largest in _LARGEST.items():
        value, smallest = getattr(load, name), _SMALLEST.get(name, 1)
        if value is not None and not smallest <= value <= largest:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}: needs {smallest:g} to {largest:,.0f}")


def _load(load: LoadConfig, deployment: Deployment, of_class: tuple[int | None, ...], deployments: tuple[Deployment, ...]) -> Load:
    """Return who asks. `of_class` are the models that the classes of a workload name, among `deployments`."""
    longest = tuple(each.scheduler.max_model_len for each in deployments)
    max_model_len = min(longest)
    if load.workload is not None:
        several = longest if len(longest) > 1 else ()
        return resolve_workload(load, load.workload, max_model_len, models=of_class, max_model_lens=several)
    if load.trace is not None:
        trace = _trace(load, max_model_len, with_content=deployment.pool.enable_prefix_caching)
        return replace(trace, num_models=len(deployments))
    prefixes = _prefixes(load, max_model_len)
    lengths = _lengths(load, max_model_len, prefixes.length)
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
    )


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


def _lengths(load: LoadConfig, max_model_len: int, prefix_len: int) -> LengthDistribution:
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
        raise ConfigError(
            f"requests of {lengths.name} tokens{behind} are longer than max-model-len {max_model_len}: "
            f"--max-model-len {prefix_len + lengths.max_total} would hold them"
        )
    return lengths


def _trace(load: LoadConfig, max_model_len: int, *, with_content: bool) -> TraceReplay:
    trace = read_trace(Path(load.trace or ""), format=load.trace_format, with_content=None if with_content else False)
    total = trace.prompt_tokens + trace.output_tokens
    fits = total <= max_model_len
    if not fits.any():
        raise ConfigError(
            f"every request of {trace.path} is longer than max-model-len {max_model_len}; the first, line {trace.line_numbers[0]} "
            f"(or entry, in a JSON document), has {trace.prompt_tokens[0]} + {trace.output_tokens[0]} tokens: "
            f"--max-model-len {total.max()} would hold all, {total.min()} the shortest"
        )
    if load.over_length == "drop":
        trace = trace.where(fits)
    if load.num_prompts is not None:
        trace = trace.first(load.num_prompts)
    return TraceReplay(trace=trace.scaled(load.trace_rate or 1.0))
