"""A configuration with every question answered: model, machine, memory, limits, load. Built once, run many times."""

from dataclasses import dataclass, replace
from pathlib import Path

from pagedkv.allocation import KVPoolSettings
from pagedkv.allocators import ALLOCATORS
from pagedkv.catalogue import load_hardware, load_model
from pagedkv.errors import ConfigError, unknown_name
from pagedkv.hardware_spec import HardwareSpec
from pagedkv.heaps import HEAPS
from pagedkv.memory_budget import MemoryBudget
from pagedkv.model_spec import ModelSpec
from pagedkv.scheduling.scheduler import SchedulerSettings
from pagedkv.sims.config import LoadConfig, MeasurementConfig, SimulationConfig, parse_seconds
from pagedkv.sims.engines import ENGINES
from pagedkv.sims.goodput import Goal, parse_goals
from pagedkv.sims.lengths import FileLengths, FixedLengths, LengthDistribution, load_lengths, restricted
from pagedkv.sims.load import ClosedLoop, Load, OpenLoop, TraceReplay
from pagedkv.sims.step_time import RooflineStepTime
from pagedkv.sims.traces import read_trace
from pagedkv.weight_format import WeightFormat, load_weight_format

DEFAULT_DURATION_S = 600.0
DEFAULT_WARMUP_S = 60.0
DEFAULT_THINK_TIME_S = 20.0
DEFAULT_LENGTHS = "azure-conv"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """What a simulation runs on."""

    config: SimulationConfig
    """As asked for."""
    model: ModelSpec
    hardware: HardwareSpec
    weight_format: WeightFormat
    budget: MemoryBudget
    scheduler: SchedulerSettings
    pool: KVPoolSettings
    step_time: RooflineStepTime
    load: Load
    allocators: tuple[str, ...]
    goals: tuple[Goal, ...]
    warmup_s: float
    duration_s: float | None
    """Measured time after the warm-up; None: until all requests of the load are answered."""


def resolve(config: SimulationConfig) -> Scenario:
    """Return the scenario that `config` describes.

    Raises:
        ConfigError: For anything that cannot work, with what would.
    """
    serving, measurement = config.serving, config.measurement
    model, hardware = load_model(serving.model), load_hardware(serving.hardware)
    engine = ENGINES.load(serving.engine)
    scheduler = engine.scheduler_settings(serving, model, hardware)
    allocators = _allocators(measurement)
    if serving.contiguous_heap not in HEAPS.names():
        raise unknown_name("contiguous-heap", serving.contiguous_heap, HEAPS.names())
    if not 0 <= serving.watermark < 1:
        raise ConfigError(f"watermark {serving.watermark} is a share of the blocks: needs 0 or more, below 1")
    goals = parse_goals(measurement.goodput)
    load = _load(config.load, scheduler.max_model_len)
    warmup_s, duration_s = _window(measurement, load)
    weight_format = load_weight_format(serving.quantization) if serving.quantization else model.native_format
    budget = engine.memory_budget(serving, model, weight_format, hardware, scheduler)
    return Scenario(
        config=config,
        model=model,
        hardware=hardware,
        weight_format=weight_format,
        budget=budget,
        scheduler=scheduler,
        pool=KVPoolSettings(
            num_blocks=budget.num_blocks,
            block_size=serving.block_size,
            max_num_seqs=scheduler.max_num_seqs,
            max_model_len=scheduler.max_model_len,
            contiguous_heap=serving.contiguous_heap,
            watermark=serving.watermark,
            reserve_full_isl=serving.scheduler_reserve_full_isl,
        ),
        step_time=RooflineStepTime(
            model,
            hardware,
            weight_format=weight_format,
            kv_spec=model.kv_spec(serving.kv_cache_dtype),
            enforce_eager=serving.enforce_eager,
        ),
        load=load,
        allocators=allocators,
        goals=goals,
        warmup_s=warmup_s,
        duration_s=duration_s,
    )


def _allocators(measurement: MeasurementConfig) -> tuple[str, ...]:
    names = [name.strip() for text in measurement.allocator for name in text.split(",") if name.strip()]
    if not names:
        raise ConfigError(f"no allocator given: choose from {', '.join(ALLOCATORS.names())}")
    for name in names:
        if name not in ALLOCATORS.names():
            raise unknown_name("allocator", name, ALLOCATORS.names())
    return tuple(dict.fromkeys(names))


def _window(measurement: MeasurementConfig, load: Load) -> tuple[float, float | None]:
    if measurement.repeats < 1:
        raise ConfigError(f"repeats is {measurement.repeats}: needs 1 or more")
    if measurement.seed < 0:
        raise ConfigError(f"seed is {measurement.seed}: needs 0 or more")
    drains = load.num_requests is not None
    warmup_s, duration_s = (0.0, None) if drains else (DEFAULT_WARMUP_S, DEFAULT_DURATION_S)
    if measurement.warmup is not None:
        warmup_s = parse_seconds(measurement.warmup, name="warmup")
    if measurement.duration is not None:
        duration_s = parse_seconds(measurement.duration, name="duration")
        if duration_s <= 0:
            raise ConfigError(f"duration is {measurement.duration}: needs more than 0, e.g. 600s")
    return warmup_s, duration_s


def _load(load: LoadConfig, max_model_len: int) -> Load:
    """Return who asks; every flag that the kind of load does not use must be unset."""
    kinds = [name for name in ("users", "request_rate", "trace") if getattr(load, name) is not None]
    if len(kinds) != 1:
        given = " and ".join(f"--{name.replace('_', '-')}" for name in kinds) or "none of them"
        raise ConfigError(f"the load is one of --users N, --request-rate R and --trace FILE; {given} was given. Try --users 100")
    kind = kinds[0]
    belongs = {
        "think_time": ("users",),
        "burstiness": ("request_rate",),
        "num_prompts": ("request_rate", "trace"),
        "trace_format": ("trace",),
        "trace_rate": ("trace",),
        "lengths": ("users", "request_rate"),
        "random_input_len": ("users", "request_rate"),
        "random_output_len": ("users", "request_rate"),
        "random_range_ratio": ("users", "request_rate"),
    }
    for name, loads in belongs.items():
        if getattr(load, name) is not None and kind not in loads:
            goes_with = " or ".join(f"--{each.replace('_', '-')}" for each in loads)
            raise ConfigError(f"--{name.replace('_', '-')} goes with {goes_with}, not with --{kind.replace('_', '-')}")
    for name in ("users", "request_rate", "burstiness", "num_prompts", "trace_rate"):
        value = getattr(load, name)
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"--{name.replace('_', '-')} is {value}: needs a number above 0")
    if kind == "trace":
        return _trace(load, max_model_len)
    lengths = _lengths(load, max_model_len)
    if load.users is not None:
        think_time_s = DEFAULT_THINK_TIME_S if load.think_time is None else parse_seconds(load.think_time, name="think-time")
        return ClosedLoop(users=load.users, think_time_s=think_time_s, lengths=lengths)
    assert load.request_rate is not None
    return OpenLoop(
        request_rate_per_s=load.request_rate,
        burstiness=1.0 if load.burstiness is None else load.burstiness,
        num_requests=load.num_prompts,
        lengths=lengths,
    )


def _lengths(load: LoadConfig, max_model_len: int) -> LengthDistribution:
    fixed = (load.random_input_len, load.random_output_len)
    if fixed == (None, None):
        if load.random_range_ratio is not None:
            raise ConfigError("--random-range-ratio goes with --random-input-len and --random-output-len")
        lengths = load_lengths(load.lengths or DEFAULT_LENGTHS)
        if load.lengths_in_order:
            if not isinstance(lengths, FileLengths) or load.request_rate is None:
                raise ConfigError("--lengths-in-order goes with --request-rate and --lengths FILE: only a file has an order")
            lengths = replace(lengths, in_order=True)
        return restricted(lengths, max_model_len) if load.over_length == "drop" else lengths
    if load.lengths is not None:
        raise ConfigError("--lengths and --random-input-len/--random-output-len contradict each other: give one")
    if None in fixed:
        raise ConfigError("--random-input-len and --random-output-len go together: give both")
    lengths = FixedLengths(
        input_len=load.random_input_len or 0, output_len=load.random_output_len or 0, range_ratio=load.random_range_ratio or 0.0
    )
    if lengths.max_total > max_model_len:
        raise ConfigError(
            f"requests of {lengths.name} tokens are longer than max-model-len {max_model_len}: "
            f"--max-model-len {lengths.max_total} would hold them"
        )
    return lengths


def _trace(load: LoadConfig, max_model_len: int) -> TraceReplay:
    trace = read_trace(Path(load.trace or ""), format=load.trace_format)
    total = trace.prompt_tokens + trace.output_tokens
    fits = total <= max_model_len
    if not fits.any():
        raise ConfigError(
            f"every request of {trace.path} is longer than max-model-len {max_model_len}; the first, on line "
            f"{trace.line_numbers[0]}, has {trace.prompt_tokens[0]} + {trace.output_tokens[0]} tokens: "
            f"--max-model-len {total.max()} would hold all, {total.min()} the shortest"
        )
    if load.over_length == "drop":
        trace = trace.where(fits)
    if load.num_prompts is not None:
        trace = trace.first(load.num_prompts)
    return TraceReplay(trace=trace.scaled(load.trace_rate or 1.0))
