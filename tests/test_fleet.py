"""Replicas behind a router, and faults: what a user gets, and what a router decides."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simpy

from pagedkv.allocation import KVPoolSettings
from pagedkv.errors import ConfigError
from pagedkv.scheduling.content import NO_SEGMENTS, Segments, shared_segments
from pagedkv.scheduling.scheduler import Scheduler
from pagedkv.scheduling.scheduler_settings import SchedulerSettings
from pagedkv.sims.clock import Clock
from pagedkv.sims.comparison import comparison
from pagedkv.sims.config import LoadConfig, MeasurementConfig, ServingConfig, SimulationConfig
from pagedkv.sims.deployment import deploy
from pagedkv.sims.engine import Engine
from pagedkv.sims.export import write
from pagedkv.sims.faults import Fault, parse_faults
from pagedkv.sims.fit import fit
from pagedkv.sims.fleet import Fleet, ServingProcess
from pagedkv.sims.fleet_record import fleet_record
from pagedkv.sims.lengths import FixedLengths
from pagedkv.sims.load import ClosedLoop
from pagedkv.sims.probe import probe
from pagedkv.sims.recorder import Recorder
from pagedkv.sims.recording import KV_KINDS, RUNNING
from pagedkv.sims.records import Outcome, RequestLog
from pagedkv.sims.results import simulate
from pagedkv.sims.routing import ROUTING, ReplicaState
from pagedkv.sims.routing.prefix_affine import BALANCE_ABS_THRESHOLD
from pagedkv.sims.scenario import resolve
from pagedkv.sims.simulation import run
from pagedkv.sims.step_time import StepCost
from pagedkv.sims.sweep_grid import parse_grid
from pagedkv.step_allocation import step_allocator


def config(load: dict[str, Any], measurement: dict[str, Any] | None = None, **serving: Any) -> SimulationConfig:
    return SimulationConfig(
        load=LoadConfig(**load),
        serving=ServingConfig(**serving),
        measurement=MeasurementConfig(**({"allocator": ("paged",), "duration": "30s", "warmup": "5s"} | (measurement or {}))),
    )


# --- what can be asked for --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("serving", "says"),
    [
        ({"replicas": 0}, "--replicas is 0: needs 1 to"),
        ({"replicas": 10**6}, "--replicas is 1000000: needs 1 to"),
        ({"replicas": 2, "routing": "least-laoded"}, "unknown routing 'least-laoded': did you mean least-loaded"),
        ({"routing": "least-loaded"}, "goes with --replicas 2 or more"),
        ({"fault": ("10s",)}, "'10s' does not say for how long.*10s:120s"),
        ({"fault": ("10s:0s",)}, "needs more than 0, e.g. 10s:120s"),
        ({"fault": ("soon:5s",)}, "'soon' is not a time"),
        ({"fault": ("10s:5s:0:0",)}, "write AT:FOR or AT:FOR:REPLICA"),
        ({"fault": ("",)}, "write AT:FOR or AT:FOR:REPLICA"),
        ({"fault": ("10s:5s:1",)}, "no replica is '1'; there is only 0"),
        ({"replicas": 3, "fault": ("10s:5s:3",)}, "no replica is '3'; there are 0 to 2"),
        ({"replicas": 3, "fault": ("10s:5s:-1",)}, "no replica is '-1'"),
        ({"fault": ("35s:5s",)}, "comes at 35s, and the run ends at 35s.*longer --duration"),
        ({"replicas": 2, "fault": ("20s:5s:1,10s:10s:1",)}, "--fault 20s: replica 1 is still down from 10s on, and back at 20s"),
        ({"replicas": 2, "fault": ("10s:9s", "20s:1s:1", "12s:1s")}, "--fault 12s: replica 0 is still down"),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(serving: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        resolve(config({"users": 3}, **serving))


def test_faults_come_by_time_from_flags_and_comma_lists() -> None:
    texts = ("2m:1500ms:1, 10s:5s", "15.5s:1s:0")
    assert parse_faults(texts, num_replicas=2, end_s=None) == (
        Fault(at_s=10.0, down_s=5.0, replica=0),
        Fault(at_s=15.5, down_s=1.0, replica=0),
        Fault(at_s=120.0, down_s=1.5, replica=1),
    )


def test_a_fault_after_the_last_answer_is_refused() -> None:
    late = config({"request_rate": 2.0, "num_prompts": 3}, {"duration": None, "warmup": None}, fault=("1000s:5s",))
    with pytest.raises(ConfigError, match=r"--fault at 1000s comes too late: every request was answered [0-9.]+ s after"):
        run(resolve(late), "paged", seed=0)


def test_the_usual_routing_is_left_out_of_the_settings() -> None:
    resolved = resolve(config({"users": 3}, replicas=2, routing="round-robin"))
    assert (resolved.config.serving.routing, resolved.replication.routing) == (None, "round-robin")
    document = simulate(resolved).document()
    assert (document["config"]["replicas"], document["config"]["routing"]) == (2, "round-robin")


def test_a_static_answer_is_about_one_machine() -> None:
    with pytest.raises(ConfigError, match="one machine"):
        fit(deploy(ServingConfig(replicas=2)))


def test_a_sweep_takes_replicas_and_several_faults_at_once() -> None:
    grid = parse_grid("--users 9 --replicas 1,2 --fault 70s:5s 90s:5s,80s:9s".split())
    assert [(p.values["replicas"], p.config.serving.fault) for p in grid] == [
        (1, ("70s:5s", "90s:5s")),
        (1, ("80s:9s",)),
        (2, ("70s:5s", "90s:5s")),
        (2, ("80s:9s",)),
    ]


# --- what a router decides --------------------------------------------------------------------------------------------

DOWN = ReplicaState(up=False, num_requests=0)


def up(*loads: int) -> list[ReplicaState]:
    return [ReplicaState(up=True, num_requests=load) for load in loads]


def texts(*streams: int) -> Segments:
    return shared_segments(np.array(streams), np.arange(1, len(streams) + 1) * 100)


def test_round_robin_takes_turns_and_passes_over_who_is_down() -> None:
    policy = ROUTING.load("round-robin")(3)
    assert [policy.choose(up(9, 0, 0), NO_SEGMENTS) for _ in range(5)] == [0, 1, 2, 0, 1]
    assert [policy.choose([*up(0, 0), DOWN], NO_SEGMENTS) for _ in range(3)] == [0, 1, 0]


def test_least_loaded_takes_the_fewest_requests_and_turns_among_equals() -> None:
    policy = ROUTING.load("least-loaded")(3)
    assert [policy.choose(up(2, 1, 1), NO_SEGMENTS) for _ in range(3)] == [1, 2, 1]
    assert policy.choose([DOWN, *up(7, 8)], NO_SEGMENTS) == 1


def test_what_begins_alike_goes_home_until_home_is_down() -> None:
    policy = ROUTING.load("prefix-affine")(3)
    assert policy.choose(up(1, 0, 2), texts(7, 1)) == 1
    assert policy.choose(up(0, 5, 0), texts(7, 2)) == 1  # the first segment counts, not the load
    assert policy.choose(up(0, 5, 3), texts(8)) == 0
    assert policy.choose([ReplicaState(up=True, num_requests=4), DOWN, *up(2)], texts(7)) == 2
    assert policy.choose(up(0, 0, 5), texts(7)) == 2  # for good: the old home has come back empty
    assert policy.choose(up(3, 3, 0), NO_SEGMENTS) == 2


def test_a_home_that_is_far_busier_is_left_alone_for_the_time_being() -> None:
    policy = ROUTING.load("prefix-affine")(2)
    assert policy.choose(up(0, 0), texts(7)) == 0
    assert policy.choose(up(BALANCE_ABS_THRESHOLD, 0), texts(7)) == 0
    assert policy.choose(up(BALANCE_ABS_THRESHOLD + 1, 0), texts(7)) == 1
    assert policy.choose(up(300, 200), texts(7)) == 0  # 100 more, but not 1.5 times as many
    assert policy.choose(up(301, 200), texts(7)) == 1
    assert policy.choose(up(9, 0), texts(7)) == 0


def test_loads_are_those_of_the_moment_of_arrival() -> None:
    load = {"request_rate": 12.0, "random_input_len": 400, "random_output_len": 60, "random_range_ratio": 0.9}
    done = run(resolve(config(load, replicas=3, routing="least-loaded")), "paged", seed=0)
    logs = [replica.log() for replica in done.replicas]
    largest = 0
    for replica, log in enumerate(logs):
        for at_s in log.arrival_s.tolist():
            loads = [num_present(each, at_s) for each in logs]
            assert loads[replica] == min(loads)
            largest = max(largest, *loads)
    assert len(done.log) > 300
    assert largest > 5


def num_present(log: RequestLog, at_s: float) -> int:
    gone = (log.outcome == Outcome.FINISHED) & (log.last_token_s <= at_s)
    return int(((log.arrival_s < at_s) & ~gone).sum())


# --- a fault, by hand -------------------------------------------------------------------------------------------------


class OneSecond:
    """Every step takes one second."""

    def cost(self, batch: Any, num_entries: int) -> StepCost:
        del batch, num_entries
        return StepCost(1.0, 0.0, 0.0)


POOL = KVPoolSettings(num_blocks=101, block_size=4, max_num_seqs=4, max_model_len=64)


def fleet_of_two(env: Clock, *faults: Fault, end_s: float) -> Fleet:
    def start(until_s: float) -> ServingProcess:
        scheduler = Scheduler(SchedulerSettings(max_num_seqs=4, max_model_len=64), step_allocator("paged", POOL))
        recorder = Recorder(scheduler, warmup_s=0.0, end_s=until_s)
        return ServingProcess(scheduler=scheduler, recorder=recorder, engine=Engine(env, scheduler, OneSecond(), recorder))

    return Fleet(env, start, ROUTING.load("round-robin")(2), faults, num_replicas=2, end_s=end_s)


@pytest.fixture
def struck() -> Fleet:
    """Seven requests of 4 + 5 tokens, and both replicas down from 6 to 7 s, the first one from 2.5 s on.

    At 0, 0.5 and 1.2 s the turns are 0, 1, 0; at 3 and 5 s only 1 is up; at 6.5 s nobody is; at 7.25 s replica 1 alone is back.
    """
    env = Clock(initial_time=0.0)
    faults = (Fault(at_s=2.5, down_s=5.0, replica=0), Fault(at_s=6.0, down_s=1.0, replica=1))
    fleet = fleet_of_two(env, *faults, end_s=10.0)
    arrival_s = np.array([0.0, 0.5, 1.2, 3.0, 5.0, 6.5, 7.25])
    fleet.submit_all(arrival_s, np.full(7, 4), np.full(7, 5))
    env.run(until=10.0)
    fleet.close()
    return fleet


def test_a_fault_fails_who_is_there_and_nobody_else(struck: Fleet) -> None:
    log = struck.log()
    finished, failed, unfinished = Outcome.FINISHED, Outcome.FAILED, Outcome.UNFINISHED
    assert log.outcome.tolist() == [failed, finished, failed, failed, failed, failed, unfinished]
    # Steps end at 1 and 2 on replica 0, the one that would end at 3 at never; at 1.5, 2.5 ... 5.5 on replica 1.
    assert log.num_output_tokens.tolist() == [2, 5, 0, 2, 0, 0, 2]
    np.testing.assert_array_equal(log.scheduled_s, [0.0, 0.5, 2.0, 3.5, 5.5, np.nan, 7.25])
    np.testing.assert_array_equal(log.first_token_s, [1.0, 1.5, np.nan, 4.5, np.nan, np.nan, 8.25])
    np.testing.assert_array_equal(log.last_token_s, [2.0, 5.5, np.nan, 5.5, np.nan, np.nan, 9.25])


def test_what_is_integrated_ends_with_the_process_and_adds_up(struck: Fleet) -> None:
    first, second = ([r.integrals for r in replica.recorders] for replica in struck.replicas)
    assert [float(each.observed_s[0]) for each in first] == [2.5, 2.5]
    assert [float(each.observed_s[0]) for each in second] == [6.0, 3.0]
    assert [float(each.gauges[RUNNING]) for each in first] == [2.0 * 1 + 0.5 * 2, 0.0]
    assert [float(each.gauges[RUNNING]) for each in second] == [3.0 * 1 + 2.0 * 2 + 0.5 * 2, 2.75]
    whole = fleet_record(struck.recorders, warmup_s=0.0, end_s=10.0)
    assert float(whole.integrals.observed_s[0]) == 10.0
    assert float(whole.integrals.gauges[RUNNING]) == 3.0 + 8.0 + 2.75
    assert whole.running_max == 3  # 2 on replica 0 and 1 on replica 1, from 2 s on
    assert whole.iterations == 3 + 6 + 3
    # Gaps of one second: 1 + 4 + 1 + 1, and the 0.75 s at the end; whoever failed waits for no more.
    assert float(whole.integrals.itl_sum_s[0]) == pytest.approx(7.75)
    starts_s, seconds, means = whole.timeline.means()
    assert starts_s.tolist() == list(range(10))
    assert seconds.tolist() == [1.0] * 10
    np.testing.assert_allclose(means[:, RUNNING], [1.5, 2, 2, 1.5, 2, 2, 0, 0.75, 1, 1])
    np.testing.assert_allclose(means[:, : len(KV_KINDS)].sum(1), [400] * 6 + [0] + [400] * 3)


def test_whoever_waits_is_told_of_the_failure() -> None:
    env = Clock(initial_time=0.0)
    fleet = fleet_of_two(env, Fault(at_s=1.5, down_s=9.0, replica=0), end_s=20.0)
    told: list[tuple[float, Any]] = []

    def user(tokens: int) -> Iterator[simpy.Event]:
        answered = fleet.submit(4, tokens)
        assert answered is not None
        value = yield answered
        told.append((env.now, value))

    env.process(user(5))
    env.process(user(3))
    env.run(until=20.0)
    assert told == [(1.5, Outcome.FAILED), (3.0, None)]


def test_a_user_pauses_for_a_second_after_an_error() -> None:
    env = simpy.Environment(initial_time=0.0)
    asked_s: list[float] = []

    class Failing:
        """Turns the first request away, fails the second after two seconds, and answers the others after three."""

        def submit(self, prompt_tokens: int, output_tokens: int, *, content: Any = None, model: int = 0) -> simpy.Event | None:
            del prompt_tokens, output_tokens, content, model
            asked_s.append(env.now)
            if len(asked_s) == 1:
                return None
            return env.timeout(2.0, Outcome.FAILED) if len(asked_s) == 2 else env.timeout(3.0)

    lengths = FixedLengths(input_len=1, output_len=1)
    load = ClosedLoop(users=1, think_time_s=0.0, lengths=lengths, num_requests=4)
    load.start(env, Failing(), seed=0)  # type: ignore[arg-type]
    env.run()
    assert asked_s == [0.0, 1.0, 4.0, 7.0]


# --- what a user sees -------------------------------------------------------------------------------------------------

SHORT = {"random_input_len": 200, "random_output_len": 50, "random_range_ratio": 0.5}


def test_a_single_replica_without_faults_says_nothing_of_replicas() -> None:
    document = simulate(resolve(config({"users": 3, **SHORT}))).document()
    assert {"replicas", "num_replicas"}.isdisjoint(document["results"][0])
    assert "replicas" not in {row.label for row in comparison(document)}


def test_every_view_is_about_all_replicas_together(tmp_path: Path) -> None:
    asked = config({"users": 12, "think_time": "1s", **SHORT}, {"repeats": 2}, replicas=3, fault=("10s:5s:2",))
    results = simulate(resolve(asked))
    document = results.document()
    (result,) = document["results"]
    assert result["num_replicas"] == 3
    assert [row["replica"] for row in result["replicas"]] == [0, 1, 2]
    assert [row["up_s"] for row in result["replicas"]] == pytest.approx([60.0, 60.0, 50.0])
    assert sum(row["num_finished"] for row in result["replicas"]) == result["num_finished"]
    assert [row["num_failed"] > 0 for row in result["replicas"]] == [False, False, True]
    assert sum(row["output_tokens_per_s"] for row in result["replicas"]) == pytest.approx(result["output_tokens_per_s"])
    assert result["verdict"]["status"] == "failed"
    assert "requests failed when a replica was down" in result["verdict"]["text"]
    assert {row.label: row.values for row in comparison(document)}["replicas"] == ("3",)
    write(results, tmp_path)
    with (tmp_path / "requests.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len([row for row in rows if row["measured"] == "1"]) == result["num_injected"]
    assert len([row for row in rows if row["measured"] == "1" and row["outcome"] == "failed"]) == result["num_failed"]
    with (tmp_path / "timeline.csv").open() as file:
        for row in csv.DictReader(file):
            assert sum(float(value) for name, value in row.items() if name.startswith("kv_")) == pytest.approx(1.0, abs=1e-6)


def test_requests_that_find_nobody_up_have_failed() -> None:
    done = run(resolve(config({"request_rate": 5.0, **SHORT}, fault=("10s:5s",))), "paged", seed=0)
    log = done.log
    between = (log.arrival_s > 10.0) & (log.arrival_s < 15.0)
    assert between.sum() > 5
    assert (log.outcome[between] == Outcome.FAILED).all()
    assert np.isnan(log.scheduled_s[between]).all()
    assert not (log.outcome[log.arrival_s > 15.0] == Outcome.FAILED).any()


def test_a_process_comes_back_with_an_empty_cache() -> None:
    load = {"request_rate": 2.0, "prefix_len": 160, **SHORT}
    log = run(resolve(config(load, fault=("12s:3s",))), "paged", seed=0).log
    served = log.where(~np.isnan(log.scheduled_s))
    before, after = served.num_cached_tokens[served.arrival_s < 12.0], served.num_cached_tokens[served.arrival_s > 15.0]
    assert (before[0], after[0]) == (0, 0)
    assert before[-1] == after[-1] == 160


def test_with_goals_a_fault_costs_no_more_than_its_requests() -> None:
    load, one_fault = {"users": 20, "think_time": "1s", **SHORT}, {"replicas": 2, "fault": ("100s:1s",)}
    asked = config(load, {"duration": "200s", "goodput": ("ttft:2000",)}, **one_fault)
    lenient, strict = (probe(asked, "paged", attain=attain) for attain in (0.9, 1.0))
    assert lenient.figures["num_failed"] > 0
    assert lenient.verdict.status == strict.verdict.status == "failed"
    assert (lenient.fits, strict.fits) == (True, False)
    without_goals = config(load, {"duration": "200s"}, **one_fault)
    assert not probe(without_goals, "paged", attain=0.9).fits


def hit_rate(routing: str) -> float:
    load = {"request_rate": 6.0, "prefix_len": 800, "num_prefixes": 24, **SHORT}
    small = {"num_gpu_blocks_override": 1000, "max_model_len": 2048}
    asked = config(load, {"duration": "100s"}, replicas=4, routing=routing, **small)
    (result,) = simulate(resolve(asked)).document()["results"]
    return float(result["prefix_hit_rate"])


def test_prefix_affine_routing_finds_more_where_a_cache_cannot_hold_every_prefix() -> None:
    assert hit_rate("prefix-affine") > 1.2 * hit_rate("round-robin")
