"""trace.json: what the trace event format asks for, every request once, and counters that are the timeline."""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pagedkv.sims.chrome_trace import trace_text
from pagedkv.sims.cli import main
from pagedkv.sims.config import LoadConfig, MeasurementConfig, ServingConfig, SimulationConfig
from pagedkv.sims.recording import KV_KINDS, RUNNING, WAITING
from pagedkv.sims.records import Outcome
from pagedkv.sims.results import Results, simulate
from pagedkv.sims.scenario import resolve
from pagedkv.sims.simulation import Run

Event = dict[str, Any]
REQUIRED = {
    "M": {"ph", "name", "pid", "tid", "args"},
    "X": {"ph", "name", "cat", "pid", "tid", "ts", "dur", "args"},
    "C": {"ph", "name", "pid", "tid", "ts", "args"},
    "i": {"ph", "name", "pid", "tid", "ts", "s", "args"},
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Requests wait, are preempted, rejected, and cut off by the end."""
    trace = tmp_path_factory.mktemp("trace") / "trace.csv"
    rows = (f"{0.4 * i:.1f},{5000 if i % 20 == 7 else 300 + 37 * (i % 29)},{1 if i % 9 == 3 else 150}" for i in range(120))
    trace.write_text("arrival_s,input_tokens,output_tokens\n" + "\n".join(rows) + "\n")
    config = SimulationConfig(
        load=LoadConfig(trace=str(trace)),
        serving=ServingConfig(num_gpu_blocks_override=260, max_model_len=4096),
        measurement=MeasurementConfig(duration="40s", warmup="5s", repeats=2, allocator=("paged", "contiguous-max")),
    )
    return simulate(resolve(config))


def events_of(text: str) -> dict[int, list[Event]]:
    """Return the events by process, after checking what the format asks of each."""
    document = json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))
    assert document.keys() == {"displayTimeUnit", "otherData", "traceEvents"}
    by_process: dict[int, list[Event]] = defaultdict(list)
    for event in document["traceEvents"]:
        assert event.keys() == REQUIRED[event["ph"]]
        if event["ph"] != "M":
            assert type(event["ts"]) is int
            assert event["ts"] >= 0
        if event["ph"] == "X":
            assert type(event["dur"]) is int
            assert event["dur"] >= 0
        by_process[event["pid"]].append(event)
    return by_process


def of(events: list[Event], phase: str, name: str | None = None) -> list[Event]:
    return [event for event in events if event["ph"] == phase and name in (None, event["name"])]


def titles(by_process: dict[int, list[Event]]) -> dict[int, str]:
    return {pid: of(events, "M", "process_name")[0]["args"]["name"] for pid, events in by_process.items()}


def columns(results: Results) -> list[tuple[list[Event], Run]]:
    by_process = events_of(trace_text([results]))
    by_title = {title: by_process[pid] for pid, title in titles(by_process).items()}
    return [(by_title[f"vllm {name}"], result.runs[0]) for name, result in results.by_allocator.items()]


def micros(seconds: float) -> int:
    return round(seconds * 1e6)


def test_a_process_per_column_in_the_order_of_the_table(results: Results) -> None:
    by_process = events_of(trace_text([results]))
    assert list(titles(by_process).items()) == [(1, "vllm paged"), (2, "vllm contiguous-max")]


def test_times_never_go_back_within_a_process(results: Results) -> None:
    for events, _ in columns(results):
        times = [event["ts"] for event in events if event["ph"] != "M"]
        assert times == sorted(times)


def test_spans_of_a_track_nest_as_they_are_drawn(results: Results) -> None:
    for events, _ in columns(results):
        tracks = defaultdict(list)
        for event in of(events, "X"):
            tracks[event["tid"]].append(event)
        assert {e["tid"] for e in of(events, "M", "thread_name")} == {0, *tracks}
        for spans in tracks.values():
            free_from, around = 0, (0, 0)
            for span in spans:
                start, end = span["ts"], span["ts"] + span["dur"]
                if span["cat"] == "request":
                    assert start >= free_from
                    free_from, around = end, (start, end)
                else:
                    assert around[0] <= start
                    assert end <= around[1]


def test_there_are_as_many_tracks_as_requests_at_once(results: Results) -> None:
    for events, run in columns(results):
        spans = of(events, "X")
        lives = [(span["ts"], span["ts"] + span["dur"]) for span in spans if span["cat"] == "request"]
        at_once = max(sum(start <= moment < end for start, end in lives) for moment, _ in lives)
        assert max(span["tid"] for span in spans) == at_once
        assert (run.log.num_preemptions > 0).any() or run.allocator.name != "paged"


def test_every_request_is_drawn_once_with_its_instants(results: Results) -> None:
    for events, run in columns(results):
        log = run.log
        requests = {int(e["name"].removeprefix("request ")): e for e in of(events, "X") if e["cat"] == "request"}
        assert sorted(requests) == np.flatnonzero(log.outcome != Outcome.REJECTED).tolist()
        finished = np.flatnonzero(log.outcome == Outcome.FINISHED)
        assert finished.size
        for request in finished.tolist():
            span, args = requests[request], requests[request]["args"]
            assert span["ts"] == micros(log.arrival_s[request])
            assert span["ts"] + span["dur"] == micros(log.last_token_s[request])
            for name in ("prompt_tokens", "output_tokens", "num_output_tokens", "num_cached_tokens", "num_preemptions"):
                assert args[name] == getattr(log, name)[request]
            assert (args["outcome"], args["measured"]) == ("finished", log.arrival_s[request] >= 5.0)
        rejected = [event["args"]["request"] for event in of(events, "i", "rejected")]
        assert rejected == np.flatnonzero(log.outcome == Outcome.REJECTED).tolist() != []


def test_phases_follow_each_other_and_fill_their_request(results: Results) -> None:
    for events, run in columns(results):
        drawn: dict[str, list[tuple[int, int]]] = defaultdict(list)
        within: dict[int, list[Event]] = {}
        newest: dict[int, int] = {}
        for span in of(events, "X"):
            if span["cat"] == "request":
                newest[span["tid"]] = request = int(span["name"].removeprefix("request "))
                within[request] = []
            else:
                within[newest[span["tid"]]].append(span)
                drawn[span["name"]].append((span["ts"], span["ts"] + span["dur"]))
        log, end = run.log, micros(run.end_s)
        for request, spans in within.items():
            instants = [log.arrival_s[request], log.scheduled_s[request], log.first_token_s[request]]
            starts = [micros(t) for t in instants if not np.isnan(t)]
            done = log.outcome[request] == Outcome.FINISHED
            if done and log.output_tokens[request] == 1:
                starts = starts[:2]
            assert [span["ts"] for span in spans] == starts
            assert [span["name"] for span in spans] == ["queued", "prefill", "decode"][: len(starts)]
            ends = [span["ts"] + span["dur"] for span in spans]
            assert ends == [*starts[1:], micros(log.last_token_s[request]) if done else end]
        assert drawn.keys() == {"queued", "prefill", "decode"}


def test_counters_are_the_timeline(results: Results) -> None:
    for events, run in columns(results):
        starts_s, _, means = run.recorder.timeline.means()
        starts = [micros(start_s) for start_s in starts_s]
        requests, memory = of(events, "C", "requests"), of(events, "C", "share of KV memory")
        assert [e["ts"] for e in requests] == [e["ts"] for e in memory] == starts
        np.testing.assert_array_equal([e["args"]["running"] for e in requests], means[:, RUNNING])
        np.testing.assert_array_equal([e["args"]["waiting"] for e in requests], means[:, WAITING])
        for i, kind in enumerate(KV_KINDS):
            np.testing.assert_array_equal([e["args"][kind] for e in memory], means[:, i] / run.allocator.usable_slots)
        assert sum(e["args"]["number"] for e in of(events, "i", "preemptions")) == run.recorder.timeline.preemptions.sum()
    assert sum(e["args"]["number"] for e in of(columns(results)[0][0], "i", "preemptions")) > 0


def test_a_long_run_is_cut_and_says_so(results: Results) -> None:
    whole, cut = (json.loads(trace_text([results], requests_shown=number)) for number in (10**6, 30))
    assert not [name for name in whole["otherData"] if name.startswith("cut")]
    number = len(results.by_allocator["paged"].runs[0].log)
    assert cut["otherData"]["cut: vllm paged"] == f"the first 30 of {number} requests; requests.csv has all"
    shown = {e["name"] for e in cut["traceEvents"] if e.get("cat") == "request"}
    rejected = {f"request {e['args']['request']}" for e in cut["traceEvents"] if e["name"] == "rejected"}
    assert shown | rejected == {f"request {i}" for i in range(30)}
    assert [e for e in cut["traceEvents"] if e["ph"] == "C"] == [e for e in whole["traceEvents"] if e["ph"] == "C"]
    assert cut["otherData"]["repeats"] == "the first of them"


def test_failed_requests_end_at_their_last_known_instant() -> None:
    """A padded batch that outgrows memory fails, some of it after a few tokens."""
    config = SimulationConfig(
        load=LoadConfig(request_rate=20.0, num_prompts=60, random_input_len=1000, random_output_len=2000, random_range_ratio=0.9),
        serving=ServingConfig(
            engine="naive", hardware="rtx-4090", max_num_seqs=16, max_model_len=6000, max_num_batched_tokens=24_000
        ),
        measurement=MeasurementConfig(allocator=("contiguous-growing",)),
    )
    results = simulate(resolve(config))
    log = results.by_allocator["contiguous-growing"].runs[0].log
    failed = np.flatnonzero(log.outcome == Outcome.FAILED)
    assert failed.size
    known = np.column_stack((log.arrival_s, log.scheduled_s, log.first_token_s, log.last_token_s))
    (events,) = events_of(trace_text([results])).values()
    marks = {event["args"]["request"]: event["ts"] for event in of(events, "i", "failed")}
    assert marks == {request: micros(np.nanmax(known[request])) for request in failed.tolist()}
    spans = {event["name"]: event for event in of(events, "X") if event["cat"] == "request"}
    for request in failed.tolist():
        span = spans[f"request {request}"]
        assert span["ts"] + span["dur"] == marks[request]
        assert span["args"]["outcome"] == "failed"


def test_several_engines_share_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    main("--users 3 --think-time 1s --duration 3s --warmup 0 --engine vllm,sglang --out r".split())
    together = titles(events_of(Path("r/trace.json").read_text("utf-8")))
    alone = [titles(events_of(Path("r", engine, "trace.json").read_text("utf-8"))) for engine in ("vllm", "sglang")]
    assert list(together.values()) == [title for each in alone for title in each.values()]
