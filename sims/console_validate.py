"""`simulate validate` in the terminal: bars, then what they are made of."""

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from pagedkv.sims.validation.checks import Section, Table
from pagedkv.sims.validation.run import Validation

_WORDS = 4
"""Columns that are words, and so to the left."""
_STYLES = {"holds": "green", "fails": "red", "no bar": "dim"}


def show_validation(validation: Validation, console: Console, *, rows: bool) -> None:
    """Print every section; `rows`: with the tables of single rows."""
    show_sections(validation.sections, console, rows=rows)


def show_sections(sections: Sequence[Section], console: Console, *, rows: bool) -> None:
    """Print sections, which bars were missed in them, and which sections that says nothing about."""
    for section in sections:
        _show(section, console, rows=rows)
    left = [section for section in sections if section.skipped]
    of = f"{len(sections)} section{'s' if len(sections) > 1 else ''}"
    failed = [(section, check) for section in sections for check in section.checks if check.outcome == "fails"]
    if failed:
        console.print(Text(f"{len(failed)} bar{'s' if len(failed) > 1 else ''} missed:", "bold red"))
        for section, check in failed:
            console.print(f"  {section.name}: {check.what}: {check.simulated}, {check.bar}", soft_wrap=True, markup=False)
    elif any(check.outcome == "holds" for section in sections for check in section.checks):
        whole = f"of {len(sections) - len(left)} of {of} " if left else ""
        console.print(Text(f"All bars {whole}hold.", "bold green"))
    else:
        console.print(Text("No bar was checked.", "bold yellow"))
    if left:
        names = ", ".join(section.name for section in left)
        console.print(Text(f"Not checked: {len(left)} of {of}, for want of data: {names}.", "yellow"), soft_wrap=True)


def _show(section: Section, console: Console, *, rows: bool) -> None:
    console.print(Text(section.title, "bold"))
    if section.skipped:
        console.print(Text(f"  skipped: {section.skipped}\n", "yellow"))
        return
    console.print(Text(section.source, "dim"), soft_wrap=True)
    for check in section.checks:
        values = " against ".join(value for value in (check.simulated, check.measured) if value)
        bar = f", {check.bar}" if check.bar else ""
        why = f" ({check.why})" if check.why else ""
        console.print(
            Text.assemble("  ", (f"{check.outcome:6}", _STYLES[check.outcome]), f"  {check.what}: {values}{bar}{why}"),
            soft_wrap=True,
        )
    for note in section.notes:
        console.print(Text(f"  {note}"), soft_wrap=True)
    for table in section.tables:
        if rows or not table.detail:
            console.print()
            _print(table, console)
    console.print()


def _print(table: Table, console: Console) -> None:
    """Print a table as wide as it is: rows are read as lines, and cut cells would hide what they are about."""
    console.print(Text(table.title, "bold"), soft_wrap=True)
    lines = [table.header, *table.rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(table.header))]
    for n, line in enumerate(lines):
        text = "  ".join(
            cell.ljust(width) if i < _WORDS or i == len(widths) - 1 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        console.print(Text(text.rstrip(), "bold" if n == 0 else ""), soft_wrap=True)
