"""report.html: one offline page with the verdict, the pictures and every assumption. Numbers come from the result document."""

from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from typing import Any

from plotly.graph_objects import Figure

from pagedkv.sims import figures
from pagedkv.sims.memory_frames import watch_frames
from pagedkv.sims.memory_map import legend_text, memory_map
from pagedkv.sims.memory_panel import Frame
from pagedkv.sims.part_tables import class_tables, model_tables, replica_tables
from pagedkv.sims.reporting.capacity_section import Capacity, capacity_body, capacity_head
from pagedkv.sims.reporting.page import Drawing, Section, page, picture, pictures, rows, table
from pagedkv.sims.reporting.sections import assumptions_table, comparison_table, glossary_table
from pagedkv.sims.reporting.slowest import slowest_body
from pagedkv.sims.reporting.timeline_section import timeline_body
from pagedkv.sims.reporting.verdict import verdict_head
from pagedkv.sims.reporting.words import budget_words, fullest, kinds_words, latency_words, map_words, occupancy_words
from pagedkv.sims.results import Results
from pagedkv.sims.run_texts import contiguous_max_holds, kv_equation, window_note
from pagedkv.sims.simulation import run
from pagedkv.sims.slow_requests import SlowRequest, looks_at, slow_requests, slowest_entries

_MOST_MAPS, _MOST_CELLS = 2, 640
"""Memories side by side, and cells of each: what keeps the page small, and legible on a phone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """What the sections show."""

    results: Results
    document: dict[str, Any]
    frames: dict[str, list[Frame]]
    """Moments of the memory, by allocator: of the first ones."""
    slow: list[SlowRequest]
    """The slowest requests of the first allocator."""
    capacity: Capacity | None
    """The search that chose this load, if one did."""

    @classmethod
    def of(cls, results: Results, capacity: Capacity | None) -> "Shown":
        """Do the runs again, and look at them: what was recorded does not say which block was whose."""
        scenario, seed = results.scenario, results.scenario.config.measurement.seed
        frames: dict[str, list[Frame]] = {}
        slow: list[SlowRequest] = []
        for place, (name, result) in enumerate(list(results.by_allocator.items())[:_MOST_MAPS]):
            first, seen = result.runs[0], frames.setdefault(name, [])
            watch = watch_frames(scenario, seen, end_s=first.end_s)
            entries = slowest_entries(first) if place == 0 else None
            looks = None if entries is None else looks_at(first, entries)
            run(scenario, name, seed=seed, watch=watch if looks is None else watch.beside(looks.watch))
            if entries is not None:
                slow = slow_requests(scenario, first, entries, looks)
        return cls(results=results, document=results.document(), frames=frames, slow=slow, capacity=capacity)


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A report, made."""

    title: str
    head: str
    """HTML."""
    sections: list[Section]

    def html(self) -> str:
        """Return the page. It loads nothing from anywhere; all text that a user chose is escaped."""
        return page(self.title, self.head, self.sections)

    @property
    def figures(self) -> dict[str, Figure]:
        """Every figure, by name."""
        return {drawing.name: drawing.figure for section in self.sections for drawing in section.drawings}


def report(results: Results, capacity: Capacity | None = None) -> Report:
    """Return the report of `results`, all runs of which are done once more to look at them.

    Args:
        results: What is shown.
        capacity: The search that chose the load of `results`, if one did: its answer and its curve come first then.
    """
    shown = Shown.of(results, capacity)
    return Report(
        title=f"{results.scenario.load.title} on {results.scenario.deployment.hardware.title}",
        head=_head(shown),
        sections=[section for build in SECTIONS if (section := build(shown)) is not None],
    )


def html(results: Results, capacity: Capacity | None = None) -> str:
    """Return the page of `report`."""
    return report(results, capacity).html()


def _head(shown: Shown) -> str:
    if shown.capacity is None:
        proposal = shown.document["results"][0]["verdict"]["next_command"]
        return verdict_head(shown.results, shown.document, level=1, proposal=proposal)
    # The run knows nothing of the search: it would propose more load, which has been found not to fit.
    return capacity_head(shown.capacity) + verdict_head(shown.results, shown.document, level=2, proposal=shown.capacity.further)


def _capacity(shown: Shown) -> Section | None:
    if shown.capacity is None:
        return None
    drawing, body = capacity_body(shown.capacity)
    return Section(anchor="capacity", title=f"Capacity against {shown.capacity.unit}", body=body, drawings=(drawing,))


def _memory(shown: Shown) -> Section:
    deployment = shown.results.scenario.deployment
    equation, blocks = kv_equation(deployment)
    lines = [f"{equation} = {blocks}.", "The parts sum to the memory that the engine sees.", deployment.budget.gate]
    lines += [note for note in (window_note(deployment), contiguous_max_holds(shown.results)) if note]
    warnings = "".join(f"<br><strong>Warning:</strong> {escape(w)}" for w in deployment.budget.warnings)
    several = " This is the first model's budget." if shown.results.scenario.model_serving is not None else ""
    caption = "<br>".join(map(escape, lines)) + several + warnings
    drawing = Drawing(name="budget", figure=figures.waterfall(shown.results), words=budget_words(shown.document))
    return Section(anchor="memory", title="Where the memory goes", body=picture(drawing, caption), drawings=(drawing,))


def _timeline(shown: Shown) -> Section | None:
    made = timeline_body(shown.results.scenario)
    return None if made is None else Section(anchor="timeline", title="Memory over time", body=made[1], drawings=(made[0],))


def _kv(shown: Shown) -> Section:
    caption = (
        "Share of the pool's slots by what they are. Hatched kinds are memory that is taken and holds nothing now; cached is free "
        "for whoever needs it."
    )
    drawing = Drawing(name="kinds", figure=figures.kv_over_time(shown.results), words=kinds_words(shown.results))
    return Section(anchor="kv", title="KV memory over time", body=picture(drawing, caption), drawings=(drawing,))


def _map(shown: Shown) -> Section:
    moments = next(iter(shown.frames.values()))
    first = fullest(moments)
    drawings = [
        Drawing(
            name=f"map-{name}",
            figure=memory_map({name: frames}, most_cells=_MOST_CELLS, first=first),
            words=map_words(name, frames),
        )
        for name, frames in shown.frames.items()
        if frames
    ]
    labels = [frame.label for frame in moments]
    several = shown.results.scenario.replication.is_fleet or shown.results.scenario.model_serving is not None
    whose = " Of several processes, this is the first one's memory." if several else ""
    body = pictures(drawings, escape(legend_text() + whose), labels, first)
    return Section(anchor="map", title="The memory, block by block", body=body, drawings=tuple(drawings))


def _occupancy(shown: Shown) -> Section:
    caption = (
        "Requests in the running batch and in the queue. Crosses mark moments at which running requests were preempted; the dotted "
        "line is the end of the warm-up, from which on all is measured."
    )
    if shown.results.scenario.replication.faults:
        caption += " Shaded: a replica is down."
    drawing = Drawing(name="requests", figure=figures.occupancy(shown.results), words=occupancy_words(shown.results))
    return Section(anchor="occupancy", title="Running, waiting, preempted", body=picture(drawing, caption), drawings=(drawing,))


def _latency(shown: Shown) -> Section:
    results = shown.results
    nothing = {
        "ttft_s": "No request was accepted in the measured time.",
        "tpot_s": "No request got a second token in the measured time.",
        "e2e_s": "No request was accepted in the measured time.",
    }
    drawings, parts = [], []
    for (field, metric, title), (drawn, caption) in zip(figures.LATENCIES, figures.latency_cdfs(results), strict=True):
        if not drawn.data:
            parts.append(f"<p>{title}: {nothing[field]}</p>")
            continue
        drawings.append(Drawing(name=f"latency-{metric}", figure=drawn, words=latency_words(results, field, title, metric)))
        parts.append(picture(drawings[-1], caption))
    return Section(anchor="latency", title="Latency", body="".join(parts), drawings=tuple(drawings))


def _slowest(shown: Shown) -> Section:
    allocator = next(iter(shown.results.by_allocator))
    title = f"The slowest {len(shown.slow)} requests, and why" if shown.slow else "The slowest requests"
    drawing, body = slowest_body(shown.results, allocator, shown.slow)
    return Section(anchor="slowest", title=title, body=body, drawings=() if drawing is None else (drawing,))


def _parts(shown: Shown) -> Section | None:
    tables = [*class_tables(shown.document), *model_tables(shown.document), *replica_tables(shown.document)]
    if not tables:
        return None
    body = "".join(f"<h3>{escape(each.title)}</h3>{table(each.head, rows(each.rows), label=each.title)}" for each in tables)
    return Section(anchor="parts", title="By class, model or replica", body=body)


def _comparison(shown: Shown) -> Section:
    return Section(anchor="comparison", title="All figures", body=comparison_table(shown.document))


def _assumptions(shown: Shown) -> Section:
    return Section(anchor="assumptions", title="Assumptions and how sure they are", body=assumptions_table(shown.results))


def _glossary(shown: Shown) -> Section:
    del shown
    return Section(anchor="glossary", title="Glossary", body=glossary_table())


SECTIONS: tuple[Callable[[Shown], Section | None], ...] = (
    _capacity,
    _memory,
    _timeline,
    _kv,
    _map,
    _occupancy,
    _latency,
    _slowest,
    _parts,
    _comparison,
    _assumptions,
    _glossary,
)
"""In the order of the page; None leaves a section out. Another section is another function here."""
