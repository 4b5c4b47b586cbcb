"""report.html: one offline page with the verdict, the pictures and every assumption. Numbers come from the result document."""

import shlex
from html import escape
from typing import Any

from plotly.graph_objects import Figure
from plotly.io import to_html
from plotly.offline import get_plotlyjs

from pagedkv import __version__
from pagedkv.sims import figures
from pagedkv.sims.assumptions import code_rows, machine_rows
from pagedkv.sims.budget_timeline import budget_timeline, troubles
from pagedkv.sims.command import command_line
from pagedkv.sims.comparison import advantages, comparison, prefix_note
from pagedkv.sims.deployment import memory_request
from pagedkv.sims.glossary import GLOSSARY
from pagedkv.sims.memory_frames import frames_of
from pagedkv.sims.memory_map import legend_text, memory_map
from pagedkv.sims.results import Results
from pagedkv.sims.timeline_figure import caption, memory_over_time

_STYLE = """
:root { color-scheme: light; --ink: #1b1f24; --soft: #57606a; --line: #d8dee4; --panel: #f6f8fa; --accent: #0072b2; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1rem; color: var(--ink); background: #fff;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: .5rem 0; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; padding-top: .5rem; border-top: 1px solid var(--line); }
p, li { max-width: 46rem; }
.soft { color: var(--soft); }
.badge { display: inline-block; padding: 0 .5em; border: 1px solid currentColor; border-radius: 1em; font-size: .85em; }
.stable { color: #00664d; } .saturated { color: #8a5a00; } .rejecting, .failed { color: #a5340b; }
.command { display: flex; gap: .5rem; align-items: flex-start; background: var(--panel); border: 1px solid var(--line);
  border-radius: 6px; padding: .5rem; }
.command code { flex: 1; white-space: pre-wrap; overflow-wrap: anywhere; }
code { font: .9em ui-monospace, Menlo, Consolas, monospace; }
button { font: inherit; border: 1px solid var(--line); border-radius: 6px; background: #fff; padding: 0 .75rem; cursor: pointer; }
button:focus-visible, a:focus-visible { outline: 2px solid var(--accent); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .25rem .6rem; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
.numbers td { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.numbers th[scope=row] { font-weight: 400; white-space: nowrap; } .numbers .heading th { font-weight: 600; }
.depth1 { padding-left: 1.6rem; }
figure { margin: .5rem 0; } figcaption { color: var(--soft); font-size: .9rem; max-width: 46rem; }
@media (max-width: 480px) { body { padding: .6rem; font-size: 15px; } h1 { font-size: 1.3rem; } }
"""

_MOST_MAPS, _MOST_CELLS = 2, 640
"""Memories side by side, and cells of each: what keeps the page small, and legible on a phone."""

# The browser itself holds the page to loading nothing.
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"

_COPY = """
document.querySelectorAll("button[data-copy]").forEach(function (button) {
  button.addEventListener("click", function () {
    var text = document.getElementById(button.dataset.copy).textContent, done = function () { button.textContent = "Copied"; };
    if (navigator.clipboard && window.isSecureContext) { navigator.clipboard.writeText(text).then(done); return; }
    var area = document.createElement("textarea");
    area.value = text; document.body.appendChild(area); area.select(); document.execCommand("copy"); area.remove(); done();
  });
});
"""


def html(results: Results) -> str:
    """Return the page. It loads nothing from anywhere; all text that a user chose is escaped."""
    document = results.document()
    title = f"{results.scenario.load.title} on {results.scenario.deployment.hardware.title}"
    sections = (
        _verdict(results, document),
        _section("memory", "Where the memory goes", _figure("budget", figures.waterfall(results), _kv_line(results, document))),
        _memory_over_time(results),
        _section("kv", "KV memory over time", _figure("kinds", figures.kv_over_time(results), _caption_kv())),
        _map(results),
        _section("occupancy", "Running, waiting, preempted", _figure("requests", figures.occupancy(results), _caption_occupancy())),
        _section("latency", "Latency", _latency(results)),
        _section("comparison", "All figures", _comparison(document)),
        _section("assumptions", "Assumptions", _assumptions(results)),
        _section("glossary", "Glossary", _glossary()),
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f"<title>{escape(title)} · pagedkv</title>\n<style>{_STYLE}</style>\n<script>{get_plotlyjs()}</script>\n"
        "</head>\n<body>\n"
        + "\n".join(sections)
        + f'\n<p class="soft">pagedkv {__version__}. Simulated; see the assumptions.</p>\n<script>{_COPY}</script>\n'
        + "</body>\n</html>\n"
    )


def _section(anchor: str, title: str, body: str) -> str:
    return f'<section id="{anchor}">\n<h2>{escape(title)}</h2>\n{body}\n</section>'


def _figure(name: str, figure: Figure, caption: str) -> str:
    config = {"responsive": True, "displaylogo": False, "displayModeBar": False}
    body = to_html(
        figure,
        include_plotlyjs=False,
        include_mathjax=False,
        full_html=False,
        config=config,
        auto_play=False,
        div_id=f"figure-{name}",
    )
    return f"<figure>{body}<figcaption>{caption}</figcaption></figure>"


def _memory_over_time(results: Results) -> str:
    """Return the section of how memory fills from before the start on; empty where the host has a memory of its own."""
    scenario = results.scenario
    if not scenario.deployment.hardware.unified or scenario.model_serving is not None:
        return ""
    answer = budget_timeline(memory_request(scenario.config.serving))
    figure = _figure("timeline", memory_over_time(answer.timeline), escape(caption(answer.timeline)))
    items = "".join(f"<li><strong>{escape(p.title)}</strong>: {escape(p.verdict.text)}</li>" for p in troubles(answer.timeline))
    avoid = "" if answer.advice is None else f"<p>What avoids it: <code>{escape(' · '.join(answer.advice.settings))}</code></p>"
    notes = "".join(f"<p>{escape(note)}</p>" for note in answer.timeline.notes)
    return _section("timeline", "Memory over time", f"{figure}{f'<ul>{items}</ul>' if items else ''}{avoid}{notes}")


def _map(results: Results) -> str:
    """Return the section of the memory map, what paging is compared with beside it."""
    names = list(results.by_allocator)[:_MOST_MAPS]
    seed = results.scenario.config.measurement.seed
    panels = {name: frames_of(results.scenario, name, seed=seed, end_s=results.by_allocator[name].runs[0].end_s) for name in names}
    figure = memory_map(panels, most_cells=_MOST_CELLS)
    return _section("map", "The memory, block by block", _figure("map", figure, legend_text()))


def _latency(results: Results) -> str:
    return "".join(_figure(f"latency-{i}", f, caption) for i, (f, caption) in enumerate(figures.latency_cdfs(results)))


def _command(anchor: str, text: str) -> str:
    return (
        f'<div class="command"><code id="{anchor}">{escape(text)}</code>'
        f'<button type="button" data-copy="{anchor}" aria-label="Copy the command">Copy</button></div>'
    )


def _verdict(results: Results, document: dict[str, Any]) -> str:
    scenario = results.scenario
    items = "".join(
        f"<li><strong>{escape(c['allocator'])}</strong> {_badge(c['verdict']['status'])} {escape(c['verdict']['text'])}</li>"
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
        f"<ul>{items}{gains}</ul>\n<p>This run:</p>{_command('this-run', command_line(scenario.config))}\n"
        f"<p>Try next:</p>{_command('next-run', first['next_command'])}\n</section>"
    )


def _badge(status: str) -> str:
    return f'<span class="badge {status}">{status}</span>'


def _table(head: tuple[str, ...], body: str, *, kind: str = "") -> str:
    cells = "".join(f'<th scope="col">{escape(name)}</th>' if name else "<td></td>" for name in head)
    return f'<div class="scroll"><table class="{kind}"><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>'


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


def _comparison(document: dict[str, Any]) -> str:
    names = tuple(c["allocator"] for c in document["results"])
    body = []
    for row in comparison(document):
        if row.values:
            cells = "".join(f"<td>{escape(value)}</td>" for value in row.values)
            body.append(f'<tr><th scope="row" class="depth{row.depth}">{escape(row.label)}</th>{cells}</tr>')
        else:
            body.append(f'<tr class="heading"><th colspan="{len(names) + 1}">{escape(row.label)}</th></tr>')
    return _table(("", *names), "".join(body), kind="numbers")


def _assumptions(results: Results) -> str:
    scenario = results.scenario
    rows = [
        *machine_rows(scenario.deployment.hardware),
        (
            "weights",
            f"{scenario.deployment.weight_format.bits_per_weight:g} bits each",
            "spec",
            scenario.deployment.weight_format.source,
        ),
        ("model", f"{scenario.deployment.model.params_total:,} parameters", "spec", scenario.deployment.model.source),
        *code_rows(),
    ]
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    config = results.document()["config"]
    settings = " ".join(f"{name}={shlex.quote(str(value))}" for name, value in config.items() if value is not None)
    return (
        "<p>Tags: <em>spec</em>, a datasheet or a vendor's default; <em>measured</em>; <em>estimated</em>, by reasoning.</p>"
        + _table(("what", "value", "tag", "source"), body)
        + f"<p>All settings: <code>{escape(settings)}</code></p>"
    )


def _glossary() -> str:
    body = "".join(
        f'<tr><th scope="row">{escape(e.title)}</th><td><code>{escape(e.formula)}</code></td><td>{escape(e.meaning)}</td></tr>'
        for e in GLOSSARY.values()
    )
    table = _table(("word", "formula", "meaning"), body)
    return f"<p>E is the end of the run, W the end of the warm-up.</p>{table}"
