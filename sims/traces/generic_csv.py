"""Any CSV whose header names an arrival, a prompt length and an output length in one of the usual ways."""

from pathlib import Path
from typing import ClassVar

from pagedkv.sims.traces import TRACE_FORMATS
from pagedkv.sims.traces._csv_table import CsvTable
from pagedkv.sims.traces._head import Head
from pagedkv.sims.traces._names import ARRIVAL_MS, ARRIVAL_S, MOONCAKE, OUTPUT, PROMPT, TIME
from pagedkv.sims.traces._rows import Column, Rows, arrival_column, parse_date

_SHOWN = 5
"""Names of lengths that messages give."""
_UNCLEAR = (
    "timestamp beside input_length and output_length is in milliseconds in Mooncake's traces and in seconds elsewhere: name the "
    "column timestamp_ms or timestamp_s; as it is there is no arrival column"
)


@TRACE_FORMATS.register("generic-csv")
class GenericCsv:
    """Column names in any case and order; of several that fit, none is guessed. Other columns are not read."""

    first_line: ClassVar[str] = (
        f"a CSV header with a column {' | '.join((*ARRIVAL_S, *TIME))} (seconds, or dates) or "
        f"{' | '.join(ARRIVAL_MS)} (milliseconds), "
        f"one of {' | '.join(PROMPT[:_SHOWN])} | ..., and one of {' | '.join(OUTPUT[:_SHOWN])} | ..."
    )

    @staticmethod
    def matches(head: Head) -> bool:
        """Return whether the header names both lengths; a file of lengths has no arrival column."""
        return not head.csv_names.isdisjoint(PROMPT) and not head.csv_names.isdisjoint(OUTPUT)

    @staticmethod
    def rows(path: Path, text: str) -> Rows:
        """Split the file; see `TraceFormat.rows`."""
        table = CsvTable.parse(path, text)
        prompt, output = table.column(PROMPT), table.column(OUTPUT)
        arrival = _arrival(table)
        unclear = arrival is not None and (arrival.name.lower(), prompt.name.lower(), output.name.lower()) == MOONCAKE
        if unclear and arrival is not None and arrival.parse is not parse_date:
            return Rows(line_numbers=table.line_numbers, prompt=prompt, output=output, arrival=None, no_arrival=_UNCLEAR)
        return Rows(line_numbers=table.line_numbers, prompt=prompt, output=output, arrival=arrival)


def _arrival(table: CsvTable) -> Column | None:
    """Return the column of arrivals, None if there is none; raises TraceFormatError if there are several."""
    table.find((*ARRIVAL_S, *ARRIVAL_MS))  # refuses both at once
    for names, unit_s in ((ARRIVAL_S, 1.0), (ARRIVAL_MS, 1e-3), (TIME, 1.0)):
        if table.find(names) is not None:
            column = table.column(names)
            return arrival_column(column.name, column.cells, unit_s=unit_s)
    return None
