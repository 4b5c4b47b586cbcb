"""Loads that were served by vLLM on a DGX Spark and measured by `vllm bench serve`, and the requests that it sent.

Random prompts and their arrivals are drawn here as that benchmark draws them from its seed, so that what is simulated is, request
by request, what was measured: the totals of their tokens are the published ones.
"""

import csv
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pagedkv.arrays import Float64Array, Int64Array
from pagedkv.sims.length_names import load_lengths
from pagedkv.sims.traces import Trace

FILE = Path(__file__).with_name("served_loads.csv")
"""Source: Django de Vreng, github.com/djangodevreng/dgx-spark-benchmarks, August and September 2026 (CC BY 4.0); `source` is the
path of a result there. Runs with speculation and models that pagedkv does not know are left out."""
SEED = 42
"""Of all runs: benchmark-suite.json of that repository."""
RANGE_RATIO = 0.9
"""Random lengths are spread evenly over length × (1 ± this): the same file."""
_DEFAULT_BATCHED_TOKENS = 2048
"""Where a run does not say: vLLM's own on this machine, by `compile_ranges_endpoints` in a log of the repository."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedLoad:
    """One run of the benchmark: how it was served, what was asked, and what was measured."""

    source: str
    """Path of the result in its repository."""
    version: str
    """Of vLLM."""
    model: str
    """The model, as rows of published measurements name it (row_models.toml)."""
    weight_dtype: str
    """Its weights, likewise; with -marlin if vLLM was told to multiply with its Marlin kernels."""
    kv_cache_dtype: str
    """Type of the KV cache."""
    max_model_len: int
    """Longest request, in tokens."""
    gpu_memory_utilization: float
    """Share of the memory for the engine."""
    max_num_batched_tokens: int
    """Most tokens of a step."""
    request_rate_per_s: float
    """Mean arrivals per second."""
    burstiness: float
    """Shape of the gamma-distributed gaps."""
    max_concurrency: int | None
    """Most requests under way; None: no limit."""
    num_prompts: int
    """Requests."""
    num_failed: int
    """Requests that got no answer."""
    input_len: int | None
    """Mean tokens of a random prompt; None: prompts of ShareGPT."""
    output_len: int | None
    """The same of an answer."""
    total_input_tokens: int
    """Tokens of all prompts, with what the chat template adds."""
    total_output_tokens: int
    """Tokens of all answers."""
    duration_s: float
    """From the first request to the last answer."""
    ttft_s: float
    """Mean time to the first token."""
    tpot_s: float
    """Mean over requests of their time per further token."""
    p99_tpot_s: float
    """Its P99."""
    e2e_s: float
    """Mean time from a request to its last token."""

    @property
    def name(self) -> str:
        """What it is called among those of its model: 07-office-baseline and the like."""
        return self.source.rpartition("/")[2]


def served_loads() -> list[ServedLoad]:
    """Return all of them, by source."""
    with FILE.open(newline="", encoding="utf-8") as file:
        return [_load(cells) for cells in csv.DictReader(file)]


def _load(cells: dict[str, str]) -> ServedLoad:
    def count(name: str) -> int | None:
        return int(cells[name]) if cells[name] else None

    def whole(name: str) -> int:
        return int(cells[name])

    return ServedLoad(
        source=cells["source"],
        version=cells["version"],
        model=cells["model"],
        weight_dtype=cells["weight_dtype"],
        kv_cache_dtype=cells["kv_cache_dtype"],
        max_model_len=whole("max_model_len"),
        gpu_memory_utilization=float(cells["gpu_memory_utilization"]),
        max_num_batched_tokens=count("max_num_batched_tokens") or _DEFAULT_BATCHED_TOKENS,
        request_rate_per_s=float(cells["request_rate"]),
        burstiness=float(cells["burstiness"]),
        max_concurrency=count("max_concurrency"),
        num_prompts=whole("num_prompts"),
        num_failed=whole("failed"),
        input_len=count("input_len"),
        output_len=count("output_len"),
        total_input_tokens=whole("total_input_tokens"),
        total_output_tokens=whole("total_output_tokens"),
        duration_s=float(cells["duration_s"]),
        ttft_s=float(cells["mean_ttft_ms"]) / 1e3,
        tpot_s=float(cells["mean_tpot_ms"]) / 1e3,
        p99_tpot_s=float(cells["p99_tpot_ms"]) / 1e3,
        e2e_s=float(cells["mean_e2el_ms"]) / 1e3,
    )


def requests_of(load: ServedLoad) -> Trace:
    """Return the requests of a load: those that were sent, or for ShareGPT as many tokens in lengths drawn like its."""
    rng = np.random.default_rng(SEED)
    if load.input_len is None or load.output_len is None:
        prompt, output = load_lengths("sharegpt").sample(rng, load.num_prompts)
        prompt, output = _scaled(prompt, load.total_input_tokens), _scaled(output, load.total_output_tokens)
    else:
        prompt, output = (_evenly(rng, length, load.num_prompts) for length in (load.input_len, load.output_len))
        prompt = prompt + round((load.total_input_tokens - int(prompt.sum())) / load.num_prompts)  # a chat template's
    return Trace(
        path=Path(load.source),
        format="vllm-bench-json",
        arrival_s=arrivals(load),
        prompt_tokens=prompt,
        output_tokens=output,
        line_numbers=np.arange(load.num_prompts),
    )


def arrivals(load: ServedLoad) -> Float64Array:
    """Return when requests come, in seconds: gamma-distributed gaps, scaled so that the last comes when it is due on average."""
    shape, rate = load.burstiness, load.request_rate_per_s
    gaps = np.random.RandomState(SEED).gamma(shape, 1 / (rate * shape), size=load.num_prompts)
    total_s = load.num_prompts / rate
    at: Float64Array = np.cumsum(gaps) * (total_s / gaps.sum())
    return at


def _evenly(rng: np.random.Generator, length: int, number: int) -> Int64Array:
    low, high = math.floor(length * (1 - RANGE_RATIO)), math.ceil(length * (1 + RANGE_RATIO))
    return rng.integers(low, high + 1, size=number)


def _scaled(lengths: npt.NDArray[np.int64], total: int) -> Int64Array:
    """Return lengths in the same proportions that come to `total`, to within half a token each."""
    scaled: Int64Array = np.maximum(np.rint(lengths * (total / lengths.sum())).astype(np.int64), 1)
    return scaled
