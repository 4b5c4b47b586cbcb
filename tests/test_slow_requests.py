"""What requests did when, and why some were slow: phases without gaps, waits as long as they were, reasons that add up."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedkv.scheduling.step import Step
from pagedkv.sims.config import LoadConfig, MeasurementConfig, ServingConfig, SimulationConfig
from pagedkv.sims.latencies import Latencies
from pagedkv.sims.recorder import Recorder
from pagedkv.sims.records import Outcome, RequestLog, no_times
from pagedkv.sims.request_phases import NUM_LOOKS, Looks, phases_of, scheduler_indices
from pagedkv.sims.scenario import Scenario, resolve
from pagedkv.sims.simulation import Run, Watch, run
from pagedkv.sims.slow_requests import SlowRequest, looks_at, slow_requests, slowest_entries
from pagedkv.sims.step_time import StepCost

FIXED: dict[str, Any] = {"random_input_len": 900, "random_output_len": 300, "random_range_ratio": 0.5}
CROWDED: dict[str, Any] = {"num_gpu_blocks_override": 600, "max_model_len": 2048}


def scenario(load: LoadConfig, measurement: dict[str, Any] | None = None, **serving: Any) -> Scenario:
    small: dict[str, Any] = {"hardware": "rtx-4090", "model": "qwen2.5-0.5b"} | serving
    window: dict[str, Any] = {"duration": "20s", "warmup": "2s", "allocator": ("paged",)} | (measurement or {})
    return resolve(SimulationConfig(load=load, serving=ServingConfig(**small), measurement=MeasurementConfig(**window)))


def seen(setup: Scenario, number: int = 20) -> tuple[Run, list[SlowRequest]]:
    """A run, and its slowest requests, looked at in a second one."""
    name = setup.allocators[0]
    first = run(setup, name, seed=0)
    entries = slowest_entries(first, number)
    looks = looks_at(first, entries)
    if looks is not None:
        run(setup, name, seed=0, watch=looks.watch)
    return first, slow_requests(setup, first, entries, looks)


CASES: dict[str, tuple[LoadConfig, dict[str, Any], dict[str, Any]]] = {
    "preempted": (LoadConfig(request_rate=20.0, **FIXED), {}, CROWDED),
    "everything at once": (LoadConfig(request_rate=9.0, num_prompts=40, **FIXED), {"duration": None, "warmup": None}, CROWDED),
    "nothing finished": (LoadConfig(request_rate=9.0, random_input_len=1000, random_output_len=900), {"duration": "1s"}, {}),
    "sglang": (
        LoadConfig(request_rate=20.0, **FIXED),
        {"allocator": None},
        {"engine": "sglang", "mem_fraction_static": 0.25, "max_model_len": 2048},
    ),
    "a fleet": (LoadConfig(users=30, **FIXED), {}, {"replicas": 2, "fault": ("8s:4s:1",), **CROWDED}),
    "rejected in between": (LoadConfig(request_rate=9.0, lengths="sharegpt"), {}, {"max_model_len": 700}),
}


@pytest.mark.parametrize("name", CASES)
def test_phases_have_no_gaps_and_parts_sum_to_the_whole(name: str) -> None:
    load, measurement, serving = CASES[name]
    first, slow = seen(scenario(load, measurement, **serving))
    assert slow
    log, e2e_s = first.log, Latencies.of(first.log, first.end_s).e2e_s
    for each in slow:
        assert each.phases[0].start_s == log.arrival_s[each.entry]
        assert each.phases[-1].end_s == pytest.approx(log.last_token_s[each.entry] if each.finished else first.end_s)
        for phase, following in zip(each.phases, each.phases[1:], strict=False):
            assert phase.end_s == following.start_s
        assert sum(phase.seconds for phase in each.phases) == pytest.approx(e2e_s[each.entry])
        assert sum(each.parts.values()) == pytest.approx(each.e2e_s)
        assert min(each.parts.values()) >= -1e-9
        if np.isnan(log.scheduled_s[each.entry]):
            assert [phase.kind for phase in each.phases] == ["queued"]
        assert {"preempted", "again"}.isdisjoint(phase.kind for phase in each.phases) or each.num_preemptions > 0
    assert [each.e2e_s for each in slow] == sorted((each.e2e_s for each in slow), reverse=True)
    accepted = (log.outcome == Outcome.FINISHED) | (log.outcome == Outcome.UNFINISHED)
    others = np.setdiff1d(np.flatnonzero(accepted & (log.arrival_s >= first.warmup_s)), [each.entry for each in slow])
    assert not others.size or e2e_s[others].max() <= slow[-1].e2e_s


def test_waits_after_preemption_are_as_long_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the step-by-step engine, of which every step is written down."""
    setup = scenario(LoadConfig(request_rate=20.0, **FIXED), **CROWDED)
    waits: dict[int, list[list[float]]] = {}
    step = Recorder.step

    def noted(self: Recorder, decided: Step, start_s: float, cost: StepCost) -> None:
        for request in decided.batch["request"][decided.num_running_before : decided.num_entries].tolist():
            if request in waits and len(waits[request][-1]) == 1:
                waits[request][-1].append(start_s)
        for request in self._scheduler.preempted[: decided.num_preempted].tolist():
            waits.setdefault(request, []).append([start_s])
        step(self, decided, start_s, cost)

    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "step", noted)
        first = run(setup, "paged", seed=0, step_by_step=True)
    entries = np.flatnonzero(first.log.num_preemptions > 0)
    looks = looks_at(first, entries)
    assert looks is not None
    run(setup, "paged", seed=0, watch=looks.watch)
    assert set(waits) == set(entries.tolist())  # nobody is refused here, so that places in the log are those in the scheduler
    assert len(waits) > 10
    for each in slow_requests(setup, first, entries, looks):
        exact = waits[each.entry]
        waited_s = sum((wait[1] if len(wait) > 1 else first.end_s) - wait[0] for wait in exact)
        assert each.num_preemptions == len(exact)
        assert each.seconds("preempted") == pytest.approx(waited_s, abs=2 * looks.every_s * len(exact))


def test_entries_of_the_log_are_found_among_the_requests_of_the_scheduler_although_some_were_refused() -> None:
    load, measurement, serving = CASES["rejected in between"]
    setup = scenario(load, measurement, **serving)
    first = run(setup, "paged", seed=0)
    indices = scheduler_indices(first)
    assert indices is not None
    rejected = first.log.outcome == Outcome.REJECTED
    assert rejected.any()
    assert (indices[rejected] == -1).all()
    prompts: list[int] = []

    def see(now_s: float, scheduler: Any) -> None:
        prompts[:] = scheduler.requests.arrays["prompt_tokens"][: scheduler.requests.size].tolist()

    run(setup, "paged", seed=0, watch=Watch(times_s=[first.end_s - 0.001], see=see))
    assert [prompts[i] for i in indices[~rejected]] == first.log.prompt_tokens[~rejected].tolist()


# --- why ------------------------------------------------------------------------------------------------------------


def reasons(slow: list[SlowRequest]) -> set[str]:
    return {max(each.parts, key=each.parts.__getitem__) for each in slow}


def test_alone_it_is_the_length_of_prompt_or_answer() -> None:
    _, answers = seen(scenario(LoadConfig(users=1, think_time="0", random_input_len=50, random_output_len=400)))
    assert reasons(answers) == {"own answer"}
    assert "400 output tokens take" in answers[0].why
    assert answers[0].parts["own answer"] == pytest.approx(answers[0].e2e_s, rel=0.05)
    _, prompts = seen(scenario(LoadConfig(users=1, think_time="0", random_input_len=8000, random_output_len=1)))
    assert reasons(prompts) == {"own prompt"}
    assert "its prompt of 8,000 tokens takes" in prompts[0].why


def test_who_cannot_get_memory_is_queued_for_memory() -> None:
    _, slow = seen(scenario(LoadConfig(request_rate=30.0, **FIXED), {"allocator": ("contiguous-max",)}, **CROWDED))
    assert reasons(slow) == {"queued"}
    assert all("what holds up the queue most is KV memory" in each.why for each in slow)


def test_a_prompt_among_prompts_and_an_answer_among_answers_share_their_steps() -> None:
    _, prompts = seen(scenario(LoadConfig(users=40, think_time="2s", random_input_len=6000, random_output_len=2)))
    assert reasons(prompts) <= {"others in prefill", "queued"}
    _, answers = seen(scenario(LoadConfig(users=200, think_time="1s", random_input_len=500, random_output_len=300)))
    assert "others in decode" in reasons(answers)
    shared = next(each for each in answers if "shared with others" in each.why)
    assert f"{shared.num_output_tokens:,} output tokens" in shared.why


# --- phases, by themselves ------------------------------------------------------------------------------------------


def one(arrival_s: float, scheduled_s: float, first_s: float, last_s: float, *, finished: bool) -> RequestLog:
    times = no_times(1)
    for name, value in zip(times.dtype.names or (), (arrival_s, scheduled_s, first_s, last_s), strict=True):
        times[name] = value
    number = np.array([1])
    return RequestLog(
        **{name: times[name] for name in times.dtype.names or ()},
        **dict.fromkeys(("prompt_tokens", "output_tokens", "num_output_tokens", "num_cached_tokens"), number),
        **dict.fromkeys(("num_preemptions", "user_class", "model"), number),
        outcome=np.array([Outcome.FINISHED if finished else Outcome.UNFINISHED], np.int8),
    )


@st.composite
def histories(draw: st.DrawFn) -> tuple[RequestLog, float, list[Any], float]:
    known = draw(st.integers(1, 4))
    times = sorted(draw(st.lists(st.floats(0, 90), min_size=4, max_size=4)))
    finished = known == 4
    log = one(*(time if i < known else np.nan for i, time in enumerate(times)), finished=finished)
    every_s = draw(st.sampled_from([0.5, 3.0]))
    moments = np.arange(every_s, 100, every_s)
    kinds = draw(st.lists(st.sampled_from(["", "preempted", "again"]), min_size=moments.size, max_size=moments.size))
    return log, 100.0, [(m, kind) for m, kind in zip(moments.tolist(), kinds, strict=True) if kind], every_s


@given(histories())
def test_whatever_was_seen_phases_are_in_order_and_without_gaps(history: tuple[RequestLog, float, list[Any], float]) -> None:
    log, end_s, looks, every_s = history
    phases = phases_of(log, 0, end_s, looks, every_s)
    until_s = log.last_token_s[0] if log.outcome[0] == Outcome.FINISHED else end_s
    assert sum(phase.seconds for phase in phases) == pytest.approx(until_s - log.arrival_s[0])
    assert all(a.end_s == b.start_s for a, b in zip(phases, phases[1:], strict=False))
    assert all(phase.seconds > 0 for phase in phases)
    for phase in phases:
        if phase.kind in ("preempted", "again"):
            assert any(phase.start_s - every_s <= moment <= phase.end_s + every_s for moment, kind in looks if kind == phase.kind)


def test_two_who_look_each_see_their_own_times() -> None:
    setup = scenario(LoadConfig(users=3, **FIXED))
    told: list[tuple[str, float]] = []

    def watch(name: str, times_s: list[float]) -> Watch:
        return Watch(times_s=times_s, see=lambda now_s, _: told.append((name, now_s)))

    run(setup, "paged", seed=0, watch=watch("a", [1.0, 5.0, 7.5]).beside(watch("b", [0.5, 5.0, 9.0])))
    times = [("b", 0.5), ("a", 1.0), ("a", 5.0), ("b", 5.0), ("a", 7.5), ("b", 9.0)]
    assert [name for name, _ in told] == [name for name, _ in times]
    np.testing.assert_allclose([at_s for _, at_s in told], [at_s for _, at_s in times])


def test_nobody_looks_at_nobody() -> None:
    looks = Looks([], end_s=10.0)
    assert list(looks.watch.times_s) == []
    assert Looks([1], end_s=10.0).every_s * (NUM_LOOKS + 1) == 10.0
