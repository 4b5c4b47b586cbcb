"""report.html: one offline page with the verdict, the pictures and every assumption. Numbers come from the result document."""

from html import escape
from typing import Any

from pagedkv.sims import figures
from pagedkv.sims.budget_timeline import budget_timeline, troubles
from pagedkv.sims.command import command_line
from pagedkv.sims.comparison import advantages, prefix_note
from pagedkv.sims.deployment import memory_request
from pagedkv.sims.memory_frames import frames_of
from pagedkv.sims.memory_map import legend_text, memory_map
from pagedkv.sims.reporting.page import badge, command, figure, page, section
from pagedkv.sims.reporting.sections import assumptions_table, comparison_table, glossary_table
from pagedkv.sims.results import Results
from pagedkv.sims.timeline_figure import caption, memory_over_time

_MOST_MAPS, _MOST_CELLS = 2, 640
"""Memories side by side, and cells of each: what keeps the page small, and legible on a phone."""


def html(results: Results) -> str:
    """Return the page. It loads nothing from anywhere; all text that a user chose is escaped."""
    document = results.document()
    title = f"{results.scenario.load.title} on {results.scenario.deployment.hardware.title}"
    sections = (
        _verdict(results, document),
        section("memory", "Where the memory goes", figure("budget", figures.waterfall(results), _kv_line(results, document))),
        _memory_over_time(results),
        section("kv", "KV memory over time", figure("kinds", figures.kv_over_time(results), _caption_kv())),
        _map(results),
        section("occupancy", "Running, waiting, preempted", figure("requests", figures.occupancy(results), _caption_occupancy())),
        section("latency", "Latency", _latency(results)),
        section("comparison", "All figures", comparison_table(document)),
        section("assumptions", "Assumptions", assumptions_table(results)),
        section("glossary", "Glossary", glossary_table()),
    )
    return page(title, sections)


def _memory_over_time(results: Results) -> str:
    """Return the section of how memory fills from before the start on; empty where the host has a memory of its own."""
    scenario = results.scenario
    if not scenario.deployment.hardware.unified or scenario.model_serving is not None:
        return ""
    answer = budget_timeline(memory_request(scenario.config.serving))
    drawn = figure("timeline", memory_over_time(answer.timeline), escape(caption(answer.timeline)))
    items = "".join(f"<li><strong>{escape(p.title)}</strong>: {escape(p.verdict.text)}</li>" for p in troubles(answer.timeline))
    avoid = "" if answer.advice is None else f"<p>What avoids it: <code>{escape(' · '.join(answer.advice.settings))}</code></p>"
    notes = "".join(f"<p>{escape(note)}</p>" for note in answer.timeline.notes)
    return section("timeline", "Memory over time", f"{drawn}{f'<ul>{items}</ul>' if items else ''}{avoid}{notes}")


def _map(results: Results) -> str:
    """Return the section of the memory map, what paging is compared with beside it."""
    names = list(results.by_allocator)[:_MOST_MAPS]
    seed = results.scenario.config.measurement.seed
    panels = {name: frames_of(results.scenario, name, seed=seed, end_s=results.by_allocator[name].runs[0].end_s) for name in names}
    drawn = memory_map(panels, most_cells=_MOST_CELLS)
    return section("map", "The memory, block by block", figure("map", drawn, legend_text()))


def _latency(results: Results) -> str:
    return "".join(figure(f"latency-{i}", f, caption) for i, (f, caption) in enumerate(figures.latency_cdfs(results)))


def _verdict(results: Results, document: dict[str, Any]) -> str:
    scenario = results.scenario
    items = "".join(
        f"<li><strong>{escape(c['allocator'])}</strong> {badge(c['verdict']['status'])} {escape(c['verdict']['text'])}</li>"
        for c in document["results"]
    )
    note = prefix_note(document, results.scenario.deployment.why_no_prefix_caching)
    gains = "".join(f"<li>{escape(line)}</li>" for line in (*advantages(document), *([note] if note else [])))
    first = document["results"][0]["verdict"]
    headline = first["text"].partition(f": {first['status']}")[0]  # a trace's name may hold a colon, too
    served = scenario.deployment
    model = f"{scenario.model_titles}, {served.weight_format.name} weights"
    subtitle = f"{model}, on {served.hardware.title}, {document['config']['engine']}"
    return (
        f'<section id="verdict">\n<h1>{escape(headline)}</h1>\n<p class="soft">{escape(subtitle)}</p>\n'
        f"<ul>{items}{gains}</ul>\n<p>This run:</p>{command('this-run', command_line(scenario.config))}\n"
        f"<p>Try next:</p>{command('next-run', first['next_command'])}\n</section>"
    )


def _kv_line(results: Results, document: dict[str, Any]) -> str:
    budget = document["budget"]
    warnings = "".join(f"<br><strong>Warning:</strong> {escape(w)}" for w in results.scenario.deployment.budget.warnings)
    tokens = budget["num_blocks"] * budget["block_size"]
    return (
        f"{budget['num_blocks']:,} blocks of {budget['block_size']} tokens = {tokens:,} tokens, "
        f"{budget['kv_bytes_per_token']:,} bytes each. The parts sum to the memory that the engine sees.{warnings}"
    )


def _caption_kv() -> str:
    return "Share of the pool's slots by what they are. Hatched kinds are memory that is taken and holds nothing now."


def _caption_occupancy() -> str:
    return "Requests in the running batch and in the queue. Crosses mark moments at which running requests were preempted."
