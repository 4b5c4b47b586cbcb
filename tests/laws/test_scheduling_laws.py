"""What holds of every run, whatever the load and the allocator: docs/invariants.md gives each law its number."""

from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simpy
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedkv.allocation import KVPoolSettings
from pagedkv.allocators import ALLOCATORS
from pagedkv.errors import ConfigError
from pagedkv.fuzzing import hybrid_layers
from pagedkv.heaps import HEAPS
from pagedkv.paged_steps import PagedStepAllocator
from pagedkv.scheduling.scheduler import Scheduler
from pagedkv.sims.config import LoadConfig, MeasurementConfig, ServingConfig, SimulationConfig
from pagedkv.sims.engine import Engine
from pagedkv.sims.load import Load
from pagedkv.sims.metrics import measure
from pagedkv.sims.recorder import Recorder
from pagedkv.sims.recording import INTERNAL, KV_KINDS, RUNNING
from pagedkv.sims.records import Outcome
from pagedkv.sims.results import simulate
from pagedkv.sims.scenario import Scenario, resolve
from pagedkv.sims.simulation import Run, run
from pagedkv.step_allocation import StepAllocator, step_allocator
from pagedkv.step_batch import StepBatch, empty_batch

LENGTHS: dict[str, Any] = {"random_input_len": 300, "random_output_len": 60, "random_range_ratio": 0.9}
TRACE = "arrival_s,input_tokens,output_tokens\n" + "".join(
    f"{i % 7 * 0.9},{1 + i * 37 % 700},{1 + i * 13 % 90}\n" for i in range(60)
)


def scenario(load: LoadConfig, *, num_blocks: int = 100, duration: str | None = None, **serving: Any) -> Scenario:
    """A Spark with few blocks and small pages: requests queue, are preempted and, if longer than 900 tokens, rejected."""
    limits = {"max_model_len": 900, "max_num_batched_tokens": 512, "num_gpu_blocks_override": num_blocks, **serving}
    if "model" not in serving:  # the other has state, which is not cached
        limits["offload_size"] = "1GiB"
    resolved = resolve(
        SimulationConfig(
            load=load,
            serving=ServingConfig(**limits),
            measurement=MeasurementConfig(allocator=ALLOCATORS.names(), duration=duration),
        )
    )
    deployment = resolved.deployment
    return replace(resolved, deployment=replace(deployment, pool=replace(deployment.pool, page_tokens=64)))


LOADS = ("closed loop", "open loop", "open loop that ends", "idle at the end", "state of Mamba layers", "trace")
EVERY_LOAD = {"paged", "contiguous-max", "contiguous-oracle", "contiguous-pow2"}
REPRESENTATIVE = {"closed loop", "state of Mamba layers", "trace"}
"""For the other allocators: a load that is cut off at work, one with state, and one that ends and has too long a request."""

GROWS = {"contiguous-growing", "hybrid", "llama-cpp-unified", "paged", "paged-offload", "radix", "tensorrt-llm", "vattention"}
"""Here requests take slots as their tokens come. The others reserve what a request may ever hold."""
IN_A_HEAP = {"contiguous-max", "contiguous-oracle", "contiguous-pow2"}
ONE_PIECE = IN_A_HEAP | {"contiguous-growing"}
"""Here a request's slots lie side by side: free ones may not do."""
LESS_THAN_THE_POOL = {"llama-cpp-split"}
"""Here one request cannot have the whole pool: it has a server slot's part, and whoever is accepted finds a slot."""
PAGE_GRANULAR = {"vattention"}
"""These round up to pages of the machine, whatever the block size."""


def busy(load: str, folder: Path) -> Scenario:
    """Each kind of load. Those that never end are cut off in the middle of their work."""
    match load:
        case "closed loop":
            return scenario(LoadConfig(users=12, think_time="2s", lengths="azure-conv"), duration="40s")
        case "open loop":
            return scenario(LoadConfig(request_rate=1.5, burstiness=0.5, lengths="azure-conv"), duration="40s")
        case "open loop that ends":
            return scenario(LoadConfig(request_rate=1.5, num_prompts=60, **LENGTHS))
        case "idle at the end":
            return scenario(LoadConfig(request_rate=3.0, num_prompts=15, **LENGTHS), duration="60s")
        case "state of Mamba layers":
            of_state = LoadConfig(request_rate=5.0, num_prompts=60, **LENGTHS)
            return scenario(of_state, num_blocks=2080, model="nemotron-3-nano-30b-a3b")
    file = folder / "trace.csv"
    file.write_text(TRACE + "0.5,500,600\n")
    return scenario(LoadConfig(trace=str(file)))


def with_room(one: Scenario, name: str) -> Scenario:
    """Return `one` with as few places as it takes for a request of mean length: some designs divide the pool among the places."""
    deployment = one.deployment
    while step_allocator(name, deployment.pool_of(name)).admission_slots(300, 60) is None:
        places = deployment.scheduler.max_num_seqs // 2
        deployment = replace(
            deployment,
            pool=replace(deployment.pool, max_num_seqs=places),
            scheduler=replace(deployment.scheduler, max_num_seqs=places),
        )
    return replace(one, deployment=deployment)


@dataclass(frozen=True)
class CountedLoad:
    """A load, and how many requests it sent by its own account."""

    load: Load
    sent: list[tuple[int, int]]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.load, name)

    def start(self, env: simpy.Environment, engine: Any, *, seed: int) -> None:
        submit, submit_all = engine.submit, engine.submit_all

        def counted(prompt_tokens: int, output_tokens: int, **content: Any) -> simpy.Event | None:
            self.sent.append((prompt_tokens, output_tokens))
            event: simpy.Event | None = submit(prompt_tokens, output_tokens, **content)
            return event

        def all_counted(arrival_s: Any, prompt_tokens: Any, output_tokens: Any, **contents: Any) -> None:
            self.sent.extend(zip(prompt_tokens.tolist(), output_tokens.tolist(), strict=True))
            engine.submit = submit
            submit_all(arrival_s, prompt_tokens, output_tokens, **contents)

        engine.submit, engine.submit_all = counted, all_counted
        self.load.start(env, engine, seed=seed)


@dataclass(frozen=True)
class Served:
    """A run, and what it was of."""

    scenario: Scenario
    run: Run
    sent: list[tuple[int, int]]
    """Prompt and output tokens of each request, by the load's own account."""

    @property
    def grows(self) -> bool:
        """Whether requests take slots as their tokens come, and not all at admission."""
        return self.run.allocator.name in GROWS


SERVED = [(load, name) for load in LOADS for name in ALLOCATORS.names() if name in EVERY_LOAD or load in REPRESENTATIVE]


@pytest.fixture(scope="module", params=SERVED, ids="-".join)
def ran(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Served:
    load, name = request.param
    one = with_room(busy(load, tmp_path_factory.mktemp("trace")), name)
    counted: Any = CountedLoad(one.load, [])
    return Served(one, run(replace(one, load=counted), name, seed=1), counted.sent)


def test_law_8_every_request_has_one_fate(ran: Served) -> None:
    one, sent = ran.run, ran.sent
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
    longer = [prompt + output > 900 for prompt, output in sent]
    never_fits = [one.allocator.admission_slots(prompt, output) is None for prompt, output in sent]
    assert fates[Outcome.REJECTED] == sum(map(max, longer, never_fits))
    if one.allocator.name not in LESS_THAN_THE_POOL:
        assert fates[Outcome.REJECTED] == sum(longer)
    if ran.scenario.duration_s is None:
        assert fates[Outcome.UNFINISHED] == 0


def test_law_9_instants_of_a_request_are_in_order(ran: Served) -> None:
    log, end_s = ran.run.log, ran.run.end_s
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


def test_law_7_memory_is_held_by_those_who_run_and_by_nobody_else(ran: Served) -> None:
    allocator, scheduler = ran.run.allocator, ran.run.recorder._scheduler
    scheduler.check_integrity()
    assert (allocator.units_held > 0).sum() == scheduler.num_running
    if ran.scenario.duration_s is None:
        assert allocator.free_slots == allocator.usable_slots


def test_kinds_of_memory_sum_to_the_pool(ran: Served) -> None:
    one = ran.run
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


@pytest.mark.parametrize("name", ALLOCATORS.names())
def test_those_who_grow_reserve_nothing(name: str) -> None:
    allocator = step_allocator(
        name, KVPoolSettings(num_blocks=100, max_num_seqs=2, max_model_len=400, layer_groups=hybrid_layers(16))
    )
    assert allocator.admission_slots(300, 60) is not None
    assert (allocator.admission_slots(300, 60) == 0) == (name in GROWS)


def test_preemption_is_for_those_who_grow(ran: Served) -> None:
    one = ran.run
    preempted = int(one.log.num_preemptions.sum())
    assert preempted >= one.recorder.num_preemptions
    if one.allocator.name == "hybrid" and ran.scenario.deployment.pool.state_slots:
        assert preempted == 0  # a block is as long as a state is large: nobody here needs a second one
    else:
        assert (preempted > 0) == ran.grows


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
    max_num_seqs=st.sampled_from([2, 256]),
)
@settings(max_examples=20)
def test_law_11_an_undersized_pool_ends_with_a_verdict(
    name: str,
    small: Scenario,
    num_blocks: int,
    rate_per_s: float,
    watermark: float,
    reserve_full_isl: bool,
    heap: str,
    max_num_seqs: int,
) -> None:
    pool = replace(
        small.deployment.pool,
        num_blocks=num_blocks,
        watermark=watermark,
        reserve_full_isl=reserve_full_isl,
        contiguous_heap=heap,
        max_num_seqs=max_num_seqs,
        page_tokens=16,
    )
    deployment = replace(small.deployment, pool=pool, scheduler=replace(small.deployment.scheduler, max_num_seqs=max_num_seqs))
    load: Any = replace(small.load, request_rate_per_s=rate_per_s)  # type: ignore[type-var]
    result = simulate(replace(small, deployment=deployment, load=load, allocators=(name,))).by_allocator[name]
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


def step_of(allocator: StepAllocator, asked: list[tuple[int, int]]) -> StepBatch:
    """A step for (tokens, known tokens) of each, in rows 0, 1, ..."""
    step = empty_batch(len(asked))
    step["row"] = np.arange(len(asked))
    for entry, (tokens, known) in enumerate(asked):
        step["num_slots_needed"][entry] = step["num_scheduled_tokens"][entry] = tokens
        step["num_known_tokens"][entry] = known
        step["admission_slots"][entry] = allocator.admission_slots(known, known + 1)
    return step


def served(allocator: StepAllocator, live: list[tuple[int, int]], batch: list[tuple[int, int]]) -> tuple[int, int]:
    """Admit `live`; let those who are served grow by half and then admit `batch`. Return how many each of the two steps served."""
    num_running = allocator.allocate_slots(step_of(allocator, live), 0, len(live), 0)
    step = step_of(allocator, live[:num_running] + batch)
    running = step[:num_running]
    running["num_scheduled_tokens"] = running["num_slots_needed"] // 2 + 1
    running["num_slots_needed"] += running["num_scheduled_tokens"]
    running["num_known_tokens"] = running["num_slots_needed"]
    return num_running, allocator.allocate_slots(step, 0, step.size, num_running)


PLACED = [(name, heap) for name in ALLOCATORS.names() for heap in (HEAPS.names() if name in IN_A_HEAP else ["buddy"])]


@pytest.mark.parametrize(("name", "heap"), PLACED)
def test_law_13_what_fits_in_n_blocks_fits_in_one_more(name: str, heap: str) -> None:
    """Requests are admitted, grow by half, and others are admitted, as far as there is room. Whoever can never fit stays out."""
    seen: Counter[str] = Counter()

    @given(
        live=st.lists(st.integers(1, 40).map(lambda tokens: (tokens, tokens)), max_size=4),
        batch=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)).map(lambda pair: (min(pair), max(pair))), max_size=5),
        num_blocks=st.integers(2, 60),
        watermark=st.sampled_from([0.0, 0.05, 0.3]),
        reserve_full_isl=st.booleans(),
    )
    @settings(max_examples=100)
    def law(
        live: list[tuple[int, int]], batch: list[tuple[int, int]], num_blocks: int, watermark: float, reserve_full_isl: bool
    ) -> None:
        smaller, larger = (
            step_allocator(
                name,
                KVPoolSettings(
                    num_blocks=n,
                    block_size=4,
                    max_num_seqs=max(len(live) + len(batch), 1),
                    max_model_len=80,
                    contiguous_heap=heap,
                    watermark=watermark,
                    reserve_full_isl=reserve_full_isl,
                    page_tokens=4,
                    layer_groups=hybrid_layers(4),
                ),
            )
            for n in (num_blocks, num_blocks + 1)
        )
        seen["at arrival"] += len(live) + len(batch)
        live, batch = (
            [each for each in asked if smaller.admission_slots(each[1], each[1] + 1) is not None] for asked in (live, batch)
        )
        seen["at arrival"] -= len(live) + len(batch)
        assert all(larger.admission_slots(known, known + 1) is not None for _, known in live + batch)
        num_running, num_served = served(smaller, live, batch)
        num_running_in_more, num_served_in_more = served(larger, live[:num_running], batch)
        assert num_running_in_more == num_running
        assert num_served_in_more >= num_served
        seen["while running"] += num_running > num_served
        seen["at admission"] += max(num_running, num_served) < num_running + len(batch)
        seen["served"] += num_running < num_served

    law()
    assert min(seen["served"], seen["at arrival"]) > 5
    assert (seen["at admission"] > 5) == (name not in LESS_THAN_THE_POOL)
    assert (seen["while running"] > 0) == (name in GROWS)


@pytest.mark.parametrize("name", ALLOCATORS.names())
def test_law_15_blocks_of_one_token_waste_nothing(name: str) -> None:
    """But for reservations of a whole life, which have an end that nobody fills, and pages; and heaps need one piece."""
    one = scenario(LoadConfig(request_rate=1.0, num_prompts=30, **LENGTHS), num_blocks=1600, block_size=1)
    if name == "tensorrt-llm":
        with pytest.raises(ConfigError, match="block size 1: tensorrt-llm needs a power of two, 2 or more"):
            step_allocator(name, one.deployment.pool_of(name))
        return
    shares = measure(run(with_room(one, name), name, seed=0), ())["kv"]
    assert (shares["internal"] == 0) == (name in GROWS - PAGE_GRANULAR)
    assert (shares["external"] > 0) == (name in ONE_PIECE)


def test_an_oracle_with_an_exact_heap_wastes_the_slot_of_the_last_token_alone() -> None:
    one = scenario(LoadConfig(request_rate=1.0, num_prompts=30, **LENGTHS), contiguous_heap="first-fit")
    gauges = run(one, "contiguous-oracle", seed=0).recorder.integrals.gauges
    np.testing.assert_allclose(gauges[INTERNAL], gauges[RUNNING])
