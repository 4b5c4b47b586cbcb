"""What `llama-batched-bench` prints, as a table or with `--output-format jsonl`. Source: llama.cpp, tools/batched-bench."""

import re
from pathlib import Path
from typing import Any, ClassVar

from pagedkv.errors import ConfigError
from pagedkv.sims.measurements import MEASUREMENT_FORMATS, Claims, MeasuredRate, Measurements, positive, whole
from pagedkv.sims.measurements._tables import has_table, table_rows
from pagedkv.sims.traces._head import Head
from pagedkv.sims.traces._json_text import json_documents

_COLUMNS = ("PP", "TG", "B", "S_PP t/s", "S_TG t/s")
_KEYS = ("pp", "tg", "pl", "speed_pp", "speed_tg")
_UBATCH = re.compile(r"n_ubatch = (\d+)")
_SHARED = re.compile(r"is_pp_shared = (\d)")


@MEASUREMENT_FORMATS.register("llama-batched-bench")
class LlamaBatchedBench:
    """Each row is a prefill of all prompts, and decoding behind them."""

    looks_like: ClassVar[str] = "llama-batched-bench: | PP | TG | B | N_KV | T_PP s | S_PP t/s | T_TG s | S_TG t/s | ..., or jsonl"

    @staticmethod
    def matches(text: str) -> bool:
        """Return whether such a table is in the text, or the first record has its keys."""
        return has_table(text, _COLUMNS) or set(_KEYS) <= Head.of(text).keys

    @staticmethod
    def read(path: Path, text: str) -> Measurements:
        """Return the rates of the rows."""
        rates: list[MeasuredRate] = []
        for where, row in _rows(path, text):
            prompt, output = (whole(row[name], where, name, least=1) for name in ("PP", "TG"))
            batch = whole(row["B"], where, "B", least=1)
            shared = row.get("shared", 0)
            rates.append(
                MeasuredRate(
                    where=f"{where}, S_PP",
                    kind="prefill",
                    batch=1 if shared else batch,
                    prompt_tokens=prompt,
                    tokens_per_s=positive(row["S_PP t/s"], where, "S_PP t/s", "tokens a second"),
                    chunk_tokens=row.get("n_ubatch"),
                )
            )
            rates.append(
                MeasuredRate(
                    where=f"{where}, S_TG",
                    kind="decode",
                    batch=batch,
                    depth=prompt + output // 2,
                    tokens_per_s=positive(row["S_TG t/s"], where, "S_TG t/s", "tokens a second"),
                )
            )
        if not rates:
            raise ConfigError(f"{path}: the table of llama-batched-bench has no rows")
        return Measurements(path=path, format="llama-batched-bench", rates=tuple(rates), claims=Claims(engine="llama-cpp"))


def _rows(path: Path, text: str) -> list[tuple[str, dict[str, Any]]]:
    """Return (where, cells) with the table's names for columns, whichever form they come in."""
    found: list[tuple[str, dict[str, Any]]] = []
    if has_table(text, _COLUMNS):
        ubatch, shared = _UBATCH.search(text), _SHARED.search(text)
        more = {"n_ubatch": int(ubatch[1])} if ubatch else {}
        more |= {"shared": int(shared[1])} if shared else {}
        for line, row in table_rows(text, _COLUMNS):
            if row is None:
                raise ConfigError(f"{path}, line {line}: another number of cells than the table's header")
            found.append((f"{path}, line {line}", row | more))
        return found
    for line, record in json_documents(path, text):
        where = f"{path}, line {line}"
        if not isinstance(record, dict) or (missing := [key for key in _KEYS if key not in record]):
            lacking = " and no ".join(missing) if isinstance(record, dict) else "object"
            raise ConfigError(f"{where}: no {lacking}; llama-batched-bench writes {', '.join(_KEYS)}")
        values: dict[str, Any] = {name: record[key] for name, key in zip(_COLUMNS, _KEYS, strict=True)}
        values |= {"n_ubatch": record.get("n_ubatch"), "shared": record.get("is_pp_shared", 0)}
        found.append((where, values))
    return found
