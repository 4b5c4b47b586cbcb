"""The result document of a run on a real clock: the schema of `simulate`, as far as a real run has it."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from pagedkv.scheduling.scheduler_settings import SchedulerSettings
from pagedkv.sims.export import prepare_folder, run_files, to_json, write_atomically
from pagedkv.sims.generate_config import GenerateConfig
from pagedkv.sims.metrics import measure
from pagedkv.sims.real_load import Answer
from pagedkv.sims.results import SCHEMA_VERSION, combine
from pagedkv.sims.simulation import Run


class Served(NamedTuple):
    """What ran, and on what."""

    model: str
    """Its type or name."""
    hardware: str
    """The device."""
    num_blocks: int
    """Of the pool."""
    block_bytes: int
    """Bytes of one."""
    kv_bytes_per_token: int
    """Bytes of a token's keys and values in all layers."""
    scheduler: SchedulerSettings
    """Limits of a step."""
    weight_bytes: int
    """Bytes of the model's parameters."""


def real_document(config: GenerateConfig, served: Served, run: Run) -> dict[str, Any]:
    """Return the result document: JSON types only, no data is None. There is no verdict: nobody asked whether it could be more."""
    asked = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(config).items()}
    limits = {name: getattr(served.scheduler, name) for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens")}
    return {
        "schema_version": SCHEMA_VERSION,
        "config": asked | limits | {"enable_prefix_caching": run.recorder.caches_prefixes, "goodput": []},
        "budget": {
            "weights": served.weight_bytes,
            "kv_cache": served.num_blocks * served.block_bytes,
            "num_blocks": served.num_blocks,
            "block_size": config.block_size,
            "kv_bytes_per_token": served.kv_bytes_per_token,
        },
        "results": [
            {
                "allocator": run.allocator.name,
                "placement": run.allocator.placement,
                "engine": "pagedkv",
                "model": served.model,
                "hardware": served.hardware,
                **combine([measure(run, ())]),
                "verdict": None,
            }
        ],
    }


def write_real(folder: Path, document: dict[str, Any], run: Run, answers: Sequence[tuple[Answer, str | None]]) -> None:
    """Write summary.json, requests.csv, timeline.csv and answers.jsonl to `folder`, each whole or not at all.

    Raises:
        ConfigError: If it cannot be written.
    """
    lines = [
        json.dumps(
            {"prompt": answer.prompt, "index": answer.index, "text": text, "tokens": answer.tokens}
            | {"finish_reason": answer.finish_reason}
            | ({} if answer.score is None else {"score": answer.score})
        )
        for answer, text in answers
    ]
    files = run_files({run.allocator.name: [run]}) | {
        "summary.json": to_json(document),
        "answers.jsonl": "".join(f"{line}\n" for line in lines),
    }
    prepare_folder(folder)
    for name, text in files.items():
        write_atomically(folder / name, text)
