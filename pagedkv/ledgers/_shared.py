"""What the ledgers share: settling the eight parts, and the words for what is free and for what is missing."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from pagedkv.activation_peak import activation_bytes
from pagedkv.errors import ConfigError
from pagedkv.kv_spec import KV_CACHE_DTYPES, kv_element_pair_bytes
from pagedkv.memory_budget import MemoryBudget, Shortage
from pagedkv.memory_request import Ledger, MemoryRequest
from pagedkv.remedies import longest_context
from pagedkv.request_flags import as_flags
from pagedkv.units import GIB, gib


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineParts:
    """What an engine holds beside the KV cache, in bytes."""

    weights: int
    """The model's weights."""
    engine_overhead: int
    """Libraries and buffers."""
    activations: int
    """Peak of a forward pass."""
    cuda_graphs: int
    """Captured graphs."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.engine_overhead + self.activations + self.cuda_graphs

    @classmethod
    def on_torch(cls, request: MemoryRequest) -> "EngineParts":
        """Return the parts of an engine built on PyTorch, as vLLM's were measured."""
        peak = activation_bytes(
            request.model, max_num_batched_tokens=request.max_num_batched_tokens, max_num_seqs=request.max_num_seqs
        )
        return cls(
            weights=request.weight_bytes,
            engine_overhead=int(request.hardware.engine_overhead.value),
            activations=peak,
            cuda_graphs=0 if request.enforce_eager else int(request.hardware.cuda_graphs.value),
        )


def settle(
    request: MemoryRequest,
    parts: EngineParts,
    *,
    setting: float,
    requested: int,
    num_blocks: int,
    block_bytes: int,
    equation: str,
    check: str,
    held: int,
    gentler: Ledger | None = None,
    state_bytes: int = 0,
    window_bytes: int = 0,
    window_cells: int = 0,
    checkpoint_bytes: int = 0,
) -> MemoryBudget:
    """Return the budget of a request that fits.

    Args:
        request: What was asked for.
        parts: What the engine holds beside the KV cache.
        setting: The engine's own share, `MemoryBudget.utilization`.
        requested: What that share allows the engine, in bytes.
        num_blocks: Blocks of the pool, null blocks included.
        block_bytes: Bytes of a block.
        equation: How the size of the KV cache comes about, without the result.
        check: What the engine checks when it starts.
        held: What the engine may come to hold, in bytes; what it leaves is compared with the machine's floor.
        gentler: Settings that should leave the floor free, for the warning; named if they do.
        state_bytes: Bytes of sequence states that the engine reserves beside the blocks.
        window_bytes: Bytes of a cache that layers with a window have of their own.
        window_cells: Tokens that it has room for.
        checkpoint_bytes: Bytes of a copy of one sequence's window.
    """
    kv_cache = num_blocks * block_bytes + state_bytes + window_bytes
    os_reserve, other_programs = request.taken_by_others
    free = request.free_at_start
    return MemoryBudget(
        visible=request.hardware.visible_bytes,
        utilization=setting,
        requested=requested,
        weights=parts.weights,
        engine_overhead=parts.engine_overhead,
        activations=parts.activations,
        cuda_graphs=parts.cuda_graphs,
        kv_cache=kv_cache,
        os_reserve=os_reserve,
        other_programs=other_programs,
        unassigned=free - parts.total - kv_cache,
        free_at_start=free,
        block_size=request.ledger.block_size,
        block_bytes=block_bytes,
        kv_bytes_per_token=request.kv_bytes_per_token,
        num_blocks=num_blocks,
        null_blocks=request.ledger.null_blocks,
        window_bytes=window_bytes,
        window_cells=window_cells,
        window_tokens=0 if (apart := request.window_spec) is None else apart.longest_window,
        checkpoint_bytes=checkpoint_bytes,
        equation=f"KV cache = {equation} = {gib(kv_cache)}",
        gate=check + _left_for_the_system(request, held),
        warnings=_warnings(request, held, gentler),
    )


def free_in_words(request: MemoryRequest, *, of: str = "") -> str:
    """Return how much (of `of`) is free when the engine starts, and why."""
    os_reserve, other_programs = request.taken_by_others
    free, visible = gib(max(request.free_at_start, 0)) + (f" of {of}" if of else ""), f"{request.hardware.visible_bytes / GIB:.2f}"
    if request.free_memory_bytes is not None:
        return f"{free} are free (--free-memory)"
    others = f"{other_programs / GIB:.2f} of other programs"
    if request.hardware.unified or os_reserve:
        others = f"{os_reserve / GIB:.2f} of the operating system and {others}"
    return f"{free} are free ({visible} visible less {others})"


def shortfall_of_floor(request: MemoryRequest, held: int) -> int:
    """Return the bytes that the engine would have to give up for the machine to keep its floor; 0 if it does keep it."""
    return max(int(request.hardware.memory_floor.value) - (request.free_at_start - held), 0)


def _left_for_the_system(request: MemoryRequest, held: int) -> str:
    if not request.hardware.memory_floor.value:
        return ""
    return f"; {gib(request.free_at_start - held)} stay free, and the machine's floor is {gib(request.hardware.memory_floor.value)}"


def _warnings(request: MemoryRequest, held: int, gentler: Ledger | None) -> tuple[str, ...]:
    """Return a warning if what engine (`held`), operating system and programs leave is below the machine's floor."""
    if not shortfall_of_floor(request, held):
        return ()
    hardware, remedy = request.hardware, ""
    changed = gentler is not None and gentler != request.ledger  # it may have been as gentle as can be
    if (
        gentler is not None
        and changed
        and isinstance(outcome := (change := replace(request, ledger=gentler)).attempt(), MemoryBudget)
    ):
        remedy = "" if outcome.warnings else f"; {as_flags(request, change)} leaves enough"
    return (
        f"engine, operating system and other programs leave {gib(request.free_at_start - held)} of {hardware.title}'s memory; "
        f"below {gib(hardware.memory_floor.value)} the machine may freeze ({hardware.memory_floor.source}){remedy}",
    )


def room_reason(request: MemoryRequest, shortage: Shortage, *, where: str, purpose: str) -> str:
    """Return what is needed, what there is, and where it goes.

    Args:
        request: What was asked for.
        shortage: What came of it.
        where: Whence the available memory, e.g. "are available at --gpu-memory-utilization 0.8".
        purpose: What sizes the KV cache, e.g. "for --ctx-size 4096"; empty: one request of `max_model_len`.
    """
    needed = shortage.weights + shortage.overheads + shortage.kv_cache
    if not purpose:
        longest = longest_context(request)
        purpose = f"for one request of --max-model-len {request.max_model_len}"
        purpose += f" ({longest} is the longest that fits)" if longest else " (no length fits)"
    overheads = f", {gib(shortage.overheads)} of engine, activations and CUDA graphs" if shortage.overheads else ""
    available = gib(max(shortage.available, 0))
    return (
        f"{request.model.title} needs {gib(needed)} on {request.hardware.title}, but {available} {where}: "
        f"{gib(shortage.weights)} of weights in {request.weight_format.name}{overheads}, "
        f"{gib(shortage.kv_cache)} of KV cache {purpose}"
    )


def other_shares(now: float) -> Iterator[float]:
    """Yield the hundredths above `now`, the nearest first, and then those below."""
    yield from (hundredths / 100 for hundredths in range(math.floor(now * 100) + 1, 100))
    yield from (hundredths / 100 for hundredths in range(math.ceil(now * 100) - 1, 0, -1))


def check_kv_cache_dtype(request: MemoryRequest, *, quantized: bool) -> None:
    """Refuse element types that the engine lacks: `quantized` ones are llama.cpp's, FP8 is the others'.

    Raises:
        ConfigError: With the types that the engine has.
    """
    pair = kv_element_pair_bytes(request.kv_cache_dtype)
    if not all(size == 2 or (size != 1 if quantized else size == 1) for size in pair):
        known = [name for name, size in KV_CACHE_DTYPES.items() if size == 2 or (size != 1 if quantized else size == 1)]
        raise ConfigError(f"--kv-cache-dtype {request.kv_cache_dtype} is not for this engine: use {', '.join(known)}")


def check_share(flag: str, value: float) -> None:
    """Refuse a share that is none.

    Raises:
        ConfigError: With the range that would work.
    """
    if not 0 < value <= 1:
        raise ConfigError(f"{flag} {value} must be above 0 and at most 1")
