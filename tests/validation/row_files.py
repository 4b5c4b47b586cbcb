"""Files of published rows, and what is at hand to write one."""

from pathlib import Path

from pagedkv.catalogue import load_hardware
from pagedkv.sims.validation.benchmark_rows import COLUMNS

SPARK = load_hardware("dgx-spark")
ROW = {
    "source": "me",
    "engine": "vLLM 0.33",
    "model": "llama-3.1-8b",
    "weight_dtype": "bf16",
    "batch": "1",
    "prompt_tokens": "2048",
    "context_depth": "0",
    "prefill_tok_s": "5000",
    "decode_tok_s": "13",
    "note": "tg128",
    "verified": "yes",
}


def csv_of(folder: Path, *rows: dict[str, str], drop: str = "") -> Path:
    columns = [column for column in COLUMNS if column != drop]
    lines = [",".join(columns), *(",".join((ROW | row)[column] for column in columns) for row in rows)]
    path = folder / "rows.csv"
    path.write_text("\n".join(lines) + "\n")
    return path
