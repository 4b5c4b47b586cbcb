"""What `llama-bench` prints: a Markdown table with a row per test. Source: llama.cpp, tools/llama-bench."""

import re
from pathlib import Path
from typing import ClassVar

from pagedkv.errors import ConfigError
from pagedkv.sims.measurements import MEASUREMENT_FORMATS, Claims, Measurements, positive, whole
from pagedkv.sims.measurements._llama_cpp import rate_of_test, test_lengths, weights_of
from pagedkv.sims.measurements._tables import has_table, table_rows

_COLUMNS = ("model", "test", "t/s")
_PARAMS = re.compile(r"([0-9.]+)\s*([BM])")


@MEASUREMENT_FORMATS.register("llama-bench-table")
class LlamaBenchTable:
    """The table, with whatever the log says around it; of t/s "81.2 ± 0.3" the mean."""

    looks_like: ClassVar[str] = "llama-bench's table: | model | size | params | backend | ngl | test | t/s |"

    @staticmethod
    def matches(text: str) -> bool:
        """Return whether such a table is in the text."""
        return has_table(text, _COLUMNS)

    @staticmethod
    def read(path: Path, text: str) -> Measurements:
        """Return the rates of the table."""
        rates, models, params = [], [], []
        for line, row in table_rows(text, _COLUMNS):
            where = f"{path}, line {line}"
            if row is None:
                raise ConfigError(f"{where}: another number of cells than the table's header")
            prompt, output, depth = test_lengths(row["test"], where)
            rate = positive(row["t/s"].partition("±")[0].strip(), where, "t/s", "tokens a second, such as 81.25 ± 0.30")
            chunk = whole(row["n_ubatch"], where, "n_ubatch", least=1) if row.get("n_ubatch") else None
            rates.append(rate_of_test(where, prompt=prompt, output=output, depth=depth, tokens_per_s=rate, chunk=chunk))
            models.append(row["model"])
            if match := _PARAMS.fullmatch(row.get("params", "")):
                params.append(float(match[1]) * (1e9 if match[2] == "B" else 1e6))
        if not rates:
            raise ConfigError(f"{path}: the table of llama-bench has no rows")
        if len(set(models)) > 1:
            raise ConfigError(f"{path}: rows of {' and '.join(sorted(set(models)))}; give one model at a time, with its --model")
        return Measurements(
            path=path,
            format="llama-bench-table",
            rates=tuple(rates),
            claims=Claims(
                engine="llama-cpp", model=models[0], num_params=params[0] if params else None, weights=weights_of(models[0])
            ),
        )
