"""vLLM: a share of the visible memory must be free at the start, and the KV cache gets what the rest leaves of that share.

requested = ceil(utilization x visible); KV cache = requested - weights - engine overhead - activations - CUDA graphs. On unified
memory the operating system, other programs and the floor are compared with what utilization leaves, never subtracted from it.
Source: vLLM 0.33, gpu_worker and mem_utils.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from pagedkv.errors import ConfigError
from pagedkv.hardware_spec import HardwareSpec
from pagedkv.ledgers import LEDGERS
from pagedkv.ledgers._shared import EngineParts, check_kv_cache_dtype, check_share, free_in_words, room_reason, settle
from pagedkv.memory_budget import MemoryBudget, Shortage
from pagedkv.memory_request import MemoryRequest, Remedy, check_size
from pagedkv.remedies import (
    eager,
    fewer_batched_tokens,
    fewer_sequences,
    longest_context,
    narrower_kv,
    narrower_weights,
    shorter_context,
)
from pagedkv.start_up import StartUp
from pagedkv.units import GIB, gib


def start_gate(*, visible: int, free: int, utilization: float) -> bool:
    """Return whether vLLM starts: what it asks for must be free. Sizes in bytes."""
    return math.ceil(visible * utilization) <= free


def highest_utilization_that_starts(*, visible: int, free: int) -> float:
    """Return the highest utilization, in hundredths, that passes the start gate; 0.0 if none does."""
    passing = (h for h in range(100, 0, -1) if start_gate(visible=visible, free=free, utilization=h / 100))
    return next(passing, 0) / 100


@LEDGERS.register("vllm")
@dataclass(frozen=True, slots=True, kw_only=True)
class VLLMLedger:
    """vLLM's memory settings."""

    block_size: int = 16
    """Tokens per block."""
    gpu_memory_utilization: float = 0.92
    """Share of the visible memory that the engine may hold."""
    kv_cache_memory_bytes: int | None = None
    """Size of the KV cache, in place of what utilization leaves."""
    num_gpu_blocks_override: int | None = None
    """Number of blocks, in place of what fits."""
    cuda_graphs_set_aside: bool = True
    """The KV cache leaves room for CUDA graphs; if not (vLLM before 0.21), they come on top of what utilization gives."""

    @property
    def null_blocks(self) -> int:
        """Block 0 stands for blocks that a window has left."""
        return 1

    @property
    def windows_apart(self) -> bool:
        """All layers have blocks."""
        return False

    @property
    def weight_formats(self) -> tuple[str, ...]:
        """Narrower weight formats to propose."""
        return ("fp8", "nvfp4", "int4")

    @property
    def sized_by_user(self) -> bool:
        """Whether the user, not utilization, sizes the KV cache."""
        return self.kv_cache_memory_bytes is not None or self.num_gpu_blocks_override is not None

    def check(self, request: MemoryRequest) -> None:
        """Refuse settings that no machine could make work.

        Raises:
            ConfigError: With the value and the range that would work.
        """
        check_kv_cache_dtype(request, quantized=False)
        hardware, utilization = request.hardware, self.gpu_memory_utilization
        check_share("--gpu-memory-utilization", utilization)
        highest = hardware.max_utilization_seen
        if utilization > highest.value and not self.sized_by_user:
            raise ConfigError(
                f"--gpu-memory-utilization {utilization} is above {highest.value:g}, the highest that {hardware.title} is "
                f"known to start with ({highest.source}): use {highest.value:g} or less"
            )
        if self.block_size < 1:
            raise ConfigError(f"--block-size {self.block_size} must be at least 1")
        check_size("kv_cache_memory_bytes", self.kv_cache_memory_bytes, hardware)
        if self.num_gpu_blocks_override is not None and self.num_gpu_blocks_override < 2:
            raise ConfigError(f"--num-gpu-blocks-override {self.num_gpu_blocks_override} must be at least 2: one is the null block")

    def attempt(self, request: MemoryRequest) -> MemoryBudget | Shortage:
        """Return the budget, or why there is none. The values have been checked."""
        hardware, free = request.hardware, request.free_at_start
        requested = math.ceil(hardware.visible_bytes * self.gpu_memory_utilization)
        parts = EngineParts.on_torch(request)
        available = free if self.sized_by_user else requested
        on_top = self._graphs_on_top(parts)
        room = available - parts.total + on_top
        block_bytes = request.block_bytes
        num_blocks = self._num_blocks(room, block_bytes)
        kv_cache = num_blocks * block_bytes
        if available + on_top > free or kv_cache > room or num_blocks < request.blocks_for_one_request:
            one_request = request.blocks_for_one_request * block_bytes
            needed = max(kv_cache if self.sized_by_user else 0, one_request)
            return Shortage(
                kind="gate"
                if available + on_top > free
                else "request"
                if room >= needed
                else "free"
                if self.sized_by_user
                else "share",
                free_at_start=free,
                available=available + on_top,
                weights=parts.weights,
                overheads=parts.total - parts.weights,
                kv_cache=needed,
            )
        held = parts.total + kv_cache if self.sized_by_user else requested + on_top
        floor = int(hardware.memory_floor.value)
        enough = highest_utilization_that_starts(visible=hardware.visible_bytes, free=free - floor - on_top)
        return settle(
            request,
            parts,
            setting=self.gpu_memory_utilization,
            requested=requested,
            num_blocks=num_blocks,
            block_bytes=block_bytes,
            equation=self._equation(request, parts),
            check=self._gate(request, held),
            held=held,
            gentler=None if self.sized_by_user else replace(self, gpu_memory_utilization=enough),
        )

    def overhead_behind(self, request: MemoryRequest, kv_cache_bytes: int) -> int:
        """Return the engine overhead under which utilization leaves `kv_cache_bytes`; negative if all else takes too much."""
        parts = EngineParts.on_torch(request)
        others = parts.total - parts.engine_overhead - (0 if self.cuda_graphs_set_aside else parts.cuda_graphs)
        return math.ceil(request.hardware.visible_bytes * self.gpu_memory_utilization) - others - kv_cache_bytes

    def _graphs_on_top(self, parts: EngineParts) -> int:
        """Return the bytes of CUDA graphs that come on top of what utilization gives."""
        return 0 if self.cuda_graphs_set_aside or self.sized_by_user else parts.cuda_graphs

    def _num_blocks(self, room: int, block_bytes: int) -> int:
        if self.num_gpu_blocks_override is not None:
            return self.num_gpu_blocks_override
        return max(room if self.kv_cache_memory_bytes is None else self.kv_cache_memory_bytes, 0) // block_bytes

    def _equation(self, request: MemoryRequest, parts: EngineParts) -> str:
        if self.sized_by_user:
            return self._kv_setting()
        minus = [parts.weights, parts.engine_overhead, parts.activations]
        minus += [parts.cuda_graphs] if self.cuda_graphs_set_aside else []
        terms = " − ".join(f"{size / GIB:.2f}" for size in minus)
        return f"{self.gpu_memory_utilization:g} × {request.hardware.visible_bytes / GIB:.2f} − {terms}"

    def _gate(self, request: MemoryRequest, held: int) -> str:
        asked = f"the engine's {gib(held)}"
        if not self.sized_by_user:
            graphs = self._graphs_on_top(EngineParts.on_torch(request))
            on_top = f" and {graphs / GIB:.2f} of CUDA graphs on top" if graphs else ""
            asked = f"{self.gpu_memory_utilization:g} × {request.hardware.visible_bytes / GIB:.2f}{on_top} = {gib(held)}"
        return f"start check: {asked} must be free, and {free_in_words(request)}"

    def _kv_setting(self) -> str:
        if self.num_gpu_blocks_override is not None:
            return f"--num-gpu-blocks-override {self.num_gpu_blocks_override}"
        return f"--kv-cache-memory-bytes {self.kv_cache_memory_bytes}"

    def reason(self, request: MemoryRequest, shortage: Shortage) -> str:
        """Return what is missing, with this machine's numbers."""
        if shortage.kind == "gate":
            hardware, utilization = request.hardware, self.gpu_memory_utilization
            on_top = self._graphs_on_top(EngineParts.on_torch(request))
            starts = highest_utilization_that_starts(visible=hardware.visible_bytes, free=shortage.free_at_start - on_top)
            return (
                f"--gpu-memory-utilization {utilization:g} × {gib(hardware.visible_bytes)} asks for {gib(shortage.available)}, "
                f"but only {free_in_words(request, of=hardware.title)}: "
                + (f"{starts:g} is the highest that starts" if starts else "no utilization starts")
            )
        if shortage.kind == "request":
            return (
                f"{self._kv_setting()} holds {longest_context(request)} tokens beside the null block, less than one "
                f"request of --max-model-len {request.max_model_len}, which needs {gib(shortage.kv_cache)} of KV cache"
            )
        if self.sized_by_user:
            return room_reason(request, shortage, where="are free", purpose=f"by {self._kv_setting()}")
        where = f"are available at --gpu-memory-utilization {self.gpu_memory_utilization:g}"
        return room_reason(request, shortage, where=where, purpose="")

    def start_up(self, request: MemoryRequest) -> StartUp:
        """Return how vLLM starts: its profile run compiles, and MemAvailable after it sizes the KV cache.

        Source: gpu_worker. Its loader past the page cache is InstantTensor, which costs 4.4 GiB of KV cache
        (MiaAI-Lab/GLM-5.3-Flash-EXL3-2x-DGX-Sparks issue 204).
        """
        nvcc_jobs = request.hardware.nvcc_jobs
        cuda = nvcc_jobs is None or nvcc_jobs.value > 0
        return StartUp(
            profiles=True,
            compiles=not request.enforce_eager,
            builds_kernels=True,
            repacks=True,
            reads=None if self.sized_by_user else "MemAvailable",
            direct_loader="--load-format instanttensor" if cuda else "",
            direct_buffer_bytes=round(4.4 * GIB),
            notes=(self._checked_all_the_same(request),) if self.sized_by_user and request.hardware.unified else (),
        )

    def _checked_all_the_same(self, request: MemoryRequest) -> str:
        """Source: vLLM 0.28 and later, request_memory (llamastash PR 81)."""
        asked = math.ceil(request.hardware.visible_bytes * self.gpu_memory_utilization)
        return (
            f"vLLM checks --gpu-memory-utilization at its start although {self._kv_setting().split()[0]} sizes the KV cache: say "
            f"{self.gpu_memory_utilization:g}, which asks for {gib(asked)} free, or less."
        )

    def starved_blocks(self, request: MemoryRequest, budget: MemoryBudget, lost_bytes: int) -> int:
        """Return the blocks that there would be if `lost_bytes` were missing after the profile run: vLLM takes them for its own."""
        if self.sized_by_user:
            return budget.num_blocks
        parts = EngineParts.on_torch(request)
        return self._num_blocks(budget.requested - parts.total + self._graphs_on_top(parts) - lost_bytes, budget.block_bytes)

    def cautious(self, request: MemoryRequest, budget: MemoryBudget) -> Iterator["VLLMLedger"]:
        """Yield the present KV cache by its size, which no measurement changes; lower utilizations; smaller sizes."""
        unsized = replace(self, num_gpu_blocks_override=None)
        if not self.sized_by_user:
            yield replace(unsized, kv_cache_memory_bytes=budget.kv_cache)
            now = math.ceil(self.gpu_memory_utilization * 100)
            yield from (replace(self, gpu_memory_utilization=hundredths / 100) for hundredths in range(now - 1, 0, -1))
        for share in range(95, 0, -5):
            yield replace(unsized, kv_cache_memory_bytes=budget.num_blocks * share // 100 * budget.block_bytes)

    def remedies(self) -> tuple[Remedy, ...]:
        """Return the changes that may help, the mildest first."""
        return (
            _other_utilization,
            _usual_utilization,
            shorter_context,
            narrower_kv,
            _kv_cache_that_fits,
            narrower_weights,
            fewer_batched_tokens,
            fewer_sequences,
            eager,
        )

    def on(self, hardware: HardwareSpec) -> tuple["VLLMLedger", ...]:
        """Return the ledgers that a user may end up with on another machine: with these settings, or with its defaults."""
        return self, replace(self, gpu_memory_utilization=hardware.default_utilization.value)


def _usual_utilization(request: MemoryRequest) -> Iterator[MemoryRequest]:
    """Yield the machine's own utilization where a higher one is asked for: less KV cache, but a start that goes well."""
    ledger, usual = request.ledger, request.hardware.default_utilization.value
    assert isinstance(ledger, VLLMLedger)
    if not ledger.sized_by_user and ledger.gpu_memory_utilization > usual:
        yield replace(request, ledger=replace(ledger, gpu_memory_utilization=usual))


def _other_utilization(request: MemoryRequest) -> Iterator[MemoryRequest]:
    """Yield higher utilizations, or those that start when the start gate refuses this one, the highest first."""
    ledger = request.ledger
    assert isinstance(ledger, VLLMLedger)
    if ledger.sized_by_user:
        return
    now = ledger.gpu_memory_utilization
    free = request.free_at_start - ledger._graphs_on_top(EngineParts.on_torch(request))
    starts = highest_utilization_that_starts(visible=request.hardware.visible_bytes, free=free)
    highest = min(starts, request.hardware.max_utilization_seen.value)
    if 0 < highest < now:
        lower = (hundredths / 100 for hundredths in range(math.floor(highest * 100), 0, -1))
        yield from (replace(request, ledger=replace(ledger, gpu_memory_utilization=share)) for share in (highest, *lower))
    for hundredths in range(int(now * 100) + 1, round(highest * 100) + 1):
        yield replace(request, ledger=replace(ledger, gpu_memory_utilization=hundredths / 100))


def _kv_cache_that_fits(request: MemoryRequest) -> Iterator[MemoryRequest]:
    """Yield, where the user sized the KV cache, the largest that fits, also beside the floor, or the smallest that is enough."""
    ledger, outcome = request.ledger, request.attempt()
    assert isinstance(ledger, VLLMLedger)
    if not ledger.sized_by_user or isinstance(outcome, MemoryBudget) or outcome.kv_room <= 0:
        return
    for room in (outcome.kv_room, outcome.kv_room - int(request.hardware.memory_floor.value)):
        blocks = max(min(room, outcome.kv_cache), 0) // request.block_bytes
        if ledger.num_gpu_blocks_override is not None:
            yield replace(request, ledger=replace(ledger, num_gpu_blocks_override=blocks))
        else:
            yield replace(request, ledger=replace(ledger, kv_cache_memory_bytes=blocks * request.block_bytes))
