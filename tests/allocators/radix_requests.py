"""SGLang's memory as an allocator, and requests for its tests."""

from typing import Any

import numpy as np

from pagedkv.allocation import KVPoolSettings
from pagedkv.allocators import ALLOCATORS
from pagedkv.allocators.radix import RadixAllocator
from pagedkv.kv_request import KVRequest


def pool(usable_blocks: int, **changes: Any) -> RadixAllocator:
    """An allocator with so many blocks besides the padding, of one slot unless told otherwise."""
    wanted = {"block_size": 1, "max_model_len": 64, "enable_prefix_caching": True, **changes}
    allocator = ALLOCATORS.load("radix")(KVPoolSettings(num_blocks=usable_blocks + 1, **wanted))
    assert isinstance(allocator, RadixAllocator)
    return allocator


def known(*tokens: int, **changes: Any) -> KVRequest:
    return KVRequest(request_id=str(tokens), num_tokens=len(tokens), token_ids=np.array(tokens, np.int32), **changes)


def grow(allocator: RadixAllocator, request: KVRequest, num_tokens: int | None = None) -> int:
    """Let it compute `num_tokens` (by default all that are known) as far as granted; return its cached ones, -1 if refused."""
    cached = 0 if request.num_computed_tokens else allocator.get_computed_tokens(request)
    new = request.num_tokens - request.num_computed_tokens - cached if num_tokens is None else num_tokens
    grant = allocator.allocate_slots(request, new)
    if grant is None:
        return -1
    request.num_computed_tokens += grant.num_cached_tokens + new
    return grant.num_cached_tokens


def run(allocator: RadixAllocator, request: KVRequest, *outputs: int) -> None:
    """Prefill it, then decode: the last output is not computed."""
    assert grow(allocator, request) >= 0
    allocator.note_computed(request)
    for output in outputs:
        if request.num_tokens > request.num_computed_tokens:
            assert grow(allocator, request) >= 0
            allocator.note_computed(request)
        request.token_ids = np.append(request.token_ids, np.int32(output))
        request.num_tokens += 1


def serve(allocator: RadixAllocator, request: KVRequest, *outputs: int) -> None:
    """Run it to its end."""
    run(allocator, request, *outputs)
    allocator.free(request)


def contents(allocator: RadixAllocator) -> object:
    """All that a lookup must leave: who holds what, the free list in order, and every stored token with its slot."""
    tree = allocator.cache.tree
    ends = [node for node in tree.root.below() if not node.children]
    stored = [
        (n.namespace, *(np.concatenate([getattr(m, part) for m in n.path()]).tolist() for part in ("tokens", "slots")))
        for n in ends
    ]
    held = [(r.request_id, r.num_computed_tokens, allocator.slots_held(r).tolist()) for r in allocator.live_requests()]
    return allocator.cache.slots.free_list().tolist(), stored, held, allocator.free_slots, sorted(allocator.cached_slots().tolist())


def everything(allocator: RadixAllocator) -> object:
    """That, and what eviction goes by."""
    nodes = [(repr(n), n.last_access, n.created, n.hit_count, n.priority, n.deepest) for n in allocator.cache.tree.root.below()]
    return contents(allocator), nodes
