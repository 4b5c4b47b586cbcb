"""Any CSV whose header names an arrival, a prompt length and an output length in one of the usual ways."""

from pathlib import Path
from typing import ClassVar

from pagedkv.sims.traces import TRACE_FORMATS
from pagedkv.sims.traces._csv_table import CsvTable
from pagedkv.sims.traces._head import Head
from pagedkv.sims.traces._names import ARRIVAL_MS, ARRIVAL_S, OUTPUT, PROMPT
from pagedkv.sims.traces._rows import Rows, time_column


@TRACE_FORMATS.register("generic-csv")
class GenericCsv:
    """Column names in any case and order; of several that fit, none is guessed. Other columns are not read."""

    first_line: ClassVar[str] = (
        f"a CSV header with a column {' | '.join(ARRIVAL_S)} (seconds) or {' | '.join(ARRIVAL_MS)} (milliseconds), "
        f"one of {' | '.join(PROMPT)}, and one of {' | '.join(OUTPUT)}"
    )

    @staticmethod
    def matches(head: Head) -> bool:
        """Return whether the header names both lengths; a file of lengths has no arrival column."""
        return not head.csv_names.isdisjoint(PROMPT) and not head.csv_names.isdisjoint(OUTPUT)

    @staticmethod
    def rows(path: Path, text: str) -> Rows:
        """Split the file; see `TraceFormat.rows`."""
        table = CsvTable.parse(path, text)
        arrival = None
        table.find((*ARRIVAL_S, *ARRIVAL_MS))  # refuses both at once
        for names, unit_s in ((ARRIVAL_S, 1.0), (ARRIVAL_MS, 1e-3)):
            if arrival is None and table.find(names) is not None:
                column = table.column(names)
                arrival = time_column(column.name, column.cells, unit_s=unit_s)
        return Rows(line_numbers=table.line_numbers, prompt=table.column(PROMPT), output=table.column(OUTPUT), arrival=arrival)
