"""What `llama-bench -o json`, `-o jsonl` or `-o csv` prints: a record per test. Source: llama.cpp, tools/llama-bench."""

import csv
import io
from pathlib import Path
from typing import Any, ClassVar

from pagedkv.errors import ConfigError
from pagedkv.sims.measurements import MEASUREMENT_FORMATS, Claims, Measurements, positive, whole
from pagedkv.sims.measurements._llama_cpp import rate_of_test, weights_of
from pagedkv.sims.traces._head import Head
from pagedkv.sims.traces._json_text import json_documents

_NEEDED = frozenset(("n_prompt", "n_gen", "avg_ts"))
_KV_TYPES = {"f16", "bf16"}


@MEASUREMENT_FORMATS.register("llama-bench-records")
class LlamaBenchRecords:
    """Records with n_prompt, n_gen and avg_ts; n_depth and n_ubatch where they say so."""

    looks_like: ClassVar[str] = 'llama-bench -o json, jsonl or csv: {"model_type": ..., "n_prompt": 512, "n_gen": 0, "avg_ts": ...}'

    @staticmethod
    def matches(text: str) -> bool:
        """Return whether the first record, or the header, has n_prompt and avg_ts."""
        head = Head.of(text)
        return {"n_prompt", "avg_ts"} <= (head.keys if head.keys else head.csv_names)

    @staticmethod
    def read(path: Path, text: str) -> Measurements:
        """Return the rates of the records."""
        records = _records(path, text)
        rates = []
        for number, record in enumerate(records, start=1):
            where = f"{path}, record {number}"
            if missing := [name for name in sorted(_NEEDED) if record.get(name) is None]:
                raise ConfigError(f"{where}: no {' and no '.join(missing)}; llama-bench writes n_prompt, n_gen and avg_ts")
            for name in ("type_k", "type_v"):
                if str(record.get(name, "f16")) not in _KV_TYPES:
                    raise ConfigError(
                        f"{where}: {name} is {record[name]!r}: a KV cache of another type needs --kv-cache-dtype; not read"
                    )
            rates.append(
                rate_of_test(
                    where,
                    prompt=whole(record["n_prompt"], where, "n_prompt"),
                    output=whole(record["n_gen"], where, "n_gen"),
                    depth=whole(record.get("n_depth") or 0, where, "n_depth"),
                    tokens_per_s=positive(record["avg_ts"], where, "avg_ts", "tokens a second"),
                    chunk=None if record.get("n_ubatch") is None else whole(record["n_ubatch"], where, "n_ubatch", least=1),
                )
            )
        models = sorted({str(record.get("model_type") or record.get("model_filename") or "") for record in records})
        if len(models) > 1:
            raise ConfigError(f"{path}: records of {' and '.join(models)}; give one model at a time, with its --model")
        params = records[0].get("model_n_params")
        return Measurements(
            path=path,
            format="llama-bench-records",
            rates=tuple(rates),
            claims=Claims(
                engine="llama-cpp",
                model=models[0] or None,
                num_params=None if params is None else positive(params, f"{path}, record 1", "model_n_params"),
                weights=weights_of(models[0]),
            ),
        )


def _records(path: Path, text: str) -> list[dict[str, Any]]:
    if not text.lstrip().startswith(("[", "{")):
        return [dict(row) for row in csv.DictReader(io.StringIO(text))]
    found: list[Any] = []
    for _, document in json_documents(path, text):
        found += document if isinstance(document, list) else [document]
    if not found or not all(isinstance(record, dict) for record in found):
        raise ConfigError(f"{path}: needs objects with n_prompt, n_gen and avg_ts, as llama-bench writes them")
    return found
