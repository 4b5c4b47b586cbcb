"""Replays a vLLM log in the simulator, fits constants to its first minute, and scores what comes after."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from pagedkv.arrays import Float64Array
from pagedkv.catalogue import hardware_names, load_hardware, load_model
from pagedkv.errors import ConfigError
from pagedkv.hardware_spec import HardwareSpec
from pagedkv.sims.config import LoadConfig, MeasurementConfig, ServingConfig, SimulationConfig
from pagedkv.sims.load import TraceReplay
from pagedkv.sims.recording import INTERNAL, RESERVED, RUNNING, STATE, TOKENS
from pagedkv.sims.scenario import Scenario, resolve
from pagedkv.sims.simulation import Run, run
from pagedkv.sims.step_constants import StepConstants, catalogue_constants
from pagedkv.sims.step_time import RooflineStepTime
from pagedkv.sims.validation.vllm_log import VLLMLog
from pagedkv.sims.vllm_versions import VLLM_VERSIONS

FIT_S = 60.0
"""How much of a run its constants are fitted to."""
FREE: Sequence[tuple[str, ...]] = (("kv_read_bytes_per_s",), ("linear_flops", "attention_flops"), ("weight_read_bytes_per_s",))
"""What a run decides: one factor for each of these, on the machine's figures."""
_PRIOR_SPREAD = 0.15
_FIRST_STEP = 0.08
_LAST_STEP = 0.004


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Replay:
    """A simulated run of a log."""

    run: Run
    num_slots: int

    def seconds(self, num: int) -> tuple[Float64Array, Float64Array]:
        """Return (requests running, share of the KV blocks in use in %), means of each of the first `num` seconds."""
        timeline = self.run.recorder.timeline
        start, _, gauges = timeline.means()
        used = gauges[:, [TOKENS, RESERVED, INTERNAL, STATE]].sum(1) / self.num_slots
        at = np.arange(num)
        return np.interp(at, start, gauges[:, RUNNING], right=0.0), 100 * np.interp(at, start, used, right=0.0)


def scenario_of(log: VLLMLog, hardware: str) -> Scenario:
    """Return the scenario that a log's meta.json describes, with its requests, on the machine that `--hardware` would name so.

    Raises:
        ConfigError: If its model or version is not known, with what is.
    """
    version = next((name for name in VLLM_VERSIONS if log.version.startswith(f"{name}.") or log.version == name), None)
    if version is None:
        raise ConfigError(
            f"{log.folder}: a run of vLLM {log.version}, whose rules are not modelled; the versions are {', '.join(VLLM_VERSIONS)}"
        )
    load_model(log.model)
    settings = log.settings
    serving = ServingConfig(
        hardware=hardware,
        model=log.model,
        engine=f"vllm@{version}",
        max_num_seqs=settings.get("max_num_seqs"),
        max_num_batched_tokens=settings.get("max_num_batched_tokens"),
        max_model_len=settings.get("max_model_len"),
        kv_cache_dtype=str(settings.get("kv_cache_dtype", "auto")),
        num_gpu_blocks_override=log.num_gpu_blocks,
        block_size=log.block_size,
        enable_prefix_caching=log.enable_prefix_caching,
    )
    scenario = resolve(
        SimulationConfig(load=LoadConfig(users=1), serving=serving, measurement=MeasurementConfig(allocator=("paged",)))
    )
    return replace(scenario, load=TraceReplay(trace=log.trace), warmup_s=0.0, duration_s=None)


def machine_of(log: VLLMLog) -> HardwareSpec:
    """Return the catalogue's machine whose title names the log's device.

    Raises:
        ConfigError: If there is none, with how to name one.
    """
    for name in hardware_names():
        hardware = load_hardware(name)
        if hardware.title.partition(" (")[0].lower() == log.device.lower():
            return hardware
    raise ConfigError(f"{log.folder}: unknown device {log.device!r}; name its machine with --hardware, or a .toml file")


def replay(scenario: Scenario, constants: StepConstants | None = None) -> Replay:
    """Return the run, with other constants than the deployment's where some are given."""
    deployment = scenario.deployment
    if constants is not None:
        model = deployment.model
        step_time = RooflineStepTime(
            model,
            deployment.hardware,
            weight_format=deployment.weight_format,
            kv_spec=model.kv_spec(deployment.config.kv_cache_dtype),
            constants=constants,
        )
        scenario = replace(scenario, deployment=replace(deployment, step_time=step_time))
    pool = deployment.pool
    return Replay(run=run(scenario, "paged", seed=0), num_slots=pool.num_blocks * pool.block_size)


def fit_to_beginning(log: VLLMLog, scenario: Scenario) -> StepConstants:
    """Return constants under which the first `FIT_S` seconds go as in the log: when first tokens come, how many tokens are made.

    Nothing that the log says of later times is looked at.
    """
    prior = catalogue_constants(scenario.deployment.hardware, scenario.deployment.weight_format)
    early = np.flatnonzero(log.first_token_s <= FIT_S)
    finished = np.flatnonzero(log.finish_s <= FIT_S)
    made = np.cumsum(log.seconds["gen_throughput"])[: int(FIT_S)]
    beginning = replace(scenario, duration_s=FIT_S, load=TraceReplay(trace=log.trace.where(log.trace.arrival_s <= FIT_S)))

    def constants(x: Float64Array) -> StepConstants:
        factors = {name: math.exp(value) for names, value in zip(FREE, x, strict=True) for name in names}
        return replace(prior, **{name: getattr(prior, name) * factor for name, factor in factors.items()})

    def loss(x: Float64Array) -> float:
        ours = replay(beginning, constants(x)).run.log
        first = np.nan_to_num(ours.first_token_s[early], nan=FIT_S) - log.first_token_s[early]
        last = np.where(ours.num_output_tokens >= ours.output_tokens, ours.last_token_s, FIT_S)[finished] - log.finish_s[finished]
        total = ours.num_output_tokens.sum() / made[-1] - 1
        return float(
            np.mean(np.abs(first)) / FIT_S + np.mean(np.abs(last)) / FIT_S + abs(total) + 0.01 * np.sum((x / _PRIOR_SPREAD) ** 2)
        )

    return constants(_pattern_search(loss, len(FREE)))


def _pattern_search(loss: Callable[[Float64Array], float], size: int) -> Float64Array:
    """Return where `loss`, which may jump, is low: steps along each axis, halved when none helps."""
    x, step = np.zeros(size), _FIRST_STEP
    best = loss(x)
    while step > _LAST_STEP:
        tried = [x + sign * step * axis for axis in np.eye(size) for sign in (1, -1)]
        losses = [loss(each) for each in tried]
        lowest = int(np.argmin(losses))
        if losses[lowest] < best:
            x, best = tried[lowest], losses[lowest]
        else:
            step /= 2
    return x
