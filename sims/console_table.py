"""The one look of tables in the terminal."""

from collections.abc import Collection

from rich.table import Table


def plain_table(*headers: str, left: Collection[int] = (0,), no_wrap: bool = True) -> Table:
    """Return a table without lines. Columns are right-aligned, but for those numbered in `left`."""
    table = Table(box=None, padding=(0, 1), pad_edge=False, header_style="bold")
    for i, header in enumerate(headers):
        table.add_column(header, justify="left" if i in left else "right", no_wrap=no_wrap)
    return table
