"""docs/validation.md: what stands between its marks is written from a validation; the rest of the page is by hand.

`python -m pagedkv.sims.validation.page ../shared/data docs` rewrites it, the pages of single rows and the pictures.
"""

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from pagedkv.sims.validation.checks import Section, Table
from pagedkv.sims.validation.run import Validation, validate

PAGE = "validation.md"
DETAILS = {
    "published_rows": ("validation/rows.md", "Every published row"),
    "served_loads": ("validation/loads.md", "Every served load"),
}
"""By section: the page of its tables of single rows, and its heading."""
_MARK = "<!-- simulate validate --sections {name} -->\n"
_END = "<!-- end -->\n"


def rewritten(page: str, sections: Mapping[str, Section]) -> str:
    """Return the page with the text of these sections between their marks.

    Raises:
        ValueError: If a section has no marks in the page.
    """
    for name, section in sections.items():
        mark = _MARK.format(name=name)
        if mark not in page:
            raise ValueError(f"{PAGE} has no line {mark!r}")
        before, _, rest = page.partition(mark)
        _, _, after = rest.partition(_END)
        page = before + mark + markdown(section) + _END + after
    return page


def between_marks(page: str, name: str) -> str:
    """Return what a page says of a section."""
    _, _, rest = page.partition(_MARK.format(name=name))
    return rest.partition(_END)[0]


def markdown(section: Section) -> str:
    """Return a section as the page shows it: bars, notes, tables but for those of single rows."""
    lines = ["", f"{section.source}.", "", "| compared | published | simulated | bar | |", "|---|---|---|---|---|"]
    for check in section.checks:
        outcome = f"**{check.outcome}**" if check.outcome == "fails" else check.outcome
        why = f": {check.why}" if check.why else ""
        lines.append(f"| {check.what} | {check.measured} | {check.simulated} | {check.bar} | {outcome}{why} |")
    lines += ["", *(f"* {note}" for note in section.notes)] if section.notes else []
    for table in section.tables:
        if not table.detail:
            lines += ["", f"{table.title}:", "", *_table(table)]
    for name in section.pictures:
        lines += ["", f"![{name.removesuffix('.svg').replace('-', ' ')}](validation/{name})"]
    return "\n".join([*lines, "", ""])


def details_page(section: Section) -> str:
    """Return the page of a section's tables of single rows."""
    written = "Written by `python -m pagedkv.sims.validation.page`; [validation.md](../validation.md) says what it means."
    lines = [f"# {DETAILS[section.name][1]}", "", written, ""]
    for table in section.tables:
        if table.detail:
            lines += [f"{table.title}:", "", *_table(table), ""]
    return "\n".join(lines)


def _table(table: Table) -> Iterator[str]:
    yield f"| {' | '.join(table.header)} |"
    yield f"|{'---|' * len(table.header)}"
    for row in table.rows:
        yield f"| {' | '.join(row)} |"


def write(validation: Validation, docs: Path) -> None:
    """Rewrite the page, the page of rows and the pictures in the folder `docs`."""
    sections = {section.name: section for section in validation.sections if not section.skipped}
    page = docs / PAGE
    page.write_text(rewritten(page.read_text(encoding="utf-8"), sections), encoding="utf-8")
    for section in sections.values():
        for name, picture in section.pictures.items():
            (docs / "validation" / name).write_text(picture, encoding="utf-8")
    for name in DETAILS.keys() & sections.keys():
        (docs / DETAILS[name][0]).write_text(details_page(sections[name]), encoding="utf-8")


def main() -> None:
    """Write the pages."""
    if len(sys.argv) != 3:
        sys.exit("usage: python -m pagedkv.sims.validation.page DATA DOCS")
    write(validate(Path(sys.argv[1])), Path(sys.argv[2]))


if __name__ == "__main__":
    main()
