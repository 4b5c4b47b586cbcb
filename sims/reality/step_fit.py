"""The constants of a machine's steps, from what steps took, and what a load would do under them."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from pagedkv.allocation import KVPoolSettings
from pagedkv.arrays import Float64Array
from pagedkv.hardware_spec import HardwareSpec
from pagedkv.model_spec import ModelSpec
from pagedkv.scheduling.scheduler import Scheduler
from pagedkv.scheduling.scheduler_settings import SchedulerSettings
from pagedkv.sims.clock import Clock
from pagedkv.sims.compiled_engine import CompiledEngine
from pagedkv.sims.reality.real_run import StepLog
from pagedkv.sims.reality.timed_load import TimedLoad
from pagedkv.sims.recorder import Recorder
from pagedkv.sims.simulation import Run
from pagedkv.sims.step_constants import StepConstants
from pagedkv.sims.step_time import RooflineStepTime
from pagedkv.sims.validation.least_squares import least_squares, softened
from pagedkv.sims.validation.work import Work, as_row
from pagedkv.step_allocation import step_allocator
from pagedkv.weight_format import WeightFormat

MEASURED = ("weight_read_bytes_per_s", "linear_flops", "kv_read_bytes_per_s", "attention_flops")
"""What the machine was measured to reach, by single kernels."""
FREE = (
    *MEASURED,
    "step_overhead_s",
    "batched_layer_overhead_s",
    "sequence_overhead_s",
    "token_overhead_s",
    "overlap",
)
"""What steps of many sizes decide; all else is the machine's."""
_STARTS: dict[str, Any] = {
    "step_overhead_s": 2e-3,
    "batched_layer_overhead_s": 50e-6,
    "sequence_overhead_s": 50e-6,
    "token_overhead_s": 50e-6,
    "overlap": 3.0,
}
"""Where to begin with constants of an engine in Python: no machine has them."""
_MEASURED_SPREAD = 0.25
"""How far, in logarithms, a constant that was measured may lie from that before the steps must say so: a kernel reaches about the
same in an engine. Source: of 0.1 to 1.5 the value with which a fit to steps of few sequences of the fitted load foretells its steps
of many best (1 % off; 3 % with 1.5)."""
_PRIOR_SPREAD = 1.5
"""The same for constants of an engine in Python, which begin anywhere."""
_EXPECTED_ERROR = 0.1
_SOFT_FROM = 5.0
"""Of a step's time, and how many times that count linearly: an interrupted step must not decide."""


def fit_steps(
    logs: Sequence[StepLog], model: ModelSpec, *, weight_format: WeightFormat, kv_cache_dtype: str, prior: StepConstants
) -> StepConstants:
    """Return the constants under which the steps of `logs` take, in all, what they took. O(steps × iterations)."""
    batches = [batch for log in logs for batch in log.batches]
    seconds = np.concatenate([log.seconds for log in logs])
    work = Work.of_steps(batches, model, weight_format=weight_format, kv_cache_dtype=kv_cache_dtype, row_rates=prior.row_rates)
    start = replace(prior, **_STARTS)
    spreads = np.array([_MEASURED_SPREAD if name in MEASURED else _PRIOR_SPREAD for name in FREE])
    scale = np.sqrt(seconds * seconds.mean()) * _EXPECTED_ERROR  # in between: relative errors, and sums

    def constants(x: Float64Array) -> StepConstants:
        values: dict[str, Any] = {name: getattr(start, name) * math.exp(value) for name, value in zip(FREE, x, strict=True)}
        values["overlap"] = 1 + (start.overlap - 1) * math.exp(x[FREE.index("overlap")])
        return replace(start, **values)

    def residuals(x: Float64Array) -> Float64Array:
        rows = np.broadcast_to(as_row(constants(x)), (seconds.size, as_row(start).size))
        off = (work.tokens / work.rates(np.ascontiguousarray(rows)) - seconds) / scale
        return np.concatenate((softened(off, _SOFT_FROM), x / spreads))

    return constants(least_squares(residuals, np.zeros(len(FREE))))


def step_seconds(
    log: StepLog, model: ModelSpec, constants: StepConstants, *, weight_format: WeightFormat, kv_cache_dtype: str
) -> Float64Array:
    """Return what the steps of `log` take under `constants`."""
    work = Work.of_steps(
        log.batches, model, weight_format=weight_format, kv_cache_dtype=kv_cache_dtype, row_rates=constants.row_rates
    )
    rows = np.tile(as_row(constants), (len(log.batches), 1))
    return work.tokens / work.rates(rows)


def step_time(
    model: ModelSpec, hardware: HardwareSpec, constants: StepConstants, *, weight_format: WeightFormat, kv_cache_dtype: str
) -> RooflineStepTime:
    """Return the step-time model of these constants."""
    spec = model.kv_spec(kv_cache_dtype)
    return RooflineStepTime(model, hardware, weight_format=weight_format, kv_spec=spec, constants=constants)


def simulated(load: TimedLoad, limits: SchedulerSettings, pool: KVPoolSettings, steps: RooflineStepTime) -> Run:
    """Return what `load` does before the scheduler and allocator of the simulator."""
    scheduler = Scheduler(limits, step_allocator("hybrid" if pool.layer_groups else "paged", pool))
    env, recorder = Clock(initial_time=0.0), Recorder(scheduler, warmup_s=0.0, end_s=math.inf)
    engine = CompiledEngine(env, scheduler, steps, recorder)
    engine.submit_all(load.arrival_s, load.prompt_tokens, load.output_tokens)
    env.run()
    engine.close()
    recorder.close(env.now)
    return Run(allocator=scheduler.allocator, recorder=recorder, log=recorder.log(), end_s=env.now, warmup_s=0.0, drained=True)
