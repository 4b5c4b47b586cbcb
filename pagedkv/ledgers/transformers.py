"""transformers: no memory is set aside for anything; the KV cache of a call of `generate` may take all that is free by then.

free = visible - operating system and other programs; KV cache x (1 + c) = free - weights - process overhead - activations of the
padded prompts of a batch, which are computed whole. c is what enlarging a cache takes besides: `DynamicCache` concatenates tensor
by tensor, and the old one lives until the new one is written. So c is the widest tensor's share of a token: with L equal layers
1 / (2 L), keys and values being apart. A static cache could use that too; here both get the same bytes.
CUDA graphs there are none. Nothing is checked at the start: what does not fit fails when it comes.

Not modelled: models with latent attention, whose keys and values transformers caches expanded; quantized and offloaded caches;
fragmentation within torch's allocator.
Source: transformers 5, cache_utils (DynamicLayer.update, StaticLayer); peaks measured in docs/runtime.md.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from pagedkv.errors import ConfigError
from pagedkv.hardware_spec import HardwareSpec
from pagedkv.kv_spec import KV_CACHE_DTYPES, KVCacheSpec, kv_element_pair_bytes
from pagedkv.ledgers import LEDGERS
from pagedkv.ledgers._shared import EngineParts, free_in_words, room_reason, settle
from pagedkv.memory_budget import MemoryBudget, Shortage
from pagedkv.memory_request import MemoryRequest, Remedy
from pagedkv.remedies import fewer_batched_tokens, fewer_sequences, narrower_weights, shorter_context
from pagedkv.start_up import StartUp
from pagedkv.units import GIB, gib


def widest_tensor_bytes(spec: KVCacheSpec) -> int:
    """Return the bytes of a token in the widest of the tensors that a dynamic cache consists of: the keys or values of a layer."""
    pair = kv_element_pair_bytes(spec.dtype_name)
    widest = max(
        group.num_kv_heads * max(group.key_dim * pair[0], group.value_dim * pair[1]) / group.compression for group in spec.groups
    )
    return math.ceil(widest)


@LEDGERS.register("transformers")
@dataclass(frozen=True, slots=True, kw_only=True)
class TransformersLedger:
    """transformers' memory settings, of which there are none. The padded prompts are `MemoryRequest.max_num_batched_tokens`."""

    @property
    def block_size(self) -> int:
        """A tensor grows by single tokens."""
        return 1

    @property
    def null_blocks(self) -> int:
        """Every slot can be held."""
        return 0

    @property
    def windows_apart(self) -> bool:
        """All layers have blocks."""
        return False

    @property
    def weight_formats(self) -> tuple[str, ...]:
        """Narrower weight formats to propose."""
        return ("fp8", "int4")

    def check(self, request: MemoryRequest) -> None:
        """Refuse element types that the cache does not have: it stores what the model computes.

        Raises:
            ConfigError: With the types that work.
        """
        if any(size != 2 for size in kv_element_pair_bytes(request.kv_cache_dtype)):
            known = ", ".join(name for name, size in KV_CACHE_DTYPES.items() if size == 2)
            raise ConfigError(f"--kv-cache-dtype {request.kv_cache_dtype} is not for this engine: use {known}")

    def attempt(self, request: MemoryRequest) -> MemoryBudget | Shortage:
        """Return the budget, or why there is none. The values have been checked.

        What enlarging the cache takes for a moment counts as activations.
        """
        free, block_bytes = request.free_at_start, request.block_bytes
        parts = EngineParts.on_torch(replace(request, enforce_eager=True))
        copied = widest_tensor_bytes(request.model.kv_spec(request.kv_cache_dtype))
        num_blocks, least = max(free - parts.total, 0) // (block_bytes + copied), request.blocks_for_one_request
        if num_blocks < least:
            return Shortage(
                kind="free",
                free_at_start=free,
                available=free,
                weights=parts.weights,
                overheads=parts.total - parts.weights + least * copied,
                kv_cache=least * block_bytes,
            )
        terms = " − ".join(f"{size / GIB:.2f}" for size in (free, parts.weights, parts.engine_overhead, parts.activations))
        parts = replace(parts, activations=parts.activations + num_blocks * copied)
        held = parts.total + num_blocks * block_bytes
        return settle(
            request,
            parts,
            setting=held / request.hardware.visible_bytes,
            requested=held,
            num_blocks=num_blocks,
            block_bytes=block_bytes,
            equation=f"({terms}) / {1 + copied / block_bytes:.4f}",
            check=(
                f"no start check: {free_in_words(request)}; the KV cache takes it as requests come, and besides, while it is "
                f"enlarged, {copied / block_bytes:.2%} of itself ({gib(num_blocks * copied)} of the activations); what does not "
                f"fit fails"
            ),
            held=held,
        )

    def reason(self, request: MemoryRequest, shortage: Shortage) -> str:
        """Return what is missing, with this machine's numbers."""
        return room_reason(request, shortage, where=free_in_words(request).partition(" GiB ")[2], purpose="")

    def start_up(self, request: MemoryRequest) -> StartUp:
        """Return how transformers starts: it maps the files and measures nothing."""
        del request
        return StartUp(profiles=False, compiles=False, builds_kernels=False, repacks=False, reads=None)

    def starved_blocks(self, request: MemoryRequest, budget: MemoryBudget, lost_bytes: int) -> int:
        """Return the slots: the cache takes what is free when it grows."""
        del request, lost_bytes
        return budget.num_blocks

    def cautious(self, request: MemoryRequest, budget: MemoryBudget) -> Iterator["TransformersLedger"]:
        """Yield nothing: there is nothing to set."""
        del request, budget
        yield from ()

    def remedies(self) -> tuple[Remedy, ...]:
        """Return the changes that may help, the mildest first."""
        return (shorter_context, narrower_weights, fewer_batched_tokens, fewer_sequences)

    def on(self, hardware: HardwareSpec) -> tuple["TransformersLedger", ...]:
        """Return the ledgers that a user may end up with on another machine: this one."""
        del hardware
        return (self,)
