"""Markdown tables within a text, such as llama.cpp's benchmarks print between the lines of a log."""

from collections.abc import Iterator, Sequence


def cells_of(line: str) -> list[str]:
    """Return the cells of a line of a table; empty if it is none."""
    text = line.strip()
    return [cell.strip() for cell in text.strip("|").split("|")] if text.startswith("|") and text.count("|") > 2 else []


def table_rows(text: str, needed: Sequence[str]) -> Iterator[tuple[int, dict[str, str] | None]]:
    """Yield (line number, cells by column) of the rows of tables with the columns `needed`; None for a row of another width."""
    header: list[str] = []
    for number, line in enumerate(text.splitlines(), start=1):
        cells = cells_of(line)
        if not cells:
            header = []
        elif set(needed) <= set(cells):
            header = cells
        elif header and not all(set(cell) <= set("-: ") for cell in cells):
            yield number, dict(zip(header, cells, strict=True)) if len(cells) == len(header) else None


def has_table(text: str, needed: Sequence[str]) -> bool:
    """Return whether there is a table with the columns `needed`."""
    return any(set(needed) <= set(cells_of(line)) for line in text.splitlines() if line.lstrip().startswith("|"))
