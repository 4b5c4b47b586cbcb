"""`reality` without a model: what is fitted to steps, and how a prediction is judged."""

import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedkv.allocation import KVPoolSettings
from pagedkv.catalogue import load_hardware, load_model
from pagedkv.errors import ConfigError
from pagedkv.scheduling.scheduler_settings import SchedulerSettings
from pagedkv.sims.latencies import Latencies
from pagedkv.sims.reality.asked import RealityConfig
from pagedkv.sims.reality.processor_clock import ProcessorClock
from pagedkv.sims.reality.real_run import StepLog
from pagedkv.sims.reality.step_fit import FREE, fit_steps, simulated, step_seconds, step_time
from pagedkv.sims.reality.study import OCCUPANCY_POINTS, TTFT, Served, sections
from pagedkv.sims.reality.timed_load import TimedLoad, timed_loads
from pagedkv.sims.simulation import Run
from pagedkv.sims.step_constants import StepConstants, catalogue_constants
from pagedkv.step_batch import empty_batch

MODEL, HARDWARE = load_model("llama-3.1-8b"), load_hardware("dgx-spark")
FORMAT = MODEL.native_format
PRIOR = catalogue_constants(HARDWARE, FORMAT)
TRUE = replace(
    PRIOR,
    weight_read_bytes_per_s=0.6 * PRIOR.weight_read_bytes_per_s,
    linear_flops=0.4 * PRIOR.linear_flops,
    step_overhead_s=8e-3,
    batched_layer_overhead_s=90e-6,
    sequence_overhead_s=120e-6,
    overlap=2.0,
)
LOADS = timed_loads(num_requests=60, capacity_per_s=0.5, seed=4)


def served(load: TimedLoad, constants: StepConstants) -> Run:
    limits = SchedulerSettings(max_num_seqs=load.max_num_seqs, max_num_batched_tokens=512, max_model_len=4096)
    pool = KVPoolSettings(num_blocks=600, block_size=16, max_num_seqs=load.max_num_seqs, max_model_len=4096)
    return simulated(load, limits, pool, step_time(MODEL, HARDWARE, constants, weight_format=FORMAT, kv_cache_dtype="auto"))


def steps_like_those_of(load: TimedLoad, seed: int) -> StepLog:
    """Return steps as a machine of `TRUE` would take them, in noise of 3 % and with some that something interrupts."""
    rng, batches = np.random.default_rng(seed), []
    for _ in range(400):
        size = int(rng.integers(1, load.max_num_seqs + 1))
        batch = empty_batch(size)
        batch["num_known_tokens"] = rng.choice(load.prompt_tokens, size)
        batch["num_scheduled_tokens"] = np.where(rng.random(size) < 0.1, batch["num_known_tokens"], 1)
        batch["num_slots_needed"] = batch["num_known_tokens"]
        batches.append(batch)
    bare = StepLog(batches=tuple(batches), seconds=np.zeros(400))
    seconds = step_seconds(bare, MODEL, TRUE, weight_format=FORMAT, kv_cache_dtype="auto") * rng.normal(1.0, 0.03, 400)
    seconds[rng.integers(0, 400, 4)] *= 10
    return replace(bare, seconds=seconds)


def test_constants_fitted_to_one_load_predict_the_others() -> None:
    logs = [steps_like_those_of(LOADS[0], seed) for seed in range(2)]
    fitted = fit_steps(logs, MODEL, weight_format=FORMAT, kv_cache_dtype="auto", prior=PRIOR)
    assert all(getattr(fitted, name) == getattr(PRIOR, name) for name in ("state_bytes_per_s", "routing_exponent"))
    for load in LOADS:
        truth, ours = (served(load, constants) for constants in (TRUE, fitted))
        for name in ("ttft_s", "tpot_s", "e2e_s"):
            mean, its = (float(np.nanmean(getattr(Latencies.of(run.log, run.end_s), name))) for run in (truth, ours))
            assert its == pytest.approx(mean, rel=TTFT if name == "ttft_s" else 0.04), (load.name, name)


@given(slower=st.floats(0.5, 2.0))
def test_a_bar_holds_where_the_prediction_is_near_and_fails_where_it_is_not(slower: float) -> None:
    truth = served(LOADS[1], TRUE)
    wrong = served(LOADS[1], replace(TRUE, step_overhead_s=slower * TRUE.step_overhead_s + (slower - 1) * 0.1))
    first, section = sections(
        [Served(load=load, real=(truth, truth), predicted=wrong, num_slots=9600) for load in (LOADS[0], LOADS[1])]
    )
    assert {check.outcome for check in first.checks} == {"no bar"}  # the machine was fitted to it
    outcomes = {check.what.partition(" (")[0]: check.outcome for check in section.checks}
    for name, words, bar in (("tpot_s", "mean TPOT", 0.05), ("e2e_s", "mean E2E", 0.05), ("ttft_s", "mean TTFT", 0.10)):
        mean, its = (float(np.nanmean(getattr(Latencies.of(run.log, run.end_s), name))) for run in (truth, wrong))
        assert outcomes[words] == ("holds" if abs(its / mean - 1) <= bar else "fails")
    used, predicted = section.details["occupancy"].values()
    off = np.abs(np.array(used) - np.array(predicted)).mean()
    assert section.checks[-1].outcome == ("holds" if off <= OCCUPANCY_POINTS else "fails")


def test_real_runs_that_differ_widen_the_bar() -> None:
    runs = tuple(served(LOADS[1], replace(TRUE, step_overhead_s=each)) for each in (6e-3, 8e-3, 12e-3))
    section = sections([Served(load=LOADS[1], real=runs, predicted=runs[2], num_slots=9600)] * 2)[1]
    means = [float(np.nanmean(Latencies.of(run.log, run.end_s).tpot_s)) for run in runs]
    spread = (max(means) - min(means)) / np.median(means)
    assert section.checks[0].bar == f"within {2 * spread:.0%}"
    assert 2 * spread > 0.05


def test_loads_differ_in_what_they_say() -> None:
    usual, bursts, lengths, batch = LOADS
    gaps, half = np.diff(usual.arrival_s), usual.size // 2
    assert gaps[:half].mean() > 1.4 * gaps[half:].mean()
    assert np.diff(bursts.arrival_s).std() > 1.4 * np.diff(bursts.arrival_s).mean()
    assert lengths.prompt_tokens.mean() > 1.5 * usual.prompt_tokens.mean()
    assert lengths.output_tokens.mean() < 0.7 * usual.output_tokens.mean()
    assert not batch.arrival_s.any()
    assert batch.max_num_seqs == 2 * usual.max_num_seqs
    assert len({load.name for load in LOADS}) == len(LOADS)


def test_all_free_constants_are_constants() -> None:
    assert all(hasattr(PRIOR, name) for name in FREE)


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({}, "give one of --model FOLDER and --random-weights CONFIG"),
        ({"random_weights": "x", "num_requests": 3}, "--num-requests is 3: needs 8 or more"),
        ({"random_weights": "x", "repeats": 1}, "--repeats is 1: needs 2 or more"),
    ],
)
def test_what_cannot_be_asked(wrong: dict[str, object], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        RealityConfig(**wrong)  # type: ignore[arg-type]


def test_a_processor_clock_counts_work_and_waiting_but_not_what_others_do() -> None:
    clock = ProcessorClock()
    began = clock.now()
    time.sleep(0.2)  # somebody else has the processor
    assert clock.now() - began < 0.1
    clock.sleep(5.0)
    assert 5.0 <= clock.now() - began < 5.1
    busy_until = time.process_time() + 0.05
    while time.process_time() < busy_until:
        pass
    assert clock.now() - began >= 5.05
