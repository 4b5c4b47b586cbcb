"""Every figure again, from what happened: by hand for three requests, and by a slow and plain oracle for real runs."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from pagedkv.heaps import HEAPS
from pagedkv.paged_steps import PagedStepAllocator
from pagedkv.scheduling.scheduler import Scheduler
from pagedkv.scheduling.step import Blocker, Step
from pagedkv.sims import simulation
from pagedkv.sims.config import LoadConfig, MeasurementConfig, ServingConfig, SimulationConfig
from pagedkv.sims.goodput import parse_goals
from pagedkv.sims.latencies import Latencies
from pagedkv.sims.metrics import kv_shares, measure
from pagedkv.sims.recorder import Recorder
from pagedkv.sims.recording import ITL_BIN_RATIO, KV_KINDS
from pagedkv.sims.records import Outcome, RequestLog
from pagedkv.sims.scenario import Scenario, resolve
from pagedkv.sims.step_time import StepCost
from pagedkv.step_batch import StepBatch


class OneSecondSteps:
    def cost(self, batch: StepBatch, num_entries: int) -> StepCost:
        return StepCost(0.5, 0.25, 0.25, 0.4, 0.125)


def three_requests(folder: Path, **measurement: Any) -> dict[str, Any]:
    """Run three requests on 16 slots in blocks of 4, two at once, 8 tokens a step, a second per step.

    With A: 8 + 3 tokens at 0 s, B: 4 + 2 and C: 4 + 1 at 0.5 s, in seconds from 0:
    0-1: A computes 8. 1-2: A decodes (9 of 12 slots), B prefills (4 of 4); C waits for a row. 2-3: A decodes (10 of 12); B needs a
    second block, there is none, and B is preempted; B and C wait for memory. 3-4: A is done; B recomputes 5 (of 8 slots), C gets
    the 3 tokens left in the step (of 4 slots). 4-5: B is done, C computes its last prompt token, gives its one output, and is done.
    Without a prefix cache: with one, B would find its first block again.
    """
    (folder / "three.csv").write_text("arrival_s,input_tokens,output_tokens\n0,8,3\n0.5,4,2\n0.5,4,1\n")
    config = SimulationConfig(
        load=LoadConfig(trace=str(folder / "three.csv")),
        serving=ServingConfig(
            max_model_len=16,
            block_size=4,
            num_gpu_blocks_override=5,
            max_num_seqs=2,
            max_num_batched_tokens=8,
            enable_prefix_caching=False,
        ),
        measurement=MeasurementConfig(allocator=("paged",), goodput=("ttft:2000", "tpot:1500"), **measurement),
    )
    scenario = resolve(config)
    one_second = replace(scenario.deployment, step_time=OneSecondSteps())  # type: ignore[arg-type]
    scenario = replace(scenario, deployment=one_second)
    return measure(simulation.run(scenario, "paged", seed=0), scenario.goals)


def test_three_requests_by_hand(tmp_path: Path) -> None:
    figures = three_requests(tmp_path)
    itl = figures.pop("itl_s")
    assert itl["mean"] == pytest.approx((1 + 1 + 2) / 3)
    assert [itl["p50"], itl["p90"], itl["p99"]] == pytest.approx([1, 2, 2], rel=6e-4)
    kinds = {"tokens": 43, "reserved": 2, "internal": 7, "free": 28}
    while_waiting = {"tokens": 23, "reserved": 1, "internal": 4, "free": 4}
    assert figures.pop("kv") == pytest.approx(dict.fromkeys(KV_KINDS, 0.0) | {k: v / (5 * 16) for k, v in kinds.items()})
    assert figures.pop("kv_when_waiting") == pytest.approx(
        dict.fromkeys(KV_KINDS, 0.0) | {k: v / (2 * 16) for k, v in while_waiting.items()}
    )
    assert figures.pop("ttft_s") == pytest.approx({"mean": 7 / 3, "p50": 1.5, "p90": 3.9, "p99": 4.44})
    assert figures.pop("tpot_s") == pytest.approx({"mean": 1.5, "p50": 1.5, "p90": 1.9, "p99": 1.99})
    assert figures.pop("e2e_s") == pytest.approx({"mean": 11 / 3, "p50": 3.5, "p90": 4.3, "p99": 4.48})
    assert figures.pop("lower_bounds") == []
    assert figures == pytest.approx(
        {
            **{"num_injected": 3, "num_finished": 3, "num_rejected": 0, "num_failed": 0, "num_unfinished": 0},
            **dict.fromkeys(("num_draft_tokens", "num_accepted_tokens", "draft_acceptance_rate")),
            **dict.fromkeys(("num_loaded_tokens", "num_offloaded_tokens")),
            **dict.fromkeys(("num_queried_tokens", "num_hit_tokens", "prefix_hit_rate", "resumed_hit_rate")),
            **{"num_preemptions": 1, "running_mean": 7 / 5, "running_max": 2, "waiting_mean": 3 / 5, "waiting_time_share": 2 / 5},
            **{"output_tokens_per_s": 6 / 5, "request_throughput_per_s": 3 / 5, "goodput_per_s": 1 / 5, "goodput_share": 1 / 3},
            **{"error_rate": 0.0, "busy_share": 1.0, "memory_bandwidth_share": 0.4, "compute_share": 0.125},
            **{"iterations": 5, "request_steps": 7, "simulated_s": 5.0},
        }
    )


def test_the_same_three_seen_from_0_25_to_3_5_seconds(tmp_path: Path) -> None:
    """A arrived before the warm-up ended and does not count; B has one token, C none: lower bounds."""
    figures = three_requests(tmp_path, warmup="250ms", duration="3.25s")
    window_s = 3.25
    assert {k: v for k, v in figures.items() if k.startswith("num_") and v is not None} == {
        **{"num_injected": 2, "num_finished": 0, "num_rejected": 0, "num_failed": 0, "num_unfinished": 2, "num_preemptions": 1}
    }
    assert figures["ttft_s"]["mean"] == pytest.approx((1.5 + 3.0) / 2)  # C: at least until 3.5
    assert figures["tpot_s"]["mean"] == pytest.approx(1.5)  # B: (3.5 - 2) / 1
    assert figures["e2e_s"]["mean"] == pytest.approx(3.0)
    assert figures["itl_s"]["mean"] == pytest.approx(1.5)  # B's open gap; A's do not count
    assert figures["output_tokens_per_s"] == pytest.approx(4 / window_s)
    assert figures["request_throughput_per_s"] == pytest.approx(1 / window_s)
    assert (figures["goodput_per_s"], figures["goodput_share"]) == (0.0, 0.0)
    assert figures["running_mean"] == pytest.approx((0.75 * 1 + 2 + 1 + 0.5 * 2) / window_s)
    assert figures["waiting_time_share"] == pytest.approx(2 / window_s)
    assert figures["kv"]["tokens"] == pytest.approx((0.75 * 8 + 13 + 10 + 0.5 * 8) / (16 * window_s))
    assert figures["kv"]["free"] == pytest.approx((0.75 * 8 + 0 + 4 + 0.5 * 4) / (16 * window_s))


# --- the oracle -----------------------------------------------------------------------------------------------------


class Held(NamedTuple):
    """A running request in a step."""

    tokens: int
    slots: int
    """Slots held."""
    final: int
    """Slots it will have filled in the end."""


class Interval(NamedTuple):
    """A step or a pause, as the engine saw it."""

    start_s: float
    end_s: float
    running: list[Held]
    waiting: int
    free: int
    cached: int
    """Free slots that keep something to be found."""
    head_waits_for_memory: bool


class Witness(Recorder):
    """Writes down what the recorder is told."""

    def __init__(self, scheduler: Scheduler, *, warmup_s: float, end_s: float) -> None:
        super().__init__(scheduler, warmup_s=warmup_s, end_s=end_s)
        self.scheduler = scheduler
        self.intervals: list[Interval] = []
        self.preempted_s: list[tuple[float, int]] = []
        self.arrived_s: list[float] = []
        self.token_times_s: dict[int, list[float]] = defaultdict(list)

    def arrival(self, request: int, now_s: float, user_class: int = 0) -> None:
        super().arrival(request, now_s, user_class)
        self.arrived_s.append(now_s)

    def step(self, step: Step, start_s: float, cost: StepCost) -> None:
        scheduler, requests, pool = self.scheduler, self.scheduler.requests.arrays, self.scheduler.allocator
        running = []
        for i, request in enumerate(scheduler.arrays.running[: scheduler.num_running].tolist()):
            computed = int(requests["num_computed_tokens"][request])
            computed += int(step.batch["num_scheduled_tokens"][i]) if i < step.num_entries else 0
            held = int(pool.units_held[requests["row"][request]]) * pool.unit_slots
            final = int(requests["prompt_tokens"][request] + requests["output_tokens"][request]) - 1
            running.append(Held(computed, held, final))
        blocked = step.blocker is Blocker.KV_MEMORY
        end_s = start_s + cost.total_s
        self.intervals.append(Interval(start_s, end_s, running, scheduler.num_waiting, pool.free_slots, self.cached(), blocked))
        self.preempted_s.append((end_s, step.num_preempted))
        super().step(step, start_s, cost)

    def idle(self, start_s: float, end_s: float) -> None:
        free = self.scheduler.allocator.free_slots
        self.intervals.append(Interval(start_s, end_s, [], 0, free, self.cached(), head_waits_for_memory=False))
        super().idle(start_s, end_s)

    def cached(self) -> int:
        """Count the slots in blocks that carry a key and that nobody holds."""
        allocator = self.scheduler.allocator
        if not isinstance(allocator, PagedStepAllocator):
            return 0
        blocks = allocator.pool.blocks[1:]
        return int(((blocks["ref_cnt"] == 0) & (blocks["next_same"] != 0)).sum()) * allocator.unit_slots

    def tokens(self, now_s: float) -> None:
        super().tokens(now_s)
        for request in self.scheduler.sampled.tolist():
            self.token_times_s[request].append(now_s)


def shares(interval: Interval, scenario: Scenario, usable: int, *, contiguous: bool) -> dict[str, float]:
    """Return what docs/metrics.md says the slots of the pool are during `interval`."""
    kinds = dict.fromkeys(KV_KINDS, 0.0)
    for held in interval.running:
        kinds["tokens"] += held.tokens
        kinds["reserved"] += min(held.slots, held.final) - held.tokens
        kinds["internal"] += max(held.slots - held.final, 0)
    kinds["free"], kinds["cached"] = interval.free - interval.cached, interval.cached
    if contiguous:
        heap = HEAPS.load(scenario.deployment.pool.contiguous_heap)(scenario.deployment.pool.num_slots)
        kinds["external"] = sum(heap.rounded(held.slots) - held.slots for held in interval.running)
        if interval.head_waits_for_memory:
            kinds["external"] += kinds["free"]
            kinds["free"] = 0.0
    assert sum(kinds.values()) == usable  # always, not only on average
    return {kind: slots / usable for kind, slots in kinds.items()}


def weighted_mean(weights: list[float], values: Sequence[float]) -> float:
    return math.fsum(w * v for w, v in zip(weights, values, strict=True)) / (math.fsum(weights) or math.nan)


def percentile(values: list[float], p: int) -> float:
    ordered, place = sorted(values), p / 100 * (len(values) - 1)
    low, high = ordered[int(place)], ordered[math.ceil(place)]
    return low + (place - int(place)) * (high - low)


def summary(values: list[float]) -> dict[str, float]:
    return {"mean": math.fsum(values) / len(values), **{f"p{p}": percentile(values, p) for p in (50, 90, 99)}}


def crowded(allocator: str, heap: str, **changes: Any) -> Scenario:
    """Return a scenario in which requests queue, are preempted, rejected and left unfinished."""
    serving: dict[str, Any] = {"max_model_len": 3000, "num_gpu_blocks_override": 700, "max_num_seqs": 12, "contiguous_heap": heap}
    load: dict[str, Any] = {"users": 24, "think_time": "3s"}
    measurement: dict[str, Any] = {"warmup": "15s", "duration": "90s", "goodput": ("ttft:20000", "e2el:40000"), "seed": 5}
    config = SimulationConfig(
        load=LoadConfig(**load | changes),
        serving=ServingConfig(hardware="rtx-4090", **serving),
        measurement=MeasurementConfig(allocator=(allocator,), **measurement),
    )
    return resolve(config)


LOADS: dict[str, dict[str, Any]] = {"crowded": {}, "mostly idle": {"users": None, "think_time": None, "request_rate": 0.05}}
POOLS = [("paged", "buddy"), ("contiguous-max", "buddy"), ("contiguous-oracle", "buddy"), ("contiguous-oracle", "first-fit")]


class Case(NamedTuple):
    """A run that was watched by a `Witness`, and its figures."""

    scenario: Scenario
    run: simulation.Run
    witness: Witness
    figures: dict[str, Any]

    def seconds(self) -> list[float]:
        """Return how long each interval lies within the measured window."""
        return [max(min(i.end_s, self.run.end_s) - max(i.start_s, self.run.warmup_s), 0.0) for i in self.witness.intervals]


def watched(load: str, allocator: str, heap: str) -> Case:
    scenario = crowded(allocator, heap, **LOADS[load])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulation, "Recorder", Witness)
        run = simulation.run(scenario, allocator, seed=5, step_by_step=True)  # the witness wants to see every step
    assert isinstance(run.recorder, Witness)
    return Case(scenario, run, run.recorder, measure(run, scenario.goals))


@pytest.fixture(scope="module", params=[(load, *pool) for load in LOADS for pool in POOLS], ids=" ".join)
def case(request: pytest.FixtureRequest) -> Case:
    return watched(*request.param)


def test_memory_by_the_oracle(case: Case) -> None:
    intervals, seconds, figures = case.witness.intervals, case.seconds(), case.figures
    assert [i.start_s for i in intervals] == pytest.approx([0.0, *(i.end_s for i in intervals[:-1])])
    assert sum(seconds) == pytest.approx(90.0)
    contiguous, usable = case.run.allocator.placement != "block", case.run.allocator.usable_slots
    kinds = [shares(i, case.scenario, usable, contiguous=contiguous) for i in intervals]
    while_waiting = [s if i.waiting else 0.0 for s, i in zip(seconds, intervals, strict=True)]
    for field, weights in (("kv", seconds), ("kv_when_waiting", while_waiting)):
        expected = {kind: weighted_mean(weights, [k[kind] for k in kinds]) for kind in KV_KINDS}
        if not any(weights):
            assert figures[field] is None
            continue
        assert figures[field] == pytest.approx(expected, abs=1e-9)
        assert sum(figures[field].values()) == pytest.approx(1.0, abs=1e-9)


def test_the_queue_by_the_oracle(case: Case) -> None:
    intervals, seconds, figures = case.witness.intervals, case.seconds(), case.figures
    assert figures["running_mean"] == pytest.approx(weighted_mean(seconds, [len(i.running) for i in intervals]))
    assert figures["waiting_mean"] == pytest.approx(weighted_mean(seconds, [i.waiting for i in intervals]))
    assert figures["waiting_time_share"] == pytest.approx(weighted_mean(seconds, [i.waiting > 0 for i in intervals]))
    assert figures["running_max"] == max(len(i.running) for i, s in zip(intervals, seconds, strict=True) if s)
    assert figures["num_preemptions"] == sum(n for end_s, n in case.witness.preempted_s if end_s > 15.0)


def test_requests_by_the_oracle(case: Case) -> None:
    """Those that arrived from the warm-up on, unfinished ones with what they have at least."""
    log, end_s, figures = case.run.log, case.run.end_s, case.figures
    columns = ("arrival_s", "first_token_s", "last_token_s", "output_tokens", "outcome", "num_output_tokens")
    measured = [r for r in zip(*(getattr(log, c).tolist() for c in columns), strict=True) if r[0] >= 15.0]
    ttft, tpot, e2e, good = [], [], [], 0
    for arrival, first, last, output, outcome, got in measured:
        if outcome == Outcome.REJECTED:
            continue
        until = last if outcome == Outcome.FINISHED else end_s
        ttft.append((end_s if math.isnan(first) else first) - arrival)
        e2e.append(until - arrival)
        if output > 1 and not math.isnan(first):
            tpot.append((until - first) / (output - 1 if outcome == Outcome.FINISHED else got))
        good += outcome == Outcome.FINISHED and ttft[-1] <= 20.0 and e2e[-1] <= 40.0
    counts = [sum(r[4] == outcome for r in measured) for outcome in Outcome]
    assert [figures[f"num_{name}"] for name in ("unfinished", "finished", "rejected", "failed")] == counts
    assert figures["num_injected"] == len(measured) == sum(counts)
    for field, samples in (("ttft_s", ttft), ("tpot_s", tpot), ("e2e_s", e2e)):
        assert figures[field] == pytest.approx(summary(samples))
    assert figures["goodput_per_s"] == pytest.approx(good / 90.0)
    assert figures["goodput_share"] == pytest.approx(good / len(measured))


def test_tokens_by_the_oracle(case: Case) -> None:
    """Gaps of measured requests, an open one included; rates count whatever falls into the window."""
    figures, times_s = case.figures, case.witness.token_times_s
    wanted = case.witness.scheduler.requests.arrays["output_tokens"].tolist()
    gaps = []
    for request, times in times_s.items():
        if case.witness.arrived_s[request] >= 15.0:
            gaps += [b - a for a, b in zip(times, times[1:], strict=False)]
            gaps += [case.run.end_s - times[-1]] if len(times) < wanted[request] else []
    assert figures["output_tokens_per_s"] == pytest.approx(sum(t >= 15.0 for times in times_s.values() for t in times) / 90.0)
    ends_s = [times[-1] for request, times in times_s.items() if len(times) == wanted[request]]
    assert figures["request_throughput_per_s"] == pytest.approx(sum(t >= 15.0 for t in ends_s) / 90.0)
    assert figures["itl_s"]["mean"] == pytest.approx(math.fsum(gaps) / len(gaps))
    for p in (50, 90, 99):
        exact = sorted(gaps)[math.ceil(p / 100 * len(gaps)) - 1]
        assert figures["itl_s"][f"p{p}"] == pytest.approx(exact, rel=(ITL_BIN_RATIO - 1) * 0.51)


@pytest.mark.parametrize("pool", POOLS, ids=" ".join)
def test_the_oracle_sees_trouble(pool: tuple[str, str]) -> None:
    """It would prove little on runs in which nothing goes wrong."""
    figures = watched("crowded", *pool).figures
    assert min(figures["num_rejected"], figures["num_unfinished"], figures["num_finished"]) > 5
    assert figures["waiting_time_share"] > 0.5
    assert figures["goodput_share"] < 0.9
    assert (figures["goodput_share"] > 0) == (pool[0] != "contiguous-max")  # whose two places are never free in time
    assert (figures["num_preemptions"] > 0) == (pool[0] == "paged")


# --- parts ----------------------------------------------------------------------------------------------------------


def test_lower_bounds_of_unfinished_requests() -> None:
    nan = float("nan")
    log = RequestLog(
        arrival_s=np.array([1.0, 2.0, 3.0, 4.0]),
        scheduled_s=np.array([1.0, 2.0, nan, 4.0]),
        first_token_s=np.array([2.0, 4.0, nan, 5.0]),
        last_token_s=np.array([6.0, 7.0, nan, 5.0]),
        prompt_tokens=np.array([5, 5, 5, 5]),
        output_tokens=np.array([5, 11, 5, 1]),
        num_output_tokens=np.array([5, 3, 0, 1]),
        num_cached_tokens=np.zeros(4, np.int64),
        num_preemptions=np.zeros(4, np.int64),
        outcome=np.array([Outcome.FINISHED, Outcome.UNFINISHED, Outcome.UNFINISHED, Outcome.FINISHED], np.int8),
        user_class=np.zeros(4, np.int64),
        model=np.zeros(4, np.int64),
    )
    latencies = Latencies.of(log, end_s=10.0)
    assert latencies.ttft_s.tolist() == [1.0, 2.0, 7.0, 1.0]
    assert latencies.e2e_s.tolist() == [5.0, 8.0, 7.0, 1.0]
    assert latencies.tpot_s.tolist() == pytest.approx([1.0, 2.0, nan, nan], nan_ok=True)
    assert latencies.meet(parse_goals(["tpot:700"])).tolist() == [False, False, True, True]


def test_shares_of_nothing_are_none() -> None:
    assert kv_shares(np.zeros(9), 0.0, 16) is None
    assert kv_shares(np.arange(9.0), 2.0, 16) == {kind: i / 32 for i, kind in enumerate(KV_KINDS)}


def test_a_window_that_never_opens_measures_nothing(tmp_path: Path) -> None:
    figures = three_requests(tmp_path, warmup="100s")
    assert figures["num_injected"] == 0
    assert figures["kv"] is figures["running_mean"] is figures["ttft_s"] is None
    assert figures["output_tokens_per_s"] is figures["request_throughput_per_s"] is figures["goodput_per_s"] is None


def test_tokens_of_requests_that_failed_are_no_output() -> None:
    """llama.cpp gives up everybody when its cells run out: what they have got by then, nobody has as an answer."""
    config = SimulationConfig(
        load=LoadConfig(users=8, think_time="1s", random_input_len=200, random_output_len=300, random_range_ratio=0.5),
        serving=ServingConfig(engine="llama-cpp", quantization="q4_k_m", parallel=8, ctx_size=3072, kv_unified=True),
        measurement=MeasurementConfig(duration="200s", warmup="0"),
    )
    run = simulation.run(resolve(config), "llama-cpp-unified", seed=0)
    figures, log = measure(run, ()), run.log
    failed = log.of(Outcome.FAILED)
    assert failed.num_output_tokens.sum() > 0
    assert figures["num_finished"] > 0
    received = int(log.num_output_tokens.sum() - failed.num_output_tokens.sum())
    assert figures["output_tokens_per_s"] * run.end_s == pytest.approx(received)
    for from_s in (0.0, 20.0, 199.0):
        assert 0 <= log.output_tokens_since(from_s) <= log.num_output_tokens.sum()
    parts = [float(np.nanquantile(log.last_token_s, q)) for q in (0.0, 0.3, 0.8)]
    assert [log.output_tokens_since(s) for s in parts] == sorted((log.output_tokens_since(s) for s in parts), reverse=True)


def test_tokens_since_a_moment_by_hand() -> None:
    log = RequestLog.refused(np.zeros(4), np.ones((4, 3), np.int64), Outcome.FAILED)
    times = np.array([[1.0, 3.0], [1.0, 1.0], [5.0, 9.0], [np.nan, np.nan]])
    log = replace(log, first_token_s=times[:, 0], last_token_s=times[:, 1], num_output_tokens=np.array([3, 1, 5, 0]))
    assert [log.output_tokens_since(s) for s in (0.0, 1.0, 2.0, 3.0, 7.0, 9.5)] == [9, 9, 7, 6, 3, 0]
