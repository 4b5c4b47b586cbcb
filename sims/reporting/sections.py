"""The sections of report.html that are tables."""

import shlex
from html import escape
from typing import Any

from pagedkv.sims.assumptions import code_rows, machine_rows
from pagedkv.sims.comparison import comparison
from pagedkv.sims.glossary import GLOSSARY
from pagedkv.sims.reporting.page import table
from pagedkv.sims.results import Results


def comparison_table(document: dict[str, Any]) -> str:
    """Return every figure of every allocator."""
    names = tuple(c["allocator"] for c in document["results"])
    body = []
    for row in comparison(document):
        if row.values:
            cells = "".join(f"<td>{escape(value)}</td>" for value in row.values)
            body.append(f'<tr><th scope="row" class="depth{row.depth}">{escape(row.label)}</th>{cells}</tr>')
        else:
            body.append(f'<tr class="heading"><th colspan="{len(names) + 1}">{escape(row.label)}</th></tr>')
    return table(("", *names), "".join(body), kind="numbers")


def assumptions_table(results: Results) -> str:
    """Return every number that the answer rests on, with its source, and all settings."""
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
        + table(("what", "value", "tag", "source"), body)
        + f"<p>All settings: <code>{escape(settings)}</code></p>"
    )


def glossary_table() -> str:
    """Return every word with its formula."""
    body = "".join(
        f'<tr><th scope="row">{escape(e.title)}</th><td><code>{escape(e.formula)}</code></td><td>{escape(e.meaning)}</td></tr>'
        for e in GLOSSARY.values()
    )
    words = table(("word", "formula", "meaning"), body)
    return f"<p>E is the end of the run, W the end of the warm-up.</p>{words}"
