"""What holds of every run, whatever the load and the allocator: docs/invariants.md gives each law its number."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import simpy
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pagedkv.allocation import KVPoolSettings
from pagedkv.allocators import ALLOCATORS
from pagedkv.heaps import HEAPS
from pagedkv.paged_steps import PagedStepAllocator
from pagedkv.scheduling.scheduler import Scheduler
from pagedkv.sims.config import LoadConfig, MeasurementConfig, ServingConfig, SimulationConfig
from pagedkv.sims.engine import Engine
from pagedkv.sims.load import Load
from pagedkv.sims.metrics import measure
from pagedkv.sims.recorder import INTERNAL, KV_KINDS, RUNNING, Recorder
from pagedkv.sims.records import Outcome
from pagedkv.sims.results import simulate
from pagedkv.sims.scenario import Scenario, resolve
from pagedkv.sims.simulation import Run, run
from pagedkv.step_allocation import step_allocator
from pagedkv.step_batch import empty_batch

LENGTHS: dict[str, Any] = {"random_input_len": 300, "random_output_len": 60, "random_range_ratio": 0.9}
TRACE = "arrival_s,input_tokens,output_tokens\n" + "".join(
    f"{i % 7 * 0.9},{1 + i * 37 % 700},{1 + i * 13 % 90}\n" for i in range(60)
)


def scenario(load: LoadConfig, *, num_blocks: int = 100, duration: str | None = None, **serving: Any) -> Scenario:
    """A Spark with few blocks: requests queue, are preempted and, if longer than 900 tokens, rejected."""
    limits = {"max_model_len": 900, "max_num_batched_tokens": 512, "num_gpu_blocks_override": num_blocks, **serving}
    return resolve(
        SimulationConfig(
            load=load,
            serving=ServingConfig(**limits),
            measurement=MeasurementConfig(allocator=ALLOCATORS.names(), duration=duration),
        )
    )


@pytest.fixture(
    scope="module", params=["closed loop", "open loop", "open loop that ends", "idle at the end", "state of Mamba layers", "trace"]
)
def busy(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Scenario:
    """Each kind of load. Those that never end are cut off in the middle of their work."""
    match request.param:
        case "closed loop":
            return scenario(LoadConfig(users=12, think_time="2s", lengths="azure-conv"), duration="40s")
        case "open loop":
            return scenario(LoadConfig(request_rate=1.5, burstiness=0.5, lengths="azure-conv"), duration="40s")
        case "open loop that ends":
            return scenario(LoadConfig(request_rate=1.5, num_prompts=60, **LENGTHS))
        case "idle at the end":
            return scenario(LoadConfig(request_rate=3.0, num_prompts=15, **LENGTHS), duration="60s")
        case "state of Mamba layers":
            load = LoadConfig(request_rate=5.0, num_prompts=60, **LENGTHS)
            return scenario(load, num_blocks=2080, model="nemotron-3-nano-30b-a3b")
    file = tmp_path_factory.mktemp("trace") / "trace.csv"
    file.write_text(TRACE + "0.5,500,600\n")
    return scenario(LoadConfig(trace=str(file)))


@dataclass(frozen=True)
class CountedLoad:
    """A load, and how many requests it sent by its own account."""

    load: Load
    sent: list[tuple[int, int]]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.load, name)

    def start(self, env: simpy.Environment, engine: Engine, *, seed: int) -> None:
        submit = engine.submit

        def counted(prompt_tokens: int, output_tokens: int) -> simpy.Event | None:
            self.sent.append((prompt_tokens, output_tokens))
            return submit(prompt_tokens, output_tokens)

        engine.submit = counted  # type: ignore[method-assign]
        self.load.start(env, engine, seed=seed)


@pytest.fixture(scope="module", params=ALLOCATORS.names())
def ran(request: pytest.FixtureRequest, busy: Scenario) -> tuple[Run, list[tuple[int, int]]]:
    load: Any = CountedLoad(busy.load, [])
    return run(replace(busy, load=load), request.param, seed=1), load.sent


def test_law_8_every_request_has_one_fate(ran: tuple[Run, list[tuple[int, int]]], busy: Scenario) -> None:
    one, sent = ran
    log, scheduler = one.log, one.recorder._scheduler
    assert sorted(zip(log.prompt_tokens.tolist(), log.output_tokens.tolist(), strict=True)) == sorted(sent)
    fates = {outcome: len(log.of(outcome)) for outcome in Outcome}
    assert fates[Outcome.UNFINISHED] == scheduler.num_running + scheduler.num_waiting
    assert fates[Outcome.REJECTED] == len(sent) - scheduler.requests.size
    assert fates[Outcome.FAILED] == 0
    assert fates[Outcome.FINISHED] > 10
    figures = measure(one, ())
    measured = ("num_finished", "num_unfinished", "num_rejected", "num_failed")
    assert figures["num_injected"] == sum(figures[name] for name in measured) == (log.arrival_s >= one.warmup_s).sum()
    longer = (log.prompt_tokens + log.output_tokens > 900).sum()
    assert fates[Outcome.REJECTED] == longer
    if busy.duration_s is None:
        assert fates[Outcome.UNFINISHED] == 0


def test_law_9_instants_of_a_request_are_in_order(ran: tuple[Run, list[tuple[int, int]]]) -> None:
    log, end_s = ran[0].log, ran[0].end_s
    finished = log.of(Outcome.FINISHED)
    assert (finished.num_output_tokens == finished.output_tokens).all()
    for later, earlier in (
        (finished.scheduled_s, finished.arrival_s),
        (finished.first_token_s, finished.scheduled_s),
        (finished.last_token_s, finished.first_token_s),
    ):
        assert (earlier <= later).all()
    one_token = finished.output_tokens == 1
    assert ((finished.first_token_s == finished.last_token_s) == one_token).all()
    unfinished = log.of(Outcome.UNFINISHED)
    assert (np.isnan(unfinished.first_token_s) == (unfinished.num_output_tokens == 0)).all()
    assert (unfinished.num_output_tokens < unfinished.output_tokens).all()
    rejected = log.of(Outcome.REJECTED)
    assert np.isnan(rejected.scheduled_s).all()
    for instants in (log.arrival_s, log.scheduled_s, log.first_token_s, log.last_token_s):
        assert not (instants > end_s).any()
    assert (np.diff(log.arrival_s) >= 0).all()


def test_law_7_memory_is_held_by_those_who_run_and_by_nobody_else(ran: tuple[Run, list[tuple[int, int]]], busy: Scenario) -> None:
    allocator, scheduler = ran[0].allocator, ran[0].recorder._scheduler
    scheduler.check_integrity()
    assert (allocator.units_held > 0).sum() == scheduler.num_running
    if busy.duration_s is None:
        assert allocator.free_slots == allocator.usable_slots


def test_kinds_of_memory_sum_to_the_pool(ran: tuple[Run, list[tuple[int, int]]]) -> None:
    one = ran[0]
    recorder, kinds = one.recorder, len(KV_KINDS)
    usable = one.allocator.usable_slots
    np.testing.assert_allclose(recorder.integrals.gauges[:kinds].sum(), usable * recorder.integrals.observed_s[0])
    np.testing.assert_allclose(recorder.integrals.gauges_when_waiting[:kinds].sum(), usable * recorder.integrals.observed_s[1])
    _, seconds, means = recorder.timeline.means()
    np.testing.assert_allclose(means[:, :kinds].sum(axis=1), usable)
    assert (means >= 0).all()
    np.testing.assert_allclose(seconds.sum(), one.end_s)
    np.testing.assert_allclose(recorder.integrals.observed_s[0], one.end_s - one.warmup_s)
    np.testing.assert_allclose(recorder.integrals.blocked_s.sum(), one.end_s - one.warmup_s)


def test_preemption_is_for_those_who_grow(ran: tuple[Run, list[tuple[int, int]]], busy: Scenario) -> None:
    one = ran[0]
    preempted = int(one.log.num_preemptions.sum())
    assert preempted >= one.recorder.num_preemptions
    assert (preempted > 0) == (one.allocator.name == "paged")


@pytest.fixture(scope="module")
def small() -> Scenario:
    """The fewest blocks with which the engine starts."""
    return scenario(LoadConfig(request_rate=1.0, num_prompts=12, **LENGTHS), num_blocks=58)


@pytest.mark.parametrize("name", ALLOCATORS.names())
@given(
    num_blocks=st.integers(2, 57),
    rate_per_s=st.sampled_from([0.1, 5.0, 100.0]),
    watermark=st.sampled_from([0.0, 0.5]),
    reserve_full_isl=st.booleans(),
    heap=st.sampled_from(HEAPS.names()),
)
@settings(max_examples=20)
def test_law_11_an_undersized_pool_ends_with_a_verdict(
    name: str, small: Scenario, num_blocks: int, rate_per_s: float, watermark: float, reserve_full_isl: bool, heap: str
) -> None:
    pool = replace(
        small.deployment.pool, num_blocks=num_blocks, watermark=watermark, reserve_full_isl=reserve_full_isl, contiguous_heap=heap
    )
    load: Any = replace(small.load, request_rate_per_s=rate_per_s)  # type: ignore[type-var]
    result = simulate(replace(small, deployment=replace(small.deployment, pool=pool), load=load, allocators=(name,))).by_allocator[
        name
    ]
    assert result.figures["num_finished"] + result.figures["num_rejected"] == 12
    assert (result.verdict.status == "rejecting") == (result.figures["num_rejected"] > 0)
    assert result.verdict.status != "failed"


class Overpromising(PagedStepAllocator):
    """Says of every request that it will fit."""

    def admission_slots(self, prompt_tokens: int, output_tokens: int) -> int | None:
        return 0


@pytest.mark.parametrize("reserve_full_isl", [True, False])
def test_law_11_who_cannot_go_on_though_alone_is_given_up(small: Scenario, reserve_full_isl: bool) -> None:
    pool = replace(small.deployment.pool, num_blocks=20, reserve_full_isl=reserve_full_isl)
    env = simpy.Environment(initial_time=0.0)
    scheduler = Scheduler(small.deployment.scheduler, Overpromising(pool))
    recorder = Recorder(scheduler, warmup_s=0.0, end_s=float("inf"))
    engine = Engine(env, scheduler, small.deployment.step_time, recorder)
    ended = [engine.submit(prompt, output) for prompt, output in ((100, 10), (400, 10), (290, 100), (100, 10))]
    env.run()
    assert all(event is not None and event.processed for event in ended)
    fates = [Outcome.FINISHED, Outcome.FAILED, Outcome.FAILED, Outcome.FINISHED]
    assert recorder.log().outcome.tolist() == fates
    assert scheduler.allocator.free_slots == scheduler.allocator.usable_slots
    scheduler.check_integrity()


@pytest.mark.parametrize("heap", HEAPS.names())
@pytest.mark.parametrize("name", ALLOCATORS.names())
@given(
    live=st.lists(st.integers(1, 40), max_size=4),
    batch=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), max_size=5),
    num_blocks=st.integers(2, 60),
    watermark=st.sampled_from([0.0, 0.05, 0.3]),
    reserve_full_isl=st.booleans(),
)
@settings(max_examples=50)
def test_law_13_what_fits_in_n_blocks_fits_in_one_more(
    name: str,
    heap: str,
    live: list[int],
    batch: list[tuple[int, int]],
    num_blocks: int,
    watermark: float,
    reserve_full_isl: bool,
) -> None:
    """The same live requests grow by half, then others are admitted, as far as there is room."""
    served = []
    for n in (num_blocks, num_blocks + 1):
        pool = KVPoolSettings(
            num_blocks=n,
            block_size=4,
            max_num_seqs=10,
            max_model_len=80,
            contiguous_heap=heap,
            watermark=watermark,
            reserve_full_isl=reserve_full_isl,
        )
        allocator, step = step_allocator(name, pool), empty_batch(10)
        step["row"][:] = range(10)
        for i, (chunk, known) in enumerate([(tokens, tokens) for tokens in live] + batch):
            step["num_slots_needed"][i] = step["num_scheduled_tokens"][i] = min(chunk, known)
            step["num_known_tokens"][i] = known
            step["admission_slots"][i] = allocator.admission_slots(known, known) or 10 * pool.num_slots + 100
        assume(allocator.allocate_slots(step, 0, len(live), 0) == len(live))
        step["num_scheduled_tokens"][: len(live)] = step["num_slots_needed"][: len(live)] // 2 + 1
        step["num_slots_needed"][: len(live)] += step["num_scheduled_tokens"][: len(live)]
        step["num_known_tokens"][: len(live)] = step["num_slots_needed"][: len(live)]
        served.append(allocator.allocate_slots(step, 0, len(live) + len(batch), len(live)))
    assert served[0] <= served[1]


@pytest.mark.parametrize("name", ALLOCATORS.names())
def test_law_15_blocks_of_one_token_waste_nothing(name: str) -> None:
    one = scenario(LoadConfig(request_rate=1.0, num_prompts=30, **LENGTHS), num_blocks=1600, block_size=1)
    shares = measure(run(one, name, seed=0), ())["kv"]
    wasted = shares["internal"] + shares["external"]
    assert (wasted == 0) == (name == "paged")


def test_an_oracle_with_an_exact_heap_wastes_the_slot_of_the_last_token_alone() -> None:
    one = scenario(LoadConfig(request_rate=1.0, num_prompts=30, **LENGTHS), contiguous_heap="first-fit")
    gauges = run(one, "contiguous-oracle", seed=0).recorder.integrals.gauges
    np.testing.assert_allclose(gauges[INTERNAL], gauges[RUNNING])
