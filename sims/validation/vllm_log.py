"""A real vLLM run as its log tells it: requests with their times, and what the server said every second."""

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pagedkv.arrays import Float64Array, Int64Array
from pagedkv.errors import ConfigError
from pagedkv.sims.prompt_content import PromptContent
from pagedkv.sims.traces import Trace

FILES = ("meta.json", "requests.jsonl", "timeseries.csv")
"""What a folder with a log holds."""
_REQUEST = ("arrival_s", "prompt_tokens", "output_tokens", "hash_ids", "scheduled_s", "first_token_s", "finish_s")
_SECOND = ("t", "prompt_throughput", "gen_throughput", "running", "waiting", "kv_cache_pct")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class VLLMLog:
    """One run."""

    folder: Path
    version: str
    """vLLM's, such as 0.19.0."""
    model: str
    """The Hugging Face id."""
    device: str
    """The GPU's name."""
    settings: Mapping[str, Any]
    """Arguments of the engine."""
    num_gpu_blocks: int
    """KV blocks that it had."""
    block_size: int
    enable_prefix_caching: bool
    trace: Trace
    """Its requests, with what their prompts are made of."""
    first_token_s: Float64Array
    """By request: when the first token came."""
    finish_s: Float64Array
    """By request: when the last one came."""
    seconds: Mapping[str, Float64Array]
    """By column of timeseries.csv: one value a second."""


def is_log(folder: Path) -> bool:
    """Return whether a folder holds a log."""
    return all((folder / name).is_file() for name in FILES)


def read_log(folder: Path) -> VLLMLog:
    """Return the run that a folder tells of.

    Raises:
        ConfigError: If a file is missing or lacks something, with what is needed.
    """
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise ConfigError(f"{folder}: no {' and no '.join(missing)}; a vLLM log is a folder with {', '.join(FILES)}")
    try:
        meta = json.loads((folder / FILES[0]).read_text(encoding="utf-8"))
        requests = [json.loads(line) for line in (folder / FILES[1]).read_text(encoding="utf-8").splitlines() if line.strip()]
        with (folder / FILES[2]).open(newline="", encoding="utf-8") as file:
            seconds = list(csv.DictReader(file))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder}: cannot be read as a vLLM log: {error}") from error
    for name, rows, keys in ((FILES[1], requests, _REQUEST), (FILES[2], seconds, _SECOND)):
        if not rows:
            raise ConfigError(f"{folder / name} is empty: needs lines with {', '.join(keys)}")
        lacking = [key for key in keys if key not in rows[0]]
        if lacking:
            raise ConfigError(f"{folder / name}: no {' and no '.join(lacking)}; needs {', '.join(keys)}")
    try:
        cache = meta["kv_cache"]
        return VLLMLog(
            folder=folder,
            version=str(meta["vllm_version"]),
            model=str(meta["model"]),
            device=str(meta["hardware"]["device_name"]),
            settings=meta["engine_kwargs"],
            num_gpu_blocks=int(cache["num_gpu_blocks"]),
            block_size=int(cache["block_size"]),
            enable_prefix_caching=bool(cache["enable_prefix_caching"]),
            trace=_trace(folder, requests, int(cache["block_size"])),
            first_token_s=np.array([request["first_token_s"] for request in requests], np.float64),
            finish_s=np.array([request["finish_s"] for request in requests], np.float64),
            seconds={key: np.array([float(row[key]) for row in seconds]) for key in _SECOND},
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{folder}: {error!r} in {FILES[0]} or a row: needs numbers, and vllm_version, model and kv_cache"
        ) from error


def _trace(folder: Path, requests: list[dict[str, Any]], block_size: int) -> Trace:
    """Return the requests as a trace whose prompts are told block by block; what is no full block is a prompt's own."""
    lengths = np.array([request["prompt_tokens"] for request in requests], np.int64)
    fresh = 1 + max((max(request["hash_ids"], default=-1) for request in requests), default=-1)
    ids: list[int] = []
    offsets = [0]
    for i, request in enumerate(requests):
        ids += request["hash_ids"]
        if len(request["hash_ids"]) * block_size < lengths[i]:
            ids.append(fresh + i)
        offsets.append(len(ids))
    every: Int64Array = np.array(ids, np.int64)
    return Trace(
        path=folder / FILES[1],
        format="vllm-log",
        arrival_s=np.array([request["arrival_s"] for request in requests], np.float64),
        prompt_tokens=lengths,
        output_tokens=np.array([request["output_tokens"] for request in requests], np.int64),
        line_numbers=np.arange(1, len(requests) + 1),
        content=PromptContent(ids=every, offsets=np.array(offsets, np.int64), tokens_per_id=block_size),
    )
