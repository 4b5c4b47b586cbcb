"""Reserve the longest request that could come: Orca (Max) in the PagedAttention paper, and most engines before it."""

from pagedkv.allocation import KVPoolSettings
from pagedkv.allocators import ALLOCATORS
from pagedkv.contiguous_allocator import ContiguousAllocator


@ALLOCATORS.register("contiguous-max")
def contiguous_max(settings: KVPoolSettings) -> ContiguousAllocator:
    """Return an allocator that reserves max_model_len slots for every request."""
    return ContiguousAllocator("contiguous-max", settings, reservation=lambda prompt, output: settings.max_model_len)
