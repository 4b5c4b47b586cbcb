"""trace.json: requests and gauges on a time axis, for ui.perfetto.dev or chrome://tracing. docs/metrics.md explains it.

A process per column, and a track per request slot: as many as requests are there at once, waiting ones included. Times are whole
microseconds on the virtual clock, so that what follows without a gap in the simulation does so in the picture.
Source of the format: Trace Event Format (Chromium), JSON object form.
"""

import heapq
import json
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from pagedkv import __version__
from pagedkv.arrays import Float64Array
from pagedkv.sims.columns import Column, columns
from pagedkv.sims.recording import KV_KINDS, RUNNING, WAITING
from pagedkv.sims.records import Outcome
from pagedkv.sims.results import Results
from pagedkv.sims.simulation import Run

REQUESTS_SHOWN = 4000
"""Of each column, in order of arrival: 2 MB. requests.csv has them all."""
EVENTS_TRACK = 0
"""The track of what has no length: requests rejected or failed, preemptions."""

Event: TypeAlias = dict[str, Any]


class _Life(NamedTuple):
    """What is known of a request, in microseconds."""

    start: int
    end: int
    phases: tuple[tuple[str, int, int], ...]
    """(name, start, end), one after the other."""


def trace_text(answers: Iterable[Results], *, requests_shown: int = REQUESTS_SHOWN) -> str:
    """Return trace.json for one answer, or for those of several engines: the first repeat of each column, an event per line."""
    shown = [column for column in columns(answers) if column.repeat == 0]
    events: list[Event] = []
    for pid, column in enumerate(shown, 1):
        names, moments = _request_events(column.run, requests_shown)
        moments += [*_preemption_events(column.run), *_counter_events(column.run)]
        # The sort is stable: a request stays before the phases that begin with it, and is drawn around them.
        for event in (*_process_names(column.title, pid), *names, *sorted(moments, key=lambda each: int(each["ts"]))):
            events.append({"pid": pid, **event})
    lines = ",\n".join(json.dumps(event, ensure_ascii=False, allow_nan=False, separators=(",", ":")) for event in events)
    notes = json.dumps(_notes(shown, requests_shown), ensure_ascii=False, indent=1)
    return f'{{"displayTimeUnit": "ms",\n"otherData": {notes},\n"traceEvents": [\n{lines}\n]}}\n'


def _notes(shown: list[Column], requests_shown: int) -> dict[str, str]:
    notes = {
        "made by": f"pagedkv {__version__}: a simulation, on its virtual clock",
        "counters": "means over each bin of the run's timeline, as in timeline.csv",
        "preemptions": "counted per bin of the timeline, drawn in its middle",
        "failed": "drawn at the last instant that is known of the request",
    }
    for column in shown:
        if (total := len(column.run.log)) > requests_shown:
            notes[f"cut: {column.title}"] = f"the first {requests_shown:,} of {total:,} requests; requests.csv has all"
    if any(column.scenario.config.measurement.repeats > 1 for column in shown):
        notes["repeats"] = "the first of them"
    return notes


def _process_names(title: str, pid: int) -> tuple[Event, ...]:
    return (
        {"ph": "M", "name": "process_name", "tid": EVENTS_TRACK, "args": {"name": title}},
        {"ph": "M", "name": "process_sort_index", "tid": EVENTS_TRACK, "args": {"sort_index": pid}},
        {"ph": "M", "name": "thread_name", "tid": EVENTS_TRACK, "args": {"name": "events"}},
    )


def _request_events(run: Run, requests_shown: int) -> tuple[list[Event], list[Event]]:
    """Return the names of the tracks, and the spans: each request, and within it its phases. O(n log n)."""
    log, events = run.log, list[Event]()
    free: list[int] = []
    busy: list[tuple[int, int]] = []
    names: list[Event] = []
    for request, (life, args) in enumerate(zip(_lives(run, requests_shown), _arguments(run, requests_shown), strict=True)):
        outcome = Outcome(log.outcome[request])
        if outcome in (Outcome.REJECTED, Outcome.FAILED):
            events.append(_instant(outcome.name.lower(), life.end, {"request": request, **args}))
        if outcome is Outcome.REJECTED:
            continue
        while busy and busy[0][0] <= life.start:
            heapq.heappush(free, heapq.heappop(busy)[1])
        track = heapq.heappop(free) if free else len(names) + 1
        if track > len(names):
            names.append({"ph": "M", "name": "thread_name", "tid": track, "args": {"name": f"slot {track}"}})
        heapq.heappush(busy, (life.end, track))
        events.append(_span(f"request {request}", "request", track, life.start, life.end, args))
        events += [_span(name, "phase", track, start, end, {}) for name, start, end in life.phases]
    return names, events


def _lives(run: Run, requests_shown: int) -> Iterator[_Life]:
    """Yield what is known of each request. A phase that has not ended lasts until the run does, but for a failed request."""
    log, end = run.log, _micros(run.end_s)
    instants = (log.arrival_s, log.scheduled_s, log.first_token_s, log.last_token_s)
    rows = np.column_stack([each[:requests_shown] for each in instants]).tolist()
    for row, outcome, got in zip(rows, log.outcome.tolist(), log.num_output_tokens.tolist(), strict=False):
        known = [_micros(instant_s) for instant_s in row if not math.isnan(instant_s)]
        if outcome == Outcome.UNFINISHED:
            known = [*known[:3], end]  # its newest token is not its last
        elif got == 1:
            known = known[:3]  # its first token is its last
        phases = zip(("queued", "prefill", "decode"), known, known[1:], strict=False)
        yield _Life(known[0], known[-1], tuple(phases))


def _arguments(run: Run, requests_shown: int) -> Iterator[dict[str, Any]]:
    log, names = run.log, ("prompt_tokens", "output_tokens", "num_output_tokens", "num_cached_tokens", "num_preemptions")
    counts = np.column_stack([getattr(log, name)[:requests_shown] for name in names]).tolist()
    measured = (log.arrival_s >= run.warmup_s).tolist()
    for row, outcome, counted in zip(counts, log.outcome.tolist(), measured, strict=False):
        yield {**dict(zip(names, row, strict=True)), "outcome": Outcome(outcome).name.lower(), "measured": counted}


def _preemption_events(run: Run) -> Iterator[Event]:
    middles_s, numbers = run.recorder.timeline.preemptions_over_time()
    for middle_s, number in zip(middles_s.tolist(), numbers.tolist(), strict=True):
        yield _instant("preemptions", _micros(min(middle_s, run.end_s)), {"number": number})


def _counter_events(run: Run) -> Iterator[Event]:
    starts_s, _, means = run.recorder.timeline.means()
    shares: Float64Array = means[:, : len(KV_KINDS)] / run.allocator.usable_slots
    for start_s, running, waiting, kinds in zip(
        starts_s.tolist(), means[:, RUNNING].tolist(), means[:, WAITING].tolist(), shares.tolist(), strict=True
    ):
        start = _micros(start_s)
        yield _counter("requests", start, {"running": running, "waiting": waiting})
        yield _counter("share of KV memory", start, dict(zip(KV_KINDS, kinds, strict=True)))


def _span(name: str, category: str, track: int, start: int, end: int, args: dict[str, Any]) -> Event:
    return {"ph": "X", "name": name, "cat": category, "tid": track, "ts": start, "dur": end - start, "args": args}


def _instant(name: str, at: int, args: dict[str, Any]) -> Event:
    return {"ph": "i", "name": name, "tid": EVENTS_TRACK, "ts": at, "s": "t", "args": args}


def _counter(name: str, at: int, values: dict[str, float]) -> Event:
    return {"ph": "C", "name": name, "tid": EVENTS_TRACK, "ts": at, "args": values}


def _micros(seconds: float) -> int:
    return round(1e6 * seconds)
