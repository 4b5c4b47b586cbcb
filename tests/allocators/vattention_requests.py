"""Requests of a vAttention allocator, and what its rows and pages are."""

from typing import Any

from pagedkv.allocation import KVPoolSettings
from pagedkv.allocators.vattention import VAttentionAllocator
from pagedkv.kv_request import KVRequest

PAGE = 4


def allocator(num_pages: int = 8, max_num_seqs: int = 4, max_model_len: int = 32, **settings: Any) -> VAttentionAllocator:
    pool = KVPoolSettings(
        num_blocks=num_pages, block_size=PAGE, page_tokens=PAGE, max_num_seqs=max_num_seqs, max_model_len=max_model_len, **settings
    )
    return VAttentionAllocator(pool)


def grow(vattention: VAttentionAllocator, request: KVRequest, tokens: int, *, busy: bool = False) -> bool:
    """Let `request` know and compute `tokens` more; False if they do not fit."""
    known = request.num_tokens
    request.num_tokens = max(known, request.num_computed_tokens + tokens)
    grant = vattention.allocate_slots(request, tokens, has_scheduled_reqs=busy)
    vattention.check_integrity()
    if grant is None:
        request.num_tokens = known
        return False
    assert grant.num_cached_tokens == len(grant.copies) == 0
    request.num_computed_tokens += tokens
    return True


def admitted(vattention: VAttentionAllocator, *tokens: int) -> list[KVRequest]:
    requests = [KVRequest(request_id=i, num_tokens=n) for i, n in enumerate(tokens)]
    for request, n in zip(requests, tokens, strict=True):
        assert grow(vattention, request, n)
    return requests


def free(vattention: VAttentionAllocator, *requests: KVRequest) -> None:
    for request in requests:
        vattention.free(request)
        vattention.check_integrity()


def mapped(vattention: VAttentionAllocator) -> list[int]:
    return [int(pages) for pages in vattention.pages.arrays.num_mapped]


def row(vattention: VAttentionAllocator, request: KVRequest) -> int:
    return vattention._rows[request]


def state(vattention: VAttentionAllocator) -> Any:
    pages = {name: array.tolist() for name, array in vattention.pages.arrays._asdict().items()}
    rows = {request.request_id: (request.num_computed_tokens, place) for request, place in vattention._rows.items()}
    return rows, pages
