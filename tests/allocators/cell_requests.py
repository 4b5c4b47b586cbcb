"""llama.cpp's allocators and requests for their tests."""

from typing import Any

import numpy as np
import pytest

from pagedkv.allocation import Grant, KVPoolSettings
from pagedkv.allocators import ALLOCATORS
from pagedkv.kv_request import KVRequest
from pagedkv.shadow_memory import check_unchanged, state_of

UNIFIED, SPLIT, OLLAMA = "llama-cpp-unified", "llama-cpp-split", "ollama"
EVERY = pytest.mark.parametrize("name", [UNIFIED, SPLIT, OLLAMA])


def allocator_of(name: str, slots: int, *, seqs: int = 2, longest: int = 16, caching: bool = True, state_slots: int = 0) -> Any:
    return ALLOCATORS.load(name)(
        KVPoolSettings(
            num_blocks=slots,
            block_size=1,
            max_num_seqs=seqs,
            max_model_len=longest,
            enable_prefix_caching=caching,
            state_slots=state_slots,
        )
    )


def request_of(tokens: Any, name: str = "r", **fields: Any) -> KVRequest:
    ids = np.asarray(list(tokens), np.int32)
    return KVRequest(request_id=name, num_tokens=ids.size, token_ids=ids, **fields)


def admit(allocator: Any, request: KVRequest, count: int | None = None) -> Grant | None:
    """Admit `request` with all its tokens, or `count` of those that are not cached, and compute them."""
    new = request.num_tokens - allocator.get_computed_tokens(request) if count is None else count
    return grow(allocator, request, new)


def grow(allocator: Any, request: KVRequest, count: int) -> Grant | None:
    before = state_of((allocator, request))
    grant: Grant | None = allocator.allocate_slots(request, count)
    if grant is None:
        check_unchanged(before, state_of((allocator, request)))
    else:
        request.num_computed_tokens += grant.num_cached_tokens + count
        allocator.note_computed(request)
    allocator.check_integrity()
    return grant


def run(allocator: Any, request: KVRequest) -> int:
    """Run `request` from admission to its end; return its server slot."""
    assert admit(allocator, request) is not None
    slot: int = allocator.server_slots.of(request).index
    allocator.free(request)
    allocator.check_integrity()
    return slot


def slot_of(allocator: Any, request: KVRequest) -> int:
    index: int = allocator.server_slots.of(request).index
    return index


def remembered(allocator: Any) -> list[list[int]]:
    return [slot.tokens.tolist() for slot in allocator.server_slots.slots]


def forked(allocator: Any) -> tuple[KVRequest, KVRequest]:
    parent, child = request_of([1, 2, 3, 4], "parent"), request_of([1, 2, 3, 4], "child")
    admit(allocator, parent)
    allocator.fork(parent, child)
    child.num_computed_tokens = 4
    allocator.check_integrity()
    return parent, child
