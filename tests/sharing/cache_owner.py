"""A cache manager as its owner uses it: requests that are served, forked and go on."""

from typing import Any

import numpy as np

from pagedkv.allocation import KVPoolSettings
from pagedkv.block_hash import BlockHashChain
from pagedkv.kv_cache_manager import KVCacheManager
from pagedkv.kv_request import KVRequest

SIZE = 4


def request(tokens: Any, name: str = "r", *, unit: int = 0, priority: int = 0) -> KVRequest:
    ids = np.array(list(tokens), np.int32)
    chain, units = BlockHashChain(block_size=SIZE), BlockHashChain(block_size=unit or SIZE)
    chain.extend(ids)
    units.extend(ids)
    return KVRequest(
        request_id=name, num_tokens=ids.size, token_ids=ids, block_keys=chain.keys, unit_keys=units.keys, priority=priority
    )


def pool(num_blocks: int = 9, **more: Any) -> KVPoolSettings:
    return KVPoolSettings(num_blocks=num_blocks, block_size=SIZE, max_model_len=32, **more)


def serve(cache: KVCacheManager, live: KVRequest, num_new_tokens: int | None = None, **more: Any) -> list[int] | None:
    """Allocate and count as computed what was asked for, all known tokens by default; return the blocks it has then."""
    hits, tail = cache.get_computed_blocks(live)[0], None
    if not cache.holds_blocks(live):
        tail = cache.get_computed_tail(live, hits.size)
    else:
        hits = hits[:0]
    cached = hits.size * SIZE + (tail.num_tokens if tail else 0)
    new = live.num_tokens - cached - live.num_computed_tokens if num_new_tokens is None else num_new_tokens
    if cache.allocate_slots(live, new, hits, computed_tail=tail, **more) is None:
        return None
    live.num_computed_tokens += cached + new
    cache.note_computed(live)
    cache.check_integrity()
    return cache.block_table(live).tolist()


def fork(cache: KVCacheManager, parent: KVRequest, child: KVRequest) -> None:
    """As an owner does it."""
    cache.fork(parent, child)
    assert child.num_computed_tokens == 0  # that is the owner's
    child.num_computed_tokens = parent.num_computed_tokens


def goes_on(live: KVRequest, tokens: Any, *, unit: int = 0) -> None:
    longer = request([*live.token_ids.tolist(), *tokens], unit=unit)
    live.num_tokens, live.token_ids = longer.num_tokens, longer.token_ids
    live.block_keys, live.unit_keys = longer.block_keys, longer.unit_keys
