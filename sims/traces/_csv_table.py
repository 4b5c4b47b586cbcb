"""CSV files with a header, for the formats that are CSV."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pagedkv.errors import TraceFormatError
from pagedkv.sims.traces._rows import NEEDED_TOKENS, Column, Parser, parse_seconds, parse_tokens, shown


@dataclass(frozen=True, slots=True, kw_only=True)
class CsvTable:
    """A CSV file with a header, all rows as wide as it."""

    path: Path
    """The file, for messages."""
    header: Sequence[str]
    """Column names as written."""
    header_line: int
    """Line of the header, from 1."""
    line_numbers: Sequence[int]
    """Last line of each row, from 1."""
    cells: Sequence[Sequence[str]]
    """Rows of cells."""

    @classmethod
    def parse(cls, path: Path, text: str) -> "CsvTable":
        """Split `text`, skipping blank lines; raises TraceFormatError for a row of another width than the header."""
        lines: list[int] = []
        cells: list[list[str]] = []
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        try:
            for row in reader:
                if not row or (len(row) == 1 and not row[0].strip()):
                    continue
                if cells and len(row) != len(cells[0]):
                    raise TraceFormatError(
                        f"{path}, line {reader.line_num}: {len(row)} columns where the header has {len(cells[0])}, "
                        f"{shown(','.join(cells[0]))}"
                    )
                cells.append(row)
                lines.append(reader.line_num)
        except csv.Error as error:
            raise TraceFormatError(f"{path}, line {reader.line_num}: not CSV ({error})") from error
        if not cells:
            raise TraceFormatError(f"{path}: no requests in it")
        header = [name.strip() for name in cells[0]]
        return cls(path=path, header=header, header_line=lines[0], line_numbers=lines[1:], cells=cells[1:])

    def find(self, names: Sequence[str]) -> int | None:
        """Return the index of the column that has one of `names`, in any case, or None; raises TraceFormatError if several have.

        A column without a number, such as the text of prompts, does not count beside one with numbers.
        """
        lowered = {name.lower() for name in names}
        found = [index for index, name in enumerate(self.header) if name.lower() in lowered]
        if len(found) > 1:
            found = [i for i in found if any(parse_seconds(row[i]) is not None for row in self.cells)] or found
        if len(found) > 1:
            same = " and ".join(repr(self.header[index]) for index in found)
            raise TraceFormatError(
                f"{self.path}, line {self.header_line}: the columns {same} say the same thing, so which is meant is not clear: "
                "remove all but one, or give the others names of your own"
            )
        return found[0] if found else None

    def column(self, names: Sequence[str], *, parse: Parser = parse_tokens, needed: str = NEEDED_TOKENS) -> Column:
        """Return the column that has one of `names`; raises TraceFormatError if there is none, or several."""
        index = self.find(names)
        if index is None:
            header = shown(",".join(self.header))
            raise TraceFormatError(f"{self.path}, line {self.header_line}: no column {' or '.join(names)} in the header {header}")
        return Column(name=self.header[index], cells=[row[index] for row in self.cells], parse=parse, needed=needed)
