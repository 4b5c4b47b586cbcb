"""What a user asks for. Every field is a flag of `simulate` (underscores become hyphens) and a key of config.toml.

Sizes are strings such as "16GiB", times such as "20s" or "500ms"; None means that a later stage decides (engine, model or load).
"""

import re
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Literal

from pagedkv.errors import ConfigError

LOAD_KINDS = ("users", "request_rate", "trace")
"""The settings of which exactly one says what kind of load there is."""
GOES_WITH = {
    "think_time": ("users",),
    "burstiness": ("request_rate",),
    "num_prompts": ("users", "request_rate", "trace"),
    "max_concurrency": ("request_rate", "trace"),
    "trace_format": ("trace",),
    "trace_rate": ("trace",),
    "lengths": ("users", "request_rate"),
    "lengths_in_order": ("request_rate",),
    "random_input_len": ("users", "request_rate"),
    "random_output_len": ("users", "request_rate"),
    "random_range_ratio": ("users", "request_rate"),
    "prefix_len": ("users", "request_rate"),
    "num_prefixes": ("users", "request_rate"),
    "workload": ("users",),
}
"""By setting of a load: the kinds that it goes with."""

ATTAIN = 0.99
"""Share of the requests, of those whose fate is known, that must meet the goals."""
DEFAULT_ALLOCATORS = ("paged", "contiguous-max", "contiguous-oracle")
"""What `simulate` compares."""

_TIME = re.compile(r"\s*([0-9]*\.?[0-9]+)\s*(us|ms|s|m|min|h|)\s*")
MAX_S = 3.6e9
"""A longer time is a mistake."""
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


def parse_seconds(text: str, *, name: str) -> float:
    """Return the seconds in `text`: a number with us, ms, s, m, h, or none (seconds).

    Raises:
        ConfigError: If it is not a time of 0 or more.
    """
    match = _TIME.fullmatch(text)
    if match is None:
        raise ConfigError(f"{name} {text!r} is not a time: write a number with a unit, such as 20s, 500ms or 10m")
    seconds = float(match[1]) * _SECONDS[match[2]]
    if seconds > MAX_S:
        raise ConfigError(f"{name} {text!r} is longer than {MAX_S / 3600:,.0f} hours: write a shorter time, such as 10m")
    return seconds


def time_text(seconds: float) -> str:
    """Return the shortest text that `parse_seconds` reads as exactly `seconds`."""
    positional = format(Decimal(repr(seconds)), "f")
    return (positional.rstrip("0").rstrip(".") if "." in positional else positional) + "s"


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadConfig:
    """Who asks, and for how much. Exactly one of users, request_rate and trace; a workload may say how many users itself."""

    users: int | None = None
    """Closed loop: this many people, each sending a request, reading the answer, and pausing before the next."""
    think_time: str | None = None
    """Closed loop: mean pause between an answer and the next request, exponential [default: 20s]."""
    request_rate: float | None = None
    """Open loop: mean arrivals per second, whether or not earlier ones are answered."""
    burstiness: float | None = None
    """Open loop: shape of the gamma-distributed gaps, as in vllm bench; 1 is Poisson, below 1 burstier [default: 1]."""
    num_prompts: int | None = None
    """Stop after this many requests, and run until all are answered [default: a trace, when it ends]."""
    max_concurrency: int | None = None
    """Open loop and trace: most requests under way; others wait at the client, and count from when they are sent, as in vllm bench
    [default: no limit]."""
    trace: str | None = None
    """Replay arrivals and lengths from a file: Azure, BurstGPT or Mooncake, a result of vllm bench serve, GuideLLM or AIPerf, or
    any CSV or JSON lines with arrival, input and output; gzip too (docs/traces.md)."""
    trace_format: str | None = None
    """Read the trace as this format instead of detecting it: azure-csv, burstgpt-csv, mooncake-jsonl, vllm-bench-json,
    guidellm-json, aiperf-jsonl, generic-csv or generic-jsonl."""
    trace_rate: float | None = None
    """Replay the trace at this multiple of its own request rate, e.g. 0.5 or 2 [default: 1]."""
    lengths: str | None = None
    """Prompt and output lengths: azure-conv, sharegpt, or a file whose rows are drawn at random [default: azure-conv]."""
    lengths_in_order: bool = False
    """Open loop: take the rows of a lengths file in its order instead of at random."""
    random_input_len: int | None = None
    """Prompt length in tokens, instead of a distribution; needs random_output_len."""
    random_output_len: int | None = None
    """Output length in tokens; needs random_input_len."""
    random_range_ratio: float | None = None
    """Spread both random lengths evenly over length × (1 ± this); 0 to below 1 [default: 0]."""
    prefix_len: int | None = None
    """Tokens of a shared prefix, e.g. a system prompt, put before every prompt (vllm bench: --random-prefix-len) [default: 0]."""
    num_prefixes: int | None = None
    """How many different ones (vllm bench: --prefix-repetition-num-prefixes); each user, or open-loop request, has one of them at
    random [default: 1]."""
    workload: str | None = None
    """Classes of users with conversations that grow, think or tool times and lengths of their own: chat, agents, reasoning, batch,
    mixed-office, or a .toml file (docs/workloads.md); --users N is shared among them."""
    over_length: Literal["reject", "drop"] = "reject"
    """Requests longer than max_model_len: reject them at arrival, as an engine does, or drop them from the load."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingConfig:
    """The machine, the model, and the engine's settings by vLLM's names."""

    hardware: str = "dgx-spark"
    """Machine from the hardware catalogue, or a .toml file that describes one (docs/hardware.md)."""
    clock_derate: float | None = None
    """Run the compute units at this share of their rate, e.g. 0.6 for a Spark that throttles [default: 1]."""
    cpu_bandwidth: str | None = None
    """On unified memory: what the processor's own work moves to and from memory meanwhile, e.g. 40GB/s; the GPU has the rest
    [default: nothing]."""
    model: str = "llama-3.1-8b"
    """Model from the catalogue, its Hugging Face id, or a config.json or its folder; Ollama: a comma list, of which users have one
    each at random, if a workload does not say which."""
    engine: str = "vllm"
    """Engine whose defaults and rules apply: vllm (0.33; vllm@0.19 is an earlier version), sglang, tensorrt-llm, llama-cpp, ollama,
    naive, orca or vattention; a comma list compares them."""
    quantization: str | None = None
    """Weight format: bf16, fp8, nvfp4, mxfp4, int4, ... [default: the model's own; llama-cpp: as a GGUF has it; ollama: q4_k_m]."""
    kv_cache_dtype: str = "auto"
    """KV cache element type: auto (the model's 16 bits), fp8, ..."""
    tensor_parallel_size: int = 1
    """Devices that share the model: one is supported so far."""
    max_model_len: int | None = None
    """Longest prompt + output in tokens [default: 32768, or the model's limit if that is less]."""
    block_size: int = 16
    """Tokens per block of the paged allocator."""
    gpu_memory_utilization: float | None = None
    """Share of the visible memory that the engine may use [default: the machine's, 0.80 on a DGX Spark]."""
    max_num_seqs: int | None = None
    """Most requests in the running batch [default: the engine's, for this machine]."""
    max_num_batched_tokens: int | None = None
    """Most tokens computed in one step [default: the engine's, for this machine]."""
    enable_chunked_prefill: bool | None = None
    """Compute long prompts over several steps [default: the engine's: yes for vllm, no for tensorrt-llm]."""
    long_prefill_token_threshold: int = 0
    """Most tokens of one request per step while others are there; 0 is no limit."""
    enable_prefix_caching: bool | None = None
    """Paged memory keeps what was computed, for prompts that begin alike [default: yes; no for models with state layers]."""
    offload_size: str | None = None
    """vLLM: room for what leaves the prefix cache in a second tier, e.g. 200GiB; adds the column paged-offload [default: none]."""
    offload_tier: str | None = None
    """vLLM: where it is, nvme or host [default: nvme on unified memory, where host memory frees nothing; else host]."""
    offload_bandwidth: str | None = None
    """vLLM: rate of copies to it, and from it, e.g. 25GB/s [default: what the machine's disk reads, if the catalogue has one]."""
    watermark: float = 0.0
    """Share of the blocks that an admission leaves free while something runs."""
    disable_hybrid_kv_cache_manager: bool = False
    """vLLM: one block table for all layers: those with a window keep all tokens."""
    scheduler_reserve_full_isl: bool | None = None
    """Admit a request only if all its known tokens fit [default: the engine's: yes, no for vllm@0.19]."""
    enforce_eager: bool = False
    """Run without CUDA graphs: saves their memory, costs launch time."""
    kv_cache_memory_bytes: str | None = None
    """Size of the KV cache, e.g. 16GiB, instead of what utilization leaves."""
    num_gpu_blocks_override: int | None = None
    """Number of KV blocks as vLLM counts them, of a group of layers where layers differ, instead of what the memory holds."""
    free_memory: str | None = None
    """Memory that is free when the engine starts, e.g. 102.2GiB [default: visible less OS and other programs]."""
    os_reserve: str | None = None
    """Memory of the operating system on a unified-memory machine [default: the machine's]."""
    other_programs: str = "0"
    """Memory of other programs on the machine, e.g. 8GiB."""
    contiguous_heap: str = "buddy"
    """Heap under the contiguous allocators: buddy or first-fit."""
    replicas: int = 1
    """So many deployments alike, each on a machine of its own, behind one router."""
    routing: str | None = None
    """How the router spreads requests over replicas: round-robin, least-loaded or prefix-affine [default: round-robin]."""
    fault: tuple[str, ...] = ()
    """When a replica's process dies, for how long, and which one, e.g. 300s:120s for the first or 300s:120s:1 for the second: its
    requests fail, and it comes back with an empty cache. Several, or a comma list."""
    mem_fraction_static: float | None = None
    """SGLang: share of the memory free before loading for weights and KV pool [default: by SGLang's formula]."""
    page_size: int | None = None
    """SGLang: tokens per page of the radix cache [default: 1]."""
    schedule_policy: str | None = None
    """SGLang: whose turn it is: fcfs, lpm, dfs-weight, lof, hrrn, shortest-prefill-first, random [default: fcfs]."""
    schedule_conservativeness: float | None = None
    """SGLang: how much of their possible output running requests are expected to make at first, of 70 % [default: 1]."""
    enable_mixed_chunk: bool | None = None
    """SGLang: let running requests decode in steps that prefill [default: no]."""
    radix_eviction_policy: str | None = None
    """SGLang: what leaves the radix cache first: lru, lfu, slru, priority, ... [default: lru]."""
    capacity_scheduler_policy: str | None = None
    """TensorRT-LLM: guaranteed_no_evict, max_utilization or static_batch [default: guaranteed_no_evict]."""
    free_gpu_memory_fraction: float | None = None
    """TensorRT-LLM: share for the KV cache of what weights and activations leave free [default: 0.9]."""
    tokens_per_block: int | None = None
    """TensorRT-LLM: tokens per block, a power of two [default: 32]."""
    ctx_size: int | None = None
    """llama.cpp: cells of the whole KV cache; Ollama: context of each slot [default: the model's own; Ollama: by memory size]."""
    parallel: int | None = None
    """llama.cpp and Ollama: server slots [default: 4 with one cache for all; Ollama: 1]."""
    kv_unified: bool | None = None
    """llama.cpp: let all slots share the cells [default: yes, unless parallel is given]."""
    ubatch_size: int | None = None
    """llama.cpp and Ollama: most tokens that are computed together [default: 512]."""
    swa_full: bool | None = None
    """llama.cpp and Ollama: let layers with a window keep all tokens, as the others do [default: no]."""
    ctx_checkpoints: int | None = None
    """llama.cpp and Ollama: most copies of its window that a slot keeps in host memory, to go on from [default: 32]."""
    speculative_method: str | None = None
    """vLLM, SGLang: what drafts: draft-model, mtp, eagle, medusa, ngram [default: nothing; draft-model with speculative-model]."""
    speculative_model: str | None = None
    """vLLM and SGLang: the draft model, with weights and KV of its own in the same memory."""
    num_speculative_tokens: int | None = None
    """vLLM and SGLang: tokens drafted for each request that decodes, and verified in its next step."""
    acceptance_rate: float | None = None
    """Chance that a draft is accepted if those before it are [default: 0.7, assumed]."""
    acceptance_spread: float | None = None
    """Standard deviation of each request's own acceptance rate [default: 0]."""
    max_queue: int | None = None
    """Ollama: most requests that may wait; more get status 503 [default: 512]."""
    max_loaded_models: int | None = None
    """Ollama: most models in memory at once [default: 3]."""
    keep_alive: str | None = None
    """Ollama: how long a model stays in memory when nobody uses it, e.g. 5m; 0: not at all, -1: for good. A comma list is one for
    each model [default: 5m]."""
    disk_bandwidth: str | None = None
    """Ollama: rate at which a model is read from disk, e.g. 5GB/s [default: the machine's, if the catalogue has one]."""


def names_several_models(serving: ServingConfig) -> bool:
    """Return whether `serving` names a comma list of models, as Ollama takes it."""
    return "," in serving.model and not Path(serving.model).exists()


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasurementConfig:
    """What is compared, for how long, and against which goal."""

    allocator: tuple[str, ...] | None = None
    """Allocators to compare, one flag each or a comma list [default: paged,contiguous-max,contiguous-oracle]."""
    duration: str | None = None
    """Simulated time that is measured, after the warm-up [default: 600s; a trace runs until all is answered]."""
    warmup: str | None = None
    """Simulated time before requests count [default: 60s; 0 for a trace]."""
    seed: int = 0
    """Same seed, same requests, same output, byte for byte."""
    repeats: int = 1
    """Runs with different seeds; from 2 on every figure gets a 95 % confidence interval."""
    goodput: tuple[str, ...] = ()
    """Goals in ms that a request must meet, e.g. ttft:2000 tpot:100 (also e2el)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulationConfig:
    """One simulation, as asked for."""

    load: LoadConfig = field(default_factory=LoadConfig)
    """Who asks."""
    serving: ServingConfig = field(default_factory=ServingConfig)
    """Who answers."""
    measurement: MeasurementConfig = field(default_factory=MeasurementConfig)
    """What is measured."""
