"""BurstGPT: what people and programs asked ChatGPT and GPT-4, `Timestamp` in seconds from the first day's midnight.

Source: https://github.com/HPMLL/BurstGPT (README, Schema; the files of v2.0 have a Session ID and an Elapsed time besides).
"""

from pathlib import Path
from typing import ClassVar

from pagedkv.sims.traces import TRACE_FORMATS
from pagedkv.sims.traces._csv_table import CsvTable
from pagedkv.sims.traces._head import Head
from pagedkv.sims.traces._rows import Rows, left_out, time_column, token_column

_COLUMNS = ("Timestamp", "Request tokens", "Response tokens")


@TRACE_FORMATS.register("burstgpt-csv")
class BurstGptCsv:
    """Requests to all models and of both log types; those that failed have 0 response tokens and are left out."""

    first_line: ClassVar[str] = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type (seconds)"

    @staticmethod
    def matches(head: Head) -> bool:
        """Return whether the header has the columns that are read."""
        return {name.lower() for name in _COLUMNS} <= head.csv_names

    @staticmethod
    def rows(path: Path, text: str) -> Rows:
        """Split the file; see `TraceFormat.rows`."""
        table = CsvTable.parse(path, text)
        time, prompt, output = (table.column([name]) for name in _COLUMNS)
        answered = [row for row, cell in enumerate(output.cells) if str(cell).strip() != "0"]
        return Rows(
            line_numbers=[table.line_numbers[row] for row in answered],
            prompt=token_column(prompt.name, [prompt.cells[row] for row in answered]),
            output=token_column(output.name, [output.cells[row] for row in answered]),
            arrival=time_column(time.name, [time.cells[row] for row in answered]),
            notes=left_out(len(output.cells) - len(answered), "failed request{s}"),
        )
