"""Reserve the prompt and the next power of two of the output: Orca (Pow2) in the PagedAttention paper.

It knows the output's length up to a factor of two, which no real engine does.
"""

from pagedkv.allocation import KVPoolSettings
from pagedkv.allocators import ALLOCATORS
from pagedkv.contiguous_allocator import ContiguousAllocator


@ALLOCATORS.register("contiguous-pow2")
def contiguous_pow2(settings: KVPoolSettings) -> ContiguousAllocator:
    """Return an allocator that reserves prompt + 2**ceil(log2(output)) slots, at most max_model_len."""
    return ContiguousAllocator(
        "contiguous-pow2",
        settings,
        reservation=lambda prompt, output: min(prompt + (1 << (output - 1).bit_length()), settings.max_model_len),
    )
