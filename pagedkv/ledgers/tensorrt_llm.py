"""TensorRT-LLM: the KV cache is a share of what is free after weights and activations, not of the whole memory.

KV cache = free_gpu_memory_fraction x (free - weights - engine overhead - activations), or `max_tokens` if that is less. Nothing is
checked at the start; CUDA graphs are captured into the share that is left. "Free" is what CUDA reports: on unified memory that
counts page cache as used, so give it with --free-memory where the cache is warm.
Source: TensorRT-LLM, KvCacheConfig and KvCacheCreator of the PyTorch backend.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from pagedkv.errors import ConfigError
from pagedkv.hardware_spec import HardwareSpec
from pagedkv.ledgers import LEDGERS
from pagedkv.ledgers._shared import (
    EngineParts,
    check_kv_cache_dtype,
    check_share,
    free_in_words,
    other_shares,
    room_reason,
    settle,
    shortfall_of_floor,
)
from pagedkv.memory_budget import MemoryBudget, Shortage
from pagedkv.memory_request import MemoryRequest, Remedy
from pagedkv.remedies import eager, fewer_batched_tokens, fewer_sequences, narrower_kv, narrower_weights, shorter_context
from pagedkv.start_up import StartUp
from pagedkv.units import GIB, gib


@LEDGERS.register("tensorrt-llm")
@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRTLLMLedger:
    """TensorRT-LLM's memory settings."""

    tokens_per_block: int = 32
    """Tokens per block, a power of two above 1."""
    free_gpu_memory_fraction: float = 0.9
    """Share of what weights and activations leave free that the KV cache takes."""
    max_tokens: int | None = None
    """Most tokens in the KV cache; None: what fits."""

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        return self.tokens_per_block

    @property
    def null_blocks(self) -> int:
        """Every block can be held."""
        return 0

    @property
    def windows_apart(self) -> bool:
        """All layers have blocks."""
        return False

    @property
    def weight_formats(self) -> tuple[str, ...]:
        """Narrower weight formats to propose."""
        return ("fp8", "nvfp4", "int4")

    def check(self, request: MemoryRequest) -> None:
        """Refuse settings that no machine could make work.

        Raises:
            ConfigError: With the value and the range that would work.
        """
        check_kv_cache_dtype(request, quantized=False)
        check_share("--free-gpu-memory-fraction", self.free_gpu_memory_fraction)
        if self.tokens_per_block < 2 or self.tokens_per_block.bit_count() != 1:
            raise ConfigError(f"--tokens-per-block {self.tokens_per_block} must be a power of two above 1, such as 32")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ConfigError(f"--max-tokens {self.max_tokens} must be at least 1")

    def attempt(self, request: MemoryRequest) -> MemoryBudget | Shortage:
        """Return the budget, or why there is none. The values have been checked."""
        free = request.free_at_start
        parts = EngineParts.on_torch(request)
        left = free - (parts.total - parts.cuda_graphs)
        share = max(math.floor(left * self.free_gpu_memory_fraction), 0)
        block_bytes = request.block_bytes
        num_blocks = self._num_blocks(request, share)
        kv_cache = num_blocks * block_bytes
        if num_blocks < request.blocks_for_one_request:
            return Shortage(
                kind="request" if num_blocks == self._most_blocks else "share" if left > 0 else "free",
                free_at_start=free,
                available=free - max(left, 0) + share,
                weights=parts.weights,
                overheads=parts.total - parts.cuda_graphs - parts.weights,
                kv_cache=request.blocks_for_one_request * block_bytes,
            )
        held = parts.total + kv_cache
        if held > free:
            return Shortage(
                kind="free",
                free_at_start=free,
                available=free,
                weights=parts.weights,
                overheads=parts.total - parts.weights,
                kv_cache=kv_cache,
            )
        enough = self.free_gpu_memory_fraction - shortfall_of_floor(request, held) / left
        terms = (free, parts.weights, parts.engine_overhead, parts.activations)
        return settle(
            request,
            parts,
            setting=self.free_gpu_memory_fraction,
            requested=share,
            num_blocks=num_blocks,
            block_bytes=block_bytes,
            equation=f"{self.free_gpu_memory_fraction:g} × ({' − '.join(f'{size / GIB:.2f}' for size in terms)})"
            + (f", at most --max-tokens {self.max_tokens}" if self.max_tokens is not None else ""),
            check=(
                f"no start check: {free_in_words(request)}, and what the KV cache leaves, {gib(left - kv_cache)}, "
                f"must hold {gib(parts.cuda_graphs)} of CUDA graphs"
            ),
            held=held,
            gentler=replace(self, free_gpu_memory_fraction=math.floor(enough * 100) / 100),
        )

    def reason(self, request: MemoryRequest, shortage: Shortage) -> str:
        """Return what is missing, with this machine's numbers."""
        setting = f"--free-gpu-memory-fraction {self.free_gpu_memory_fraction:g}"
        if shortage.kind == "request":
            return (
                f"--max-tokens {self.max_tokens} is less than one request of --max-model-len {request.max_model_len}, "
                f"which needs {gib(shortage.kv_cache)} of KV cache"
            )
        if shortage.kind == "share":
            return room_reason(request, shortage, where=f"are available at {setting}, where {free_in_words(request)}", purpose="")
        return room_reason(request, shortage, where="are free", purpose=f"at {setting}" if shortage.kv_room > 0 else "")

    def start_up(self, request: MemoryRequest) -> StartUp:
        """Return how TensorRT-LLM starts: what CUDA calls free after a trial step sizes the KV cache. Source: KvCacheCreator."""
        note = "CUDA's free memory, of which the KV cache gets its share, is MemFree: page cache counts as used."
        return StartUp(
            profiles=True,
            compiles=False,
            builds_kernels=False,
            repacks=True,
            reads="MemFree",
            notes=(note,) if request.hardware.unified else (),
        )

    def starved_blocks(self, request: MemoryRequest, budget: MemoryBudget, lost_bytes: int) -> int:
        """Return the blocks that there would be if `lost_bytes` were missing: the KV cache gets its share of what is left."""
        left = request.free_at_start - budget.weights - budget.engine_overhead - budget.activations - lost_bytes
        return self._num_blocks(request, max(math.floor(left * self.free_gpu_memory_fraction), 0))

    def cautious(self, request: MemoryRequest, budget: MemoryBudget) -> Iterator["TensorRTLLMLedger"]:
        """Yield smaller shares."""
        del request, budget
        now = math.ceil(self.free_gpu_memory_fraction * 100)
        yield from (replace(self, free_gpu_memory_fraction=hundredths / 100) for hundredths in range(now - 1, 0, -1))

    def _num_blocks(self, request: MemoryRequest, share: int) -> int:
        return int(min(share // request.block_bytes, self._most_blocks))

    @property
    def _most_blocks(self) -> float:
        return math.inf if self.max_tokens is None else -(-self.max_tokens // self.tokens_per_block)

    def remedies(self) -> tuple[Remedy, ...]:
        """Return the changes that may help, the mildest first."""
        return (
            _other_fraction,
            _more_tokens,
            shorter_context,
            narrower_kv,
            narrower_weights,
            fewer_batched_tokens,
            fewer_sequences,
            eager,
        )

    def on(self, hardware: HardwareSpec) -> tuple["TensorRTLLMLedger", ...]:
        """Return the ledgers that a user may end up with on another machine: this one."""
        del hardware
        return (self,)


def _other_fraction(request: MemoryRequest) -> Iterator[MemoryRequest]:
    ledger = request.ledger
    assert isinstance(ledger, TensorRTLLMLedger)
    for share in other_shares(ledger.free_gpu_memory_fraction):
        yield replace(request, ledger=replace(ledger, free_gpu_memory_fraction=share))


def _more_tokens(request: MemoryRequest) -> Iterator[MemoryRequest]:
    ledger = request.ledger
    assert isinstance(ledger, TensorRTLLMLedger)
    if ledger.max_tokens is not None and ledger.max_tokens < request.max_model_len:
        yield replace(request, ledger=replace(ledger, max_tokens=request.max_model_len))
