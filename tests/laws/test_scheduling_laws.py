"""What holds of every run, whatever the load and the allocator: docs/invariants.md gives each law its number."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simpy
from tight_scenarios import GROWS, LENGTHS, LESS_THAN_THE_POOL, scenario, with_room

from pagedkv.allocators import ALLOCATORS
from pagedkv.sims.config import LoadConfig
from pagedkv.sims.load import Load
from pagedkv.sims.metrics import measure
from pagedkv.sims.recording import KV_KINDS
from pagedkv.sims.records import Outcome
from pagedkv.sims.scenario import Scenario
from pagedkv.sims.simulation import Run, run

TRACE = "arrival_s,input_tokens,output_tokens\n" + "".join(
    f"{i % 7 * 0.9},{1 + i * 37 % 700},{1 + i * 13 % 90}\n" for i in range(60)
)

LOADS = ("closed loop", "open loop", "open loop that ends", "idle at the end", "state of Mamba layers", "trace")

EVERY_LOAD = {"paged", "contiguous-max", "contiguous-oracle", "contiguous-pow2"}

REPRESENTATIVE = {"closed loop", "state of Mamba layers", "trace"}
"""For the other allocators: a load that is cut off at work, one with state, and one that ends and has too long a request."""


def busy(load: str, folder: Path) -> Scenario:
    """Each kind of load. Those that never end are cut off in the middle of their work."""
    match load:
        case "closed loop":
            return scenario(LoadConfig(users=12, think_time="2s", lengths="azure-conv"), duration="50s")
        case "open loop":
            return scenario(LoadConfig(request_rate=1.5, burstiness=0.5, lengths="azure-conv"), duration="50s")
        case "open loop that ends":
            return scenario(LoadConfig(request_rate=1.5, num_prompts=60, **LENGTHS))
        case "idle at the end":
            return scenario(LoadConfig(request_rate=3.0, num_prompts=15, **LENGTHS), duration="60s")
        case "state of Mamba layers":
            of_state = LoadConfig(request_rate=5.0, num_prompts=60, **LENGTHS)
            return scenario(of_state, num_blocks=16, model="nemotron-3-nano-30b-a3b")
    file = folder / "trace.csv"
    file.write_text(TRACE + "0.5,500,600\n")
    return scenario(LoadConfig(trace=str(file)))


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


def test_preemption_is_for_those_who_grow(ran: Served) -> None:
    one = ran.run
    preempted = int(one.log.num_preemptions.sum())
    assert preempted >= one.recorder.num_preemptions
    if one.allocator.name == "hybrid" and ran.scenario.deployment.pool.state_slots:
        assert preempted == 0  # a block is as long as a state is large: nobody here needs a second one
    else:
        assert (preempted > 0) == ran.grows
