"""The slowest requests: a Gantt chart of their phases, and a table that says why each was slow."""

from collections import Counter
from collections.abc import Sequence
from html import escape

import plotly.graph_objects as go

from pagedkv.sims.palette import BLUE, GREEN, INK, NEUTRAL, ORANGE, PINK, VERMILION, WHITE, base_layout
from pagedkv.sims.records import Outcome
from pagedkv.sims.reporting.page import Drawing, picture, rows, table
from pagedkv.sims.request_phases import NUM_LOOKS, PHASES, PhaseKind
from pagedkv.sims.results import Results
from pagedkv.sims.simulation import Run
from pagedkv.sims.slow_requests import SlowRequest

_COLOURS: dict[PhaseKind, str] = {
    "queued": ORANGE,
    "prefill": GREEN,
    "decode": BLUE,
    "preempted": VERMILION,
    "again": PINK,
}
_HATCHES: dict[PhaseKind, str] = {"queued": "/", "preempted": "x"}
"""Time in which nothing is computed for the request."""
_OF_PARTS = {
    "queued": "queueing",
    "preempted": "preemption",
    "own prompt": "a long prompt",
    "others in prefill": "others during prefill",
    "own answer": "a long answer",
    "others in decode": "others during decode",
}


def slowest_body(results: Results, allocator: str, slow: Sequence[SlowRequest]) -> tuple[Drawing | None, str]:
    """Return the chart of `slow`, slowest first, of the first run of `allocator`, and it with its table; says so without any."""
    run = results.by_allocator[allocator].runs[0]
    if not slow:
        return None, "<p>No request was accepted in the measured time, so there is none to show.</p>"
    drawing = Drawing(name="slowest", figure=gantt(slow, run.end_s), words=_words(results, allocator, slow))
    body = [
        (
            f"#{each.entry}",
            each.why,
            f"{each.arrival_s:,.1f}",
            f"{'' if each.finished else '≥ '}{each.e2e_s:,.1f}",
            *(f"{each.seconds(*kinds):,.1f}" for kinds in (("queued",), ("prefill",), ("decode",), ("preempted", "again"))),
            f"{each.num_preemptions:,}",
            f"{each.prompt_tokens:,}" + (f" ({each.num_cached_tokens:,} cached)" if each.num_cached_tokens else ""),
            f"{each.num_output_tokens:,}" + ("" if each.finished else f" of {each.output_tokens:,}"),
        )
        for each in slow
    ]
    head = (
        "request",
        "mostly because",
        "arrival, s",
        "E2E, s",
        "queued",
        "prefill",
        "decode",
        "preempted",
        "times",
        "prompt",
        "output",
    )
    one_by_one = table(head, rows(body), kind="slowest", label="The slowest requests one by one")
    return drawing, picture(drawing, _caption(results, allocator, run, slow)) + one_by_one


def gantt(slow: Sequence[SlowRequest], end_s: float) -> go.Figure:
    """Return a bar per request, slowest on top, from its arrival on; an arrow where it was not finished at the end of the run."""
    figure = go.Figure()
    names = [f"#{each.entry}" for each in slow]
    for kind, title in PHASES.items():
        phases = [
            (name, phase, each) for name, each in zip(names, slow, strict=True) for phase in each.phases if phase.kind == kind
        ]
        if not phases:
            continue
        figure.add_bar(
            y=[name for name, _, _ in phases],
            x=[float(f"{phase.seconds:.5g}") for _, phase, _ in phases],
            base=[float(f"{phase.start_s:.7g}") for _, phase, _ in phases],
            name=title,
            orientation="h",
            marker={
                "color": _COLOURS[kind],
                "pattern": {"shape": _HATCHES.get(kind, ""), "fgcolor": WHITE, "size": 6, "solidity": 0.25},
            },
            customdata=[each.why for _, _, each in phases],
            hovertemplate=f"%{{y}} {title}: %{{x:.1f}} s<br>%{{customdata}}<extra></extra>",
        )
    cut_off = [name for name, each in zip(names, slow, strict=True) if not each.finished]
    if cut_off:
        figure.add_scatter(
            y=cut_off,
            x=[end_s] * len(cut_off),
            name="not finished",
            mode="markers",
            marker={"symbol": "triangle-right", "size": 9, "color": INK},
            hovertemplate="%{y}: not finished at the end<extra></extra>",
        )
    figure.update_layout(**base_layout(110 + 22 * len(slow)), barmode="overlay", bargap=0.25)
    figure.update_layout(hovermode="closest", margin={"t": 60}, legend={"y": 1.0})
    figure.update_yaxes(categoryorder="array", categoryarray=names[::-1], showgrid=False, tickfont={"size": 11})
    figure.update_xaxes(title="simulated time, s", linecolor=NEUTRAL)
    return figure


def _caption(results: Results, allocator: str, run: Run, slow: Sequence[SlowRequest]) -> str:
    median = results.by_allocator[allocator].figures["e2e_s"]
    usual = "" if median is None else f" The median request takes {median['p50']:,.1f} s."
    repeats = len(results.by_allocator[allocator].runs)
    several = f" These are of {allocator}{', in the first of the repeats' if repeats > 1 else ''}."
    lost = int((run.measured.outcome == Outcome.FAILED).sum())
    failed = f" Not among them: {lost:,} that failed." if lost else ""
    exact = ""
    if any(each.num_preemptions for each in slow):
        exact = " When a preempted request waited is not known with several processes: its times are those of its tokens."
    if exact and not run.replicas and run.server is None:
        exact = (
            f" Arrival, first step and tokens are exact; where a preempted request waited is seen at {NUM_LOOKS:,} moments, "
            f"{run.end_s / (NUM_LOOKS + 1):.2g} s apart."
        )
    return escape(f"Measured requests with the longest time from arrival to last token.{several}{usual}{failed}{exact}")


def _words(results: Results, allocator: str, slow: Sequence[SlowRequest]) -> str:
    first, causes = slow[0], Counter(_OF_PARTS[max(each.parts, key=each.parts.__getitem__)] for each in slow)
    listed = ", ".join(f"{cause} {number}" for cause, number in causes.most_common())
    median = results.by_allocator[allocator].figures["e2e_s"]
    usual = "" if median is None else f", while the median request takes {median['p50']:,.1f} s"
    at_least = "" if first.finished else "at least "
    return (
        f"The {len(slow)} slowest requests of {allocator}. The slowest takes {at_least}{first.e2e_s:,.1f} s{usual}: {first.why}. "
        f"What takes the most time, by number of requests: {listed}."
    )
