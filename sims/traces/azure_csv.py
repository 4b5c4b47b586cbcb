"""The Azure LLM inference traces: `TIMESTAMP,ContextTokens,GeneratedTokens` with dates.

Source: https://github.com/Azure/AzurePublicDataset (AzureLLMInferenceTrace, 2023 and 2024).
"""

from pathlib import Path
from typing import ClassVar

from pagedkv.sims.traces import TRACE_FORMATS
from pagedkv.sims.traces._csv_table import CsvTable
from pagedkv.sims.traces._head import Head
from pagedkv.sims.traces._rows import NEEDED_DATE, Rows, parse_date


@TRACE_FORMATS.register("azure-csv")
class AzureCsv:
    """Dates in ISO 8601; without an offset (2023) they count as UTC, like those with `+00:00` (2024)."""

    first_line: ClassVar[str] = "TIMESTAMP,ContextTokens,GeneratedTokens"

    @staticmethod
    def matches(head: Head) -> bool:
        """Return whether all three columns are in the header."""
        return {"timestamp", "contexttokens", "generatedtokens"} <= head.csv_names

    @staticmethod
    def rows(path: Path, text: str) -> Rows:
        """Split the file; see `TraceFormat.rows`."""
        table = CsvTable.parse(path, text)
        return Rows(
            line_numbers=table.line_numbers,
            prompt=table.column(["ContextTokens"]),
            output=table.column(["GeneratedTokens"]),
            arrival=table.column(["TIMESTAMP"], parse=parse_date, needed=NEEDED_DATE),
        )
