"""Rows of a CSV with the columns of published rows, one model each: what `simulate validate --data` takes."""

from pathlib import Path
from typing import ClassVar

from pagedkv.sims.measurements import MEASUREMENT_FORMATS, Measurements
from pagedkv.sims.traces._head import Head
from pagedkv.sims.validation.benchmark_rows import COLUMNS, read_rows


@MEASUREMENT_FORMATS.register("benchmark-csv")
class BenchmarkCsv:
    """See docs/validation.md for the columns."""

    looks_like: ClassVar[str] = f"a CSV with the columns {','.join(COLUMNS)}"

    @staticmethod
    def matches(text: str) -> bool:
        """Return whether the header names rates; a column that is missing is named by reading."""
        names = Head.of(text).csv_names
        return not names.isdisjoint(("prefill_tok_s", "decode_tok_s"))

    @staticmethod
    def read(path: Path, text: str) -> Measurements:
        """Return the rows."""
        del text
        return Measurements(path=path, format="benchmark-csv", rows=tuple(read_rows(path)))
