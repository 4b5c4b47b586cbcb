"""The sections of report.html that are tables."""

import shlex
from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from pagedkv.errors import ConfigError
from pagedkv.sims.assumptions import Row, code_rows, fitted_rows, machine_rows
from pagedkv.sims.comparison import comparison
from pagedkv.sims.error_interval import calibration_lines
from pagedkv.sims.glossary import GLOSSARY, explain
from pagedkv.sims.reporting.page import badge, table
from pagedkv.sims.results import Results
from pagedkv.weight_format import WeightFormat


def comparison_table(document: dict[str, Any]) -> str:
    """Return every figure of every allocator, each with a link to what it means."""
    names = tuple(c["allocator"] for c in document["results"])
    body = []
    for row in comparison(document):
        if row.values:
            cells = "".join(f"<td>{escape(value)}</td>" for value in row.values)
            body.append(f'<tr><th scope="row" class="depth{row.depth}">{_explained(row.label)}</th>{cells}</tr>')
        else:
            heading = f'<th scope="rowgroup" colspan="{len(names) + 1}">{_explained(row.label)}</th>'
            body.append(f'<tr class="heading">{heading}</tr>')
    return table(("", *names), "".join(body), kind="numbers", label="Figures by allocator")


def _explained(label: str) -> str:
    try:
        return f'<a href="#word-{explain(label).name}">{escape(label)}</a>'
    except ConfigError:
        return escape(label)


def assumptions_table(results: Results) -> str:
    """Return how well step times are known, every number that the answer rests on with its tag and source, and all settings."""
    document = results.document()
    tags = ", ".join(
        f"{badge(tag)} {text}"
        for tag, text in (
            ("spec", "a datasheet or a vendor's default"),
            ("measured", "on the machine, or on requests"),
            ("estimated", "by reasoning"),
        )
    )
    body = "".join(
        f'<tr><th scope="row">{escape(what)}</th><td>{escape(value)}</td><td>{badge(tag)}</td><td>{escape(source)}</td></tr>'
        for what, value, tag, source in _rows(results)
    )
    settings = " ".join(f"{name}={shlex.quote(str(value))}" for name, value in document["config"].items() if value is not None)
    return (
        f"{uncertainty(document)}<h3>Every number behind it</h3><p>Tags: {tags}.</p>"
        + table(("what", "value", "tag", "source"), body, kind="sources", label="Numbers with tags and sources")
        + f"<h3>All settings</h3><p><code>{escape(settings)}</code></p>"
    )


def uncertainty(document: dict[str, Any]) -> str:
    """Return how far the figures may be off because step times are."""
    first, *rest = calibration_lines(document)
    status = document["calibration"]["status"]
    mark = badge(status, "validated" if status == "validated" else "unvalidated")
    lines = "".join(f"<li>{escape(line)}</li>" for line in rest)
    return (
        f"<h3>How sure this is</h3><p>{mark} {escape(first)}</p><ul>{lines}</ul>"
        "<p>Block counts, waste and who waits for memory follow from the allocator itself; these factors are about time. "
        "Measurements of your own machine narrow them: <code>simulate calibrate</code>.</p>"
    )


def _rows(results: Results) -> Iterator[Row]:
    scenario = results.scenario
    yield from machine_rows(scenario.deployment.hardware)
    for each in _once([deployment.weight_format for deployment in scenario.deployments]):
        yield f"weights, {each.name}", f"{each.bits_per_weight:g} bits each", "spec", each.source
    for deployment in scenario.deployments:
        yield f"model, {deployment.model.title}", f"{deployment.model.params_total:,} parameters", "spec", deployment.model.source
    basis = scenario.deployment.calibration.basis.partition(":")[0]
    yield from (row for row in fitted_rows() if row[0].startswith(basis))
    yield from code_rows()


def _once(formats: Sequence[WeightFormat]) -> list[WeightFormat]:
    return list({each.name: each for each in formats}.values())


def glossary_table() -> str:
    """Return every word with its formula."""
    body = "".join(
        f'<tr id="word-{e.name}"><th scope="row">{escape(e.title)}</th><td><code>{escape(e.formula)}</code></td>'
        f"<td>{escape(e.meaning)}</td></tr>"
        for e in GLOSSARY.values()
    )
    words = table(("word", "formula", "meaning"), body, kind="sources", label="Words with their formulas")
    return f"<p>E is the end of the run, W the end of the warm-up.</p>{words}"
