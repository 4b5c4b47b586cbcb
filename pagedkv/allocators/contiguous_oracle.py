"""Reserve what the request will turn out to need: Orca (Oracle) in the PagedAttention paper, the best that contiguous can do."""

from pagedkv.allocation import KVPoolSettings
from pagedkv.allocators import ALLOCATORS
from pagedkv.contiguous_allocator import ContiguousAllocator


@ALLOCATORS.register("contiguous-oracle")
def contiguous_oracle(settings: KVPoolSettings) -> ContiguousAllocator:
    """Return an allocator that reserves prompt + output slots, knowing the output's true length in advance."""
    return ContiguousAllocator("contiguous-oracle", settings, reservation=lambda prompt, output: prompt + output)
