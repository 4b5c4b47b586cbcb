"""How an engine starts, as far as memory tells: what it holds for a while, and which reading of free memory sizes its KV cache."""

from dataclasses import dataclass, field
from typing import Literal

from pagedkv.hardware_spec import HardwareSpec
from pagedkv.model_spec import ModelSpec
from pagedkv.units import GIB, KIB
from pagedkv.weight_format import WeightFormat

COMPILE_PEAK_BYTES = round(31.6 * GIB)
"""Heap of torch.compile and Triton on the processor's side, with cold caches. Source: eugr/spark-vllm-docker PR 286, where 31.6 GiB
were counted as the engine's own and missed in the KV cache: 9.5 GiB instead of more than 40."""
KERNEL_BUILD_BYTES = 3 * GIB
"""One nvcc that builds a CUTLASS kernel. Source: flashinfer-ai/flashinfer issue 3634 saw 3 to 8 GiB each, one for each core of
the processor; with 3, 20 of them make about the 112 GiB that vLLM issue 46307 saw in use on a Spark before it froze."""
KERNEL_BUILD_MOST_BYTES = 8 * GIB
"""The same where MAX_JOBS lets few run at once: of few, each may be at its peak. Source: as above, and PR 3899, which counts so."""
READAHEAD_BYTES = 128 * KIB
"""What Linux reads ahead of a file that is mapped, one read after the other. Source: read_ahead_kb, 128 unless somebody sets it."""

Coming = Literal["loading", "serving"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Guest:
    """Somebody else who comes, stays for a while and goes: a second model, or programs that grow."""

    name: str
    """What a reader calls it."""
    num_bytes: int
    """What it takes."""
    during: Coming
    """`loading`: from the engine's start until its KV cache has its size. `serving`: at some time after that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StartUp:
    """What an engine does between its start and its first request."""

    profiles: bool
    """It computes a largest step before it sizes the KV cache; otherwise at most after that, to warm up."""
    compiles: bool
    """It compiles the model (torch.compile)."""
    builds_kernels: bool
    """It builds kernels for this GPU with nvcc, where the model needs some that no package brings."""
    repacks: bool
    """It lays out narrow weights anew, layer by layer."""
    reads: Literal["MemAvailable", "MemFree"] | None
    """Which of Linux's figures it takes for free memory when it sizes the KV cache; None: it does not look."""
    direct_loader: str = ""
    """The flag that reads weights past the page cache; empty: it has none."""
    direct_buffer_bytes: int = 0
    """What that loader holds while it reads."""
    host_cache_bytes: int = 0
    """What it keeps of old prompts in the processor's memory, in time, by default; 0: it has no such cache."""
    host_cache_off: str = ""
    """The flag that turns this off."""
    window_copies_bytes: int = 0
    """What it keeps of windows in the processor's memory beside that, in time."""
    notes: tuple[str, ...] = ()
    """What else a reader should know of it, each a sentence or two."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StartOptions:
    """How somebody starts an engine, beside its own settings of memory."""

    direct_io: bool = False
    """Read weights past the page cache, if the engine can."""
    drops_caches: bool = False
    """Something drops the page cache while the engine loads."""
    warm_compile_caches: bool = False
    """Nothing is compiled: a start before this one has left all of it on disk."""
    compile_jobs: int | None = None
    """Processes of nvcc at once (MAX_JOBS); None: one for each core."""
    host_cache_bytes: int | None = None
    """What the engine may keep of old prompts in the processor's memory; None: its default."""
    host_tier_bytes: int = 0
    """A tier of KV blocks in the processor's memory."""
    guests: tuple[Guest, ...] = field(default=())
    """Who comes and goes."""

    def host_cache(self, start: StartUp) -> int:
        """Return what the engine may come to keep of old prompts in the processor's memory, in bytes."""
        return start.host_cache_bytes if self.host_cache_bytes is None else self.host_cache_bytes


def builds_kernels_for(model: ModelSpec, weight_format: WeightFormat) -> bool:
    """Return whether FlashInfer builds kernels for a model: those of experts and of 4-bit arithmetic come as source code.

    Source: flashinfer-ai/flashinfer issue 3634, where `fused_moe_120` and `fp4_gemm_cutlass_sm120` are built on a Spark.
    """
    return bool(model.num_experts) or weight_format.compute_dtype == "fp4"


def compiler_bytes(
    start: StartUp, options: StartOptions, *, hardware: HardwareSpec, model: ModelSpec, weight_format: WeightFormat
) -> tuple[int, int]:
    """Return what the compilation of the model holds, and what builds of kernels do; one comes after the other."""
    if options.warm_compile_caches or hardware.nvcc_jobs is None:  # None: a discrete GPU
        return 0, 0
    building = KERNEL_BUILD_BYTES * int(hardware.nvcc_jobs.value)
    if options.compile_jobs is not None:
        building = min(building, KERNEL_BUILD_MOST_BYTES * options.compile_jobs)
    if not start.builds_kernels or not builds_kernels_for(model, weight_format):
        building = 0
    return COMPILE_PEAK_BYTES if start.compiles else 0, building


def disk_read_s(hardware: HardwareSpec, num_bytes: int, *, read_bytes: int | None = None) -> float | None:
    """Return how long one thread reads `num_bytes` from the machine's disk; None where nobody measured it.

    Reads of `read_bytes` come one after the other and each waits for the disk: bytes / bandwidth + reads × latency. None is one
    large read. A mapped file is read in pieces of `READAHEAD_BYTES`, which on a Spark makes 0.57 of 5.1 GB/s; gpt-oss-120b took
    110 s so, and 10.5 s by direct I/O (ggml-org/llama.cpp PR 18012).
    """
    rate, latency = hardware.disk_read_bandwidth, hardware.disk_read_latency
    if rate is None or latency is None:
        return None
    reads = 1 if read_bytes is None else -(-num_bytes // read_bytes)
    return num_bytes / rate.value + reads * latency.value
