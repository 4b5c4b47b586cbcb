"""Several models of one Ollama server: when each is loaded, what it costs to wait for it, and which one leaves."""

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
import simpy
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedkv.allocation import KVPoolSettings
from pagedkv.allocators import ALLOCATORS
from pagedkv.allocators.llama_cpp_split import SplitStreams
from pagedkv.scheduling.llama_cpp_scheduler import LlamaCppScheduler, LlamaCppSettings
from pagedkv.sims.clock import Clock
from pagedkv.sims.engine import Engine
from pagedkv.sims.model_runner import ModelLoad, Runner
from pagedkv.sims.model_server import ModelServer
from pagedkv.sims.model_serving import ModelServing, ModelVariant, ServedModel
from pagedkv.sims.recorder import Recorder
from pagedkv.sims.records import Outcome, RequestLog
from pagedkv.sims.shared_machine import SharedMachine
from pagedkv.sims.step_time import StepCost
from pagedkv.step_batch import StepBatch

STEP_S = 0.125
CONTEXT = 1024


class SameStep:
    """Every step takes as long as every other."""

    def cost(self, batch: StepBatch, num_entries: int) -> StepCost:
        del batch, num_entries
        return StepCost(0.0, 0.0, STEP_S)


@dataclass
class Box:
    """A machine of 100 bytes with a server on it, whose processes run on tiny memory."""

    models: Sequence[ServedModel]
    max_loaded_models: int = 3
    max_queue: int = 512
    recovery_s: float = 0.0
    slots: int = 1
    env: Clock = field(default_factory=lambda: Clock(initial_time=0.0))
    runners: list[Runner] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.machine = SharedMachine(self.env)
        serving = ModelServing(
            models=tuple(self.models),
            max_loaded_models=self.max_loaded_models,
            max_queue=self.max_queue,
            memory_bytes=100,
            recovery_s=self.recovery_s,
        )
        self.server = ModelServer(self.env, serving, self.start)
        self.ends: list[object] = []

    def start(self, model: int, variant: ModelVariant, load: ModelLoad) -> Runner:
        cells = variant.context * self.slots
        pool = KVPoolSettings(num_blocks=cells, block_size=1, max_num_seqs=self.slots, max_model_len=variant.context)
        memory = ALLOCATORS.load("ollama")(pool)
        assert isinstance(memory, SplitStreams)
        scheduler = LlamaCppScheduler(LlamaCppSettings(cache_prompt=False), memory)
        recorder = Recorder(scheduler, warmup_s=0.0, end_s=math.inf)
        engine = Engine(self.env, scheduler, SameStep(), recorder, machine=self.machine)
        served = self.models[model]
        return Runner(
            load=load, name=served.name, scheduler=scheduler, recorder=recorder, engine=engine, keep_alive_s=served.keep_alive_s
        )

    def ask(self, *requests: tuple[float, int, int], prompt: int = 5) -> None:
        """Let requests, (time, model, output tokens) each, arrive."""
        for at_s, model, output in requests:
            self.env.process(self._ask(at_s, model, prompt, output))

    def _ask(self, at_s: float, model: int, prompt: int, output: int) -> Generator[simpy.Event, object, None]:
        yield self.env.timeout(at_s)
        done = self.server.submit(prompt, output, model=model)
        self.ends.append("refused" if done is None else (yield done))

    def run(self, until_s: float = 1e6) -> RequestLog:
        self.env.run(until=until_s)
        self.server.close()
        return self.server.log()

    def history(self) -> list[tuple[int, float, float | None, float | None, str]]:
        return [(load.model, load.start_s, load.ready_s, load.end_s, load.why_ended) for load in self.server.loads]


def model(
    name: str,
    *,
    takes: int,
    load_s: float = 10.0,
    keep_alive_s: float = 300.0,
    expects: int | None = None,
    lower: int | None = None,
) -> ServedModel:
    """Return a model of `takes` bytes, of which half are weights, with a context of 32 that takes `lower` if there is one."""
    sizes = [(CONTEXT, takes), *([] if lower is None else [(32, lower)])]
    variants = tuple(
        ModelVariant(
            context=context,
            estimate_bytes=size if expects is None else expects,
            weight_bytes=takes // 2,
            held_bytes=size,
            deployment=None,
        )
        for context, size in sizes
    )
    return ServedModel(name=name, title=name, file_bytes=takes, load_s=load_s, keep_alive_s=keep_alive_s, variants=variants)


def ttft_s(log: RequestLog) -> list[float]:
    waited: list[float] = (log.first_token_s - log.arrival_s).tolist()
    return waited


def test_models_that_fit_together_are_loaded_once_each() -> None:
    box = Box([model("a", takes=40), model("b", takes=40, load_s=4.0)])
    box.ask((1.0, 0, 2), (20.0, 1, 2), (40.0, 0, 2), (60.0, 1, 2))
    log = box.run(until_s=100.0)
    assert box.history() == [(0, 1.0, 11.0, None, ""), (1, 20.0, 24.0, None, "")]
    assert ttft_s(log) == [10.0 + STEP_S, 4.0 + STEP_S, STEP_S, STEP_S]
    assert log.model.tolist() == [0, 1, 0, 1]


def test_models_that_do_not_fit_together_take_turns_and_every_turn_waits_for_the_disk() -> None:
    box = Box([model("a", takes=60), model("b", takes=50, load_s=4.0)])
    box.ask((0.0, 0, 2), (20.0, 1, 2), (40.0, 0, 2), (60.0, 1, 2))
    log = box.run(until_s=100.0)
    assert ttft_s(log) == [10.0 + STEP_S, 4.0 + STEP_S, 10.0 + STEP_S, 4.0 + STEP_S]
    assert [load[0] for load in box.history()] == [0, 1, 0, 1]
    assert [load[3:] for load in box.history()] == [(20.0, "room"), (40.0, "room"), (60.0, "room"), (None, "")]


def test_a_model_in_use_leaves_when_its_last_answer_is_given() -> None:
    box = Box([model("a", takes=60), model("b", takes=60)])
    box.ask((0.0, 0, 80), (11.0, 1, 1))  # a generates from 10 to 20
    log = box.run(until_s=100.0)
    assert box.history()[0][3:] == (20.0, "room")
    assert ttft_s(log)[1] == pytest.approx(20.0 - 11.0 + 10.0 + STEP_S)


def test_nobody_passes_a_request_whose_model_is_awaited() -> None:
    box = Box([model("a", takes=60), model("b", takes=60)])
    box.ask((0.0, 0, 80), (5.0, 1, 1), (6.0, 0, 1))  # the last comes while a loads, behind one for b
    log = box.run(until_s=100.0)
    assert [load[0] for load in box.history()] == [0, 1, 0]
    assert log.first_token_s[2] == pytest.approx(20.0 + 10.0 + STEP_S + 10.0 + STEP_S)


def test_requests_for_a_model_that_is_there_do_not_wait_for_another_to_load() -> None:
    box = Box([model("a", takes=40), model("b", takes=40)], slots=2)
    box.ask((0.0, 0, 1), (20.0, 1, 1), (22.0, 0, 1))
    assert ttft_s(box.run(until_s=100.0))[2] == STEP_S


def test_a_model_that_nobody_uses_leaves_after_its_keep_alive() -> None:
    box = Box([model("a", takes=40, keep_alive_s=30.0)])
    box.ask((0.0, 0, 8), (20.0, 0, 8), (80.0, 0, 8))  # used until 11, then until 21
    box.run(until_s=200.0)
    assert box.history() == [(0, 0.0, 10.0, 51.0, "keep-alive"), (0, 80.0, 90.0, 121.0, "keep-alive")]


@pytest.mark.parametrize(("keep_alive_s", "ends"), [(0.0, [11.0, 31.0]), (math.inf, [None])])
def test_a_keep_alive_of_nothing_and_one_without_end(keep_alive_s: float, ends: list[float | None]) -> None:
    box = Box([model("a", takes=40, keep_alive_s=keep_alive_s)])
    box.ask((0.0, 0, 8), (20.0, 0, 8))
    box.run()
    assert [end for _, _, _, end, _ in box.history()] == ends


def test_the_idle_model_with_the_shortest_keep_alive_makes_room() -> None:
    box = Box([model("a", takes=30, keep_alive_s=600), model("b", takes=30, keep_alive_s=500), model("c", takes=40)])
    box.ask((0.0, 0, 1), (20.0, 1, 1), (40.0, 2, 1))
    box.run(until_s=60.0)
    assert [(load[0], load[3]) for load in box.history()] == [(0, None), (1, 40.0), (2, None)]


def test_an_idle_model_leaves_before_one_in_use_with_a_shorter_keep_alive() -> None:
    box = Box([model("a", takes=30, keep_alive_s=600), model("b", takes=30, keep_alive_s=500), model("c", takes=40)])
    box.ask((0.0, 0, 1), (20.0, 1, 400), (40.0, 2, 1))
    box.run(until_s=60.0)
    assert [(load[0], load[3]) for load in box.history()] == [(0, 40.0), (1, None), (2, None)]


def test_there_are_never_more_than_the_allowed_models() -> None:
    box = Box([model(name, takes=5) for name in "abcd"], max_loaded_models=2)
    box.ask(*((20.0 * i, i % 4, 1) for i in range(8)))
    box.run(until_s=200.0)
    assert [load[0] for load in box.history()] == [0, 1, 2, 3, 0, 1, 2]  # of equals, the first by name leaves: d stays
    for at_s in np.arange(0.5, 200.0):
        assert sum(start <= at_s < (math.inf if end is None else end) for _, start, _, end, _ in box.history()) <= 2


def test_a_discrete_gpu_takes_a_while_to_give_memory_back() -> None:
    box = Box([model("a", takes=60), model("b", takes=60)], recovery_s=1.0)
    box.ask((0.0, 0, 1), (20.0, 1, 1))
    assert ttft_s(box.run(until_s=60.0))[1] == 1.0 + 10.0 + STEP_S


def test_an_automatic_context_that_does_not_fit_is_tried_again_one_step_lower() -> None:
    box = Box([model("a", takes=120, lower=70)])
    box.ask((0.0, 0, 1), (50.0, 0, 30), prompt=20)  # the second is longer than the context that was left
    log = box.run(until_s=100.0)
    assert [(load.context, load.ready_s, load.why_ended) for load in box.server.loads] == [
        (CONTEXT, None, "out of memory"),
        (32, 20.0, ""),
    ]
    assert ttft_s(log)[0] == 20.0 + STEP_S  # read twice
    assert log.outcome.tolist() == [Outcome.FINISHED, Outcome.REJECTED]


def test_weights_that_do_not_fit_are_not_read() -> None:
    box = Box([model("a", takes=240, lower=70)])
    box.ask((0.0, 0, 1))
    box.run(until_s=100.0)
    assert (box.ends, box.server.num_completed) == ([Outcome.FAILED], 0)
    assert [(start, end) for _, start, _, end, _ in box.history()] == [(0.0, 0.0), (0.0, 0.0)]


def test_a_load_that_was_expected_to_fit_evicts_all_others_and_is_tried_once_more() -> None:
    box = Box([model("a", takes=30), model("b", takes=30), model("c", takes=60, expects=10)])
    box.ask((0.0, 0, 1), (20.0, 1, 1), (40.0, 2, 1))
    log = box.run(until_s=100.0)
    assert [load[0] for load in box.history()] == [0, 1, 2, 2]
    assert [load[3] for load in box.history()] == [50.0, 50.0, 50.0, None]
    assert ttft_s(log)[2] == 20.0 + STEP_S


def test_what_does_not_fit_alone_either_fails_and_the_next_request_gets_its_turn() -> None:
    box = Box([model("a", takes=30), model("b", takes=120, expects=10)])
    box.ask((0.0, 0, 1), (20.0, 1, 1), (25.0, 0, 1))
    log = box.run(until_s=100.0)
    assert log.outcome.tolist() == [Outcome.FINISHED, Outcome.FAILED, Outcome.FINISHED]
    assert box.ends.count(Outcome.FAILED) == 1


def test_the_queue_is_the_servers_and_more_are_turned_away() -> None:
    box = Box([model("a", takes=40), model("b", takes=40)], max_queue=3)
    box.ask(*((0.001 * i, i % 2, 1) for i in range(6)))  # the first is loading, three may wait
    log = box.run(until_s=100.0)
    assert log.outcome.tolist() == [Outcome.FINISHED] * 4 + [Outcome.REJECTED] * 2


def test_two_models_at_work_have_half_the_machine_each() -> None:
    box = Box([model("a", takes=40, load_s=1.0), model("b", takes=40, load_s=1.0)])
    box.ask((0.0, 0, 40), (0.0, 1, 40))  # a alone from 1 to 2, both from then on
    log = box.run(until_s=100.0)
    assert log.last_token_s.tolist() == pytest.approx([1.0 + 1.0 + 2 * 4.0, 11.0])
    gauges = [runner.recorder.integrals.observed_s[0] for runner in box.server.runners]
    assert gauges == pytest.approx([99.0, 98.0])  # slowed steps are recorded to their ends


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(5, 79), min_size=1, max_size=4),
    keep_alives=st.lists(st.sampled_from([0.0, 3.0, 40.0, math.inf]), min_size=4, max_size=4),
    requests=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 3), st.integers(1, 30)), max_size=25),
    most=st.integers(1, 3),
    slots=st.integers(1, 2),
    max_queue=st.integers(0, 6),
)
def test_no_request_is_lost_no_memory_overdrawn_and_nothing_left_in_use(
    sizes: list[int],
    keep_alives: list[float],
    requests: list[tuple[int, int, int]],
    most: int,
    slots: int,
    max_queue: int,
) -> None:
    models = [model(name, takes=size, keep_alive_s=keep) for name, size, keep in zip("abcd", sizes, keep_alives, strict=False)]
    box = Box(models, max_loaded_models=most, slots=slots, max_queue=max_queue)
    asked = sorted((float(at_s), index % len(models), output) for at_s, index, output in requests)
    box.ask(*asked)
    log = box.run()
    assert len(log) == len(asked) == len(box.ends)
    assert {*log.outcome.tolist()} <= {Outcome.FINISHED, Outcome.REJECTED}
    assert sorted(log.model.tolist()) == sorted(index for _, index, _ in asked)
    assert (log.outcome == Outcome.REJECTED).sum() == box.ends.count("refused")
    for runner in box.server.runners:
        allocator = runner.scheduler.allocator
        assert (allocator.free_slots, runner.num_users) == (allocator.usable_slots, 0)
    for at_s in {load.start_s for load in box.server.loads}:
        held = [load.held_bytes for load in box.server.loads if load.start_s <= at_s < (load.end_s or math.inf)]
        assert sum(held) <= 100
        assert len(held) <= most
