"""Replicas and faults: a fleet is so many engines, compiled or not, and no request is lost but by a fault."""

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pytest
import simpy
from hypothesis import event, given, settings
from hypothesis import strategies as st

from pagedkv.sims.compiled_engine import CompiledEngine
from pagedkv.sims.config import LoadConfig, MeasurementConfig, ServingConfig, SimulationConfig
from pagedkv.sims.engine import ServingEngine
from pagedkv.sims.export import to_json
from pagedkv.sims.metrics import measure
from pagedkv.sims.recording import RUNNING_ELSEWHERE, RUNNING_MAX
from pagedkv.sims.records import Outcome, RequestLog
from pagedkv.sims.results import simulate
from pagedkv.sims.routing import ROUTING
from pagedkv.sims.scenario import Scenario, resolve
from pagedkv.sims.simulation import Run, run

WARMUP_S, DURATION_S = 4, 26
LOADS = st.one_of(
    st.builds(lambda n, think: {"users": n, "think_time": f"{think}s"}, st.integers(1, 40), st.sampled_from([0.1, 3.0])),
    st.builds(lambda rate: {"request_rate": rate}, st.sampled_from([0.3, 3.0, 20.0])),
    st.builds(lambda rate, n: {"request_rate": rate, "num_prompts": n}, st.sampled_from([3.0, 20.0]), st.integers(1, 80)),
    st.builds(lambda n: {"request_rate": 3.0, "num_prompts": n}, st.integers(40, 80)),  # these have faults: see fleet_of
    st.builds(lambda users, n: {"users": users, "think_time": "1s", "num_prompts": n}, st.integers(1, 9), st.integers(1, 60)),
)
PREFIXES = st.sampled_from([{}, {"prefix_len": 200, "num_prefixes": 5}])


@st.composite
def faults(draw: st.DrawFn, num_replicas: int, *, until_s: int) -> tuple[str, ...]:
    """Faults before `until_s` of which no two of one replica overlap."""
    texts = []
    for replica in range(num_replicas):
        at_s = 0.0
        for gap_s, down_s in draw(st.lists(st.tuples(st.floats(0.01, 12.0), st.floats(0.01, 9.0)), max_size=3)):
            at_s = round(at_s + gap_s, 3)
            if at_s >= until_s:
                break
            texts.append(f"{at_s}s:{down_s:.3f}s:{replica}")
            at_s += down_s + 0.01
    return tuple(texts)


def scenario(load: dict[str, Any], serving: dict[str, Any], allocator: str = "paged") -> Scenario:
    timed = {} if load.get("num_prompts") else {"duration": f"{DURATION_S}s", "warmup": f"{WARMUP_S}s"}
    lengths = {"random_input_len": 300, "random_output_len": 40, "random_range_ratio": 0.9}
    small = {"num_gpu_blocks_override": 130, "max_model_len": 1600, "max_num_seqs": 8, "max_num_batched_tokens": 512}
    return resolve(
        SimulationConfig(
            load=LoadConfig(**load, **lengths),
            serving=ServingConfig(**small, **serving),
            measurement=MeasurementConfig(allocator=(allocator,), **timed),
        )
    )


def same_log(one: RequestLog, other: RequestLog) -> None:
    for field in fields(RequestLog):
        np.testing.assert_array_equal(getattr(one, field.name), getattr(other, field.name), err_msg=field.name)


def same_record(one: Any, other: Any) -> None:
    for name, told in (("sums", None), ("itl_bins", None), ("counters", RUNNING_ELSEWHERE)):  # the last counter is told
        np.testing.assert_array_equal(getattr(one.arrays, name)[:told], getattr(other.arrays, name)[:told], err_msg=name)
    for mine, others in zip(one.timeline, other.timeline, strict=True):
        np.testing.assert_array_equal(mine, others)


@dataclass(frozen=True, kw_only=True)
class EvenlySpaced:
    """Requests of these lengths, a moment apart, every `step`-th from `first` on."""

    lengths: list[tuple[int, int]]
    apart_s: float
    first: int = 0
    step: int = 1
    num_requests: int | None = None
    title: str = "some requests"
    lengths_name: str = "as given"

    def settings(self) -> dict[str, Any]:
        return {}

    def start(self, env: simpy.Environment, engine: ServingEngine, *, seed: int) -> None:
        del env, seed
        arrival_s = np.arange(1, len(self.lengths) + 1) * self.apart_s
        mine, lengths = slice(self.first, None, self.step), np.array(self.lengths, np.int64)
        engine.submit_all(arrival_s[mine], lengths[mine, 0], lengths[mine, 1])


@given(
    num_replicas=st.integers(2, 4),
    lengths=st.lists(st.tuples(st.integers(1, 900), st.integers(1, 120)), min_size=1, max_size=60),
    apart_s=st.sampled_from([0.01, 0.25, 1.0]),
)
@settings(max_examples=60)
def test_round_robin_over_even_arrivals_is_so_many_runs_with_a_share_each(
    num_replicas: int, lengths: list[tuple[int, int]], apart_s: float
) -> None:
    fleet, alone = (scenario({"request_rate": 1.0}, {"replicas": n}) for n in (num_replicas, 1))
    together = run(replace(fleet, load=EvenlySpaced(lengths=lengths, apart_s=apart_s)), "paged", seed=0)
    figures = []
    for i, replica in enumerate(together.replicas):
        share = EvenlySpaced(lengths=lengths, apart_s=apart_s, first=i, step=num_replicas)
        single = run(replace(alone, load=share), "paged", seed=0)
        same_log(replica.log(), single.log)
        same_record_but_for_the_others(replica.now.recorder, single.recorder)
        figures.append(measure(single, ()))
    whole = measure(together, ())
    for name in ("num_injected", "num_finished", "num_unfinished", "num_preemptions", "iterations", "request_steps"):
        assert whole[name] == sum(each[name] for each in figures), name
    for name in ("output_tokens_per_s", "request_throughput_per_s", "running_mean", "waiting_mean"):
        assert whole[name] == pytest.approx(sum(each[name] for each in figures)), name
    assert whole["waiting_time_share"] == pytest.approx(np.mean([each["waiting_time_share"] for each in figures]))
    for kind, share_of_pool in whole["kv"].items():
        assert share_of_pool == pytest.approx(np.mean([each["kv"][kind] for each in figures]), abs=1e-12), kind


def same_record_but_for_the_others(one: Any, other: Any) -> None:
    """The maximum of running requests is the fleet's, and at least the replica's own."""
    assert one.arrays.counters[RUNNING_MAX] >= other.arrays.counters[RUNNING_MAX]
    one.arrays.counters[RUNNING_MAX] = other.arrays.counters[RUNNING_MAX]
    same_record(one, other)


@given(
    data=st.data(), load=LOADS, prefixes=PREFIXES, steps=st.sampled_from([3, CompiledEngine.steps_at_once]), seed=st.integers(0, 3)
)
@settings(max_examples=40)
def test_a_compiled_fleet_and_one_step_by_step_come_to_the_same(
    data: st.DataObject, load: dict[str, Any], prefixes: dict[str, Any], steps: int, seed: int
) -> None:
    case = fleet_of(data, load, prefixes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CompiledEngine, "steps_at_once", steps)
        compiled = run(case, "paged", seed=seed)
    slow = run(case, "paged", seed=seed, step_by_step=True)
    assert compiled.end_s == slow.end_s
    same_log(compiled.log, slow.log)
    same_record(compiled.recorder, slow.recorder)
    for mine, other in zip(compiled.replicas, slow.replicas, strict=True):
        same_log(mine.log(), other.log())
        for one, another in zip(mine.recorders, other.recorders, strict=True):
            same_record(one, another)
    assert measure(compiled, ()) == measure(slow, ())
    event(f"failed: {bool((compiled.log.outcome == Outcome.FAILED).any())}")


def fleet_of(data: st.DataObject, load: dict[str, Any], prefixes: dict[str, Any], allocator: str = "paged") -> Scenario:
    """A fleet whose faults come before its run ends: of drained runs, those whose last request comes long after two seconds."""
    num_replicas = data.draw(st.integers(1, 4), "replicas")
    serving: dict[str, Any] = {"replicas": num_replicas}
    long = not load.get("num_prompts")
    if long or (load["num_prompts"] >= 40 and load.get("request_rate") == 3.0):
        serving["fault"] = data.draw(faults(num_replicas, until_s=WARMUP_S + DURATION_S if long else 2), "faults")
    if num_replicas > 1:
        serving["routing"] = data.draw(st.sampled_from(ROUTING.names()), "routing")
    elif not serving.get("fault"):
        serving["replicas"] = 2
    return scenario(load | prefixes, serving, allocator)


@given(data=st.data(), load=LOADS, allocator=st.sampled_from(["paged", "contiguous-oracle"]), seed=st.integers(0, 3))
@settings(max_examples=100)
def test_requests_are_conserved_under_faults(data: st.DataObject, load: dict[str, Any], allocator: str, seed: int) -> None:
    case = fleet_of(data, load, {}, allocator)
    done = run(case, allocator, seed=seed)
    figures = measure(done, ())
    outcomes = ("finished", "unfinished", "rejected", "failed")
    assert figures["num_injected"] == len(done.measured) == sum(figures[f"num_{outcome}"] for outcome in outcomes)
    in_flight = sum(replica.state.num_requests for replica in done.replicas)
    assert in_flight == len(done.log.of(Outcome.UNFINISHED))
    assert (np.diff(done.log.arrival_s) >= 0).all()
    if not case.replication.faults:
        assert figures["num_failed"] == 0
    if load.get("num_prompts"):
        assert figures["num_injected"] == load["num_prompts"]
    everything_is_in_its_place(done)
    window_s = done.end_s - done.warmup_s
    for i, row in enumerate(figures["replicas"]):
        mine = [fault for fault in case.replication.faults if fault.replica == i]
        down_s = sum(max(min(f.back_s, done.end_s) - max(f.at_s, done.warmup_s), 0.0) for f in mine)
        assert row["up_s"] == pytest.approx(window_s - down_s, abs=1e-9)
        assert row["kv"] is None or sum(row["kv"].values()) == pytest.approx(1.0)
    assert sum(row["num_finished"] for row in figures["replicas"]) == figures["num_finished"]
    assert sum(row["num_failed"] for row in figures["replicas"]) <= figures["num_failed"]  # the others found no replica up
    assert figures["kv"] is None or sum(figures["kv"].values()) == pytest.approx(1.0)
    event(f"failed: {figures['num_failed'] > 0}, drained: {done.drained}")


def everything_is_in_its_place(done: Run) -> None:
    """Tables are sound, and of a drained run nothing is held any more."""
    for scheduler in live(done):
        scheduler.check_integrity()
        scheduler.allocator.check_integrity()
        if done.drained:
            assert scheduler.allocator.free_slots == scheduler.allocator.usable_slots


def live(done: Run) -> Iterable[Any]:
    return [replica.now.scheduler for replica in done.replicas if replica.up]


def test_the_same_seed_gives_the_same_bytes() -> None:
    case = scenario(
        {"users": 30, "think_time": "2s", "prefix_len": 200, "num_prefixes": 5},
        {"replicas": 3, "routing": "prefix-affine", "fault": ("9s:6s:2", "12s:3s")},
    )
    assert to_json(simulate(case).document()) == to_json(simulate(case).document())
