"""Requests and groups of layers for the tests of several groups over one pool."""

from collections.abc import Callable
from typing import Any

import numpy as np

from pagedkv.allocation import KVPoolSettings
from pagedkv.block_hash import BlockHashChain
from pagedkv.group_rules import GroupRule
from pagedkv.hybrid_cache_manager import HybridCacheManager
from pagedkv.kv_request import KVRequest

FULL = GroupRule(kind="full", block_size=4)
STATE = GroupRule(kind="state", block_size=4)


def window(size: int, block_size: int = 4) -> GroupRule:
    return GroupRule(kind="sliding_window", block_size=block_size, window=size)


def chunk(size: int, block_size: int = 4) -> GroupRule:
    return GroupRule(kind="chunked", block_size=block_size, window=size)


def request(tokens: Any, name: int | str = "r", block_size: int = 4) -> KVRequest:
    tokens = np.asarray(list(tokens), np.int32)
    chain = BlockHashChain(block_size=block_size)
    chain.extend(tokens)
    return KVRequest(request_id=name, num_tokens=tokens.size, block_keys=chain.keys, token_ids=tokens)


def manager(
    *rules: GroupRule, num_blocks: int = 33, caching: bool = True, batch: int | None = None, **pool: Any
) -> HybridCacheManager:
    pool = {"block_size": 4, "max_model_len": 64, "num_blocks": num_blocks, **pool}
    return HybridCacheManager(KVPoolSettings(**pool), rules, enable_caching=caching, max_num_batched_tokens=batch)


def tables(cache: HybridCacheManager, of: KVRequest) -> list[list[int]]:
    return [cache.block_table(of, group).tolist() for group in range(len(cache.rules))]


def grant(cache: HybridCacheManager, to: KVRequest, num_new_tokens: int, **options: Any) -> int:
    """Look up, allocate and count as computed; return the hit."""
    hits, num_hit_tokens = cache.get_computed_blocks(to) if not cache.block_table(to).size else ((), 0)
    assert cache.allocate_slots(to, num_new_tokens, hits, **options) is not None
    to.num_computed_tokens += num_hit_tokens + num_new_tokens
    cache.check_integrity()
    return num_hit_tokens


def grow(cache: HybridCacheManager, of: KVRequest, *num_new_tokens: int) -> None:
    for count in num_new_tokens:
        grant(cache, of, count)


def is_hit(kind: GroupRule, num_tokens: int, cached: Callable[[int], bool]) -> bool:
    """Whether every block that a query behind `num_tokens` reads is cached: told token by token."""
    last = num_tokens - 1
    reads = {
        "full": range(num_tokens),
        "state": range(max(last, 0), num_tokens),
        "sliding_window": range(max(0, num_tokens - (kind.window or 0) + 1), num_tokens),
        "chunked": [t for t in range(num_tokens) if kind.window and t // kind.window == num_tokens // kind.window],
    }[kind.kind]
    return all(cached(token // kind.block_size) for token in reads)
