"""Law 12: with one server, Poisson arrivals and requests of one step, the engine is the queue of the textbooks.

Source of the formulas: Kleinrock, Queueing Systems, vol. 1, sections 3.2 (M/M/1) and 5.6 (M/G/1, Pollaczek-Khinchin).
"""

from collections.abc import Callable

import numpy as np
import pytest
import simpy

from pagedkv.allocation import KVPoolSettings
from pagedkv.arrays import Float64Array
from pagedkv.scheduling.scheduler import Scheduler
from pagedkv.scheduling.scheduler_settings import SchedulerSettings
from pagedkv.sims.engine import Engine
from pagedkv.sims.lengths import FixedLengths
from pagedkv.sims.load import OpenLoop
from pagedkv.sims.recorder import Recorder
from pagedkv.sims.recording import RUNNING, WAITING
from pagedkv.sims.records import RequestLog
from pagedkv.sims.step_time import StepCost
from pagedkv.step_allocation import step_allocator
from pagedkv.step_batch import StepBatch

ARRIVALS_PER_S = 0.5
SERVICE_S = 1.0
UTILIZATION = ARRIVALS_PER_S * SERVICE_S


class Steps:
    """A step-time model that draws, and remembers."""

    def __init__(self, draw: Callable[[], float]) -> None:
        self.draw = draw
        self.took_s: list[float] = []

    def cost(self, batch: StepBatch, num_entries: int) -> StepCost:
        assert num_entries == 1
        self.took_s.append(self.draw())
        return StepCost(0.0, 0.0, self.took_s[-1])


class Queue:
    """A run of `num_requests` requests, one after the other."""

    def __init__(self, draw: Callable[[], float], num_requests: int) -> None:
        env = simpy.Environment(initial_time=0.0)
        allocator = step_allocator("paged", KVPoolSettings(num_blocks=2, max_num_seqs=1, max_model_len=2))
        scheduler = Scheduler(SchedulerSettings(max_num_seqs=1, max_model_len=2), allocator)
        self.recorder = Recorder(scheduler, warmup_s=0.0, end_s=float("inf"))
        self.steps = Steps(draw)
        engine = Engine(env, scheduler, self.steps, self.recorder)
        lengths = FixedLengths(input_len=1, output_len=1)
        load = OpenLoop(request_rate_per_s=ARRIVALS_PER_S, burstiness=1.0, num_requests=num_requests, lengths=lengths)
        load.start(env, engine, seed=11)
        env.run()
        self.end_s = env.now
        self.log: RequestLog = self.recorder.log()

    @property
    def waits_s(self) -> Float64Array:
        waits_s: Float64Array = self.log.scheduled_s - self.log.arrival_s
        return waits_s

    def seen_by_arrivals(self) -> Float64Array:
        """How many requests each finds in the system: those before it, less those that have left."""
        left = np.searchsorted(self.log.last_token_s, self.log.arrival_s, side="right")
        return np.arange(len(self.log), dtype=float) - left


@pytest.fixture(scope="module")
def exponential() -> Queue:
    rng = np.random.default_rng(7)
    return Queue(lambda: float(rng.exponential(SERVICE_S)), 12_000)


@pytest.fixture(scope="module")
def constant() -> Queue:
    return Queue(lambda: SERVICE_S, 6_000)


def assert_mean(samples: Float64Array, theory: float) -> None:
    """Within 4 standard errors from the means of 40 batches, which must be small enough to tell something."""
    batches = np.array([batch.mean() for batch in np.array_split(samples, 40)])
    error = batches.std(ddof=1) / np.sqrt(batches.size)
    assert error < 0.1 * theory
    assert abs(samples.mean() - theory) < 4 * error


def test_m_m_1(exponential: Queue) -> None:
    rho = UTILIZATION
    assert_mean(np.diff(exponential.log.arrival_s), 1 / ARRIVALS_PER_S)
    assert_mean(exponential.waits_s, rho * SERVICE_S / (1 - rho))
    assert_mean(exponential.log.last_token_s - exponential.log.arrival_s, SERVICE_S / (1 - rho))
    seen = exponential.seen_by_arrivals()
    assert_mean(seen, rho / (1 - rho))  # Poisson arrivals see what is there over time
    for n in range(4):
        assert_mean((seen == n).astype(float), (1 - rho) * rho**n)


def test_m_d_1(constant: Queue) -> None:
    rho = UTILIZATION
    assert_mean(constant.waits_s, rho * SERVICE_S / (2 * (1 - rho)))
    assert_mean((constant.seen_by_arrivals() == 0).astype(float), 1 - rho)


@pytest.fixture(params=["exponential", "constant"])
def queue(request: pytest.FixtureRequest) -> Queue:
    one: Queue = request.getfixturevalue(request.param)
    return one


def test_each_wait_follows_from_the_one_before(queue: Queue) -> None:
    """Lindley's recursion: W' = max(0, W + service - gap)."""
    wait_s, gaps_s = 0.0, [0.0, *np.diff(queue.log.arrival_s)]
    expected, served_s = [], 0.0
    for gap_s, took_s in zip(gaps_s, queue.steps.took_s, strict=True):
        wait_s = max(0.0, wait_s + served_s - gap_s)
        expected.append(wait_s)
        served_s = took_s
    np.testing.assert_allclose(queue.waits_s, expected, atol=1e-8)


def test_the_recorder_sees_the_server_busy_as_long_as_steps_take(queue: Queue) -> None:
    sums = queue.recorder.integrals
    np.testing.assert_allclose(sums.observed_s[0], queue.end_s)
    np.testing.assert_allclose(sums.gauges[RUNNING], sum(queue.steps.took_s))
    np.testing.assert_allclose(sums.gauges[RUNNING] / queue.end_s, UTILIZATION, rtol=0.05)


def test_the_recorder_counts_who_waits_from_the_first_decision_after_the_arrival(queue: Queue) -> None:
    """`waiting_mean` as docs/metrics.md defines it; Little's law holds with waits that start there."""
    log = queue.log
    decisions_s = log.scheduled_s  # each step serves one request
    first_decision_s = decisions_s[np.searchsorted(decisions_s, log.arrival_s)]
    np.testing.assert_allclose(queue.recorder.integrals.gauges[WAITING], (log.scheduled_s - first_decision_s).sum())
