"""Prompts one after another through a prefix cache: what each finds there. One request at a time, so nobody competes for room."""

from collections import OrderedDict
from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from pagedkv.allocation import KVPoolSettings
from pagedkv.arrays import Int64Array
from pagedkv.kv_cache_manager import KVCacheManager
from pagedkv.kv_request import KVRequest
from pagedkv.radix_tree import RadixTree
from pagedkv.sims.prompt_content import PromptContent
from pagedkv.slot_allocator import SlotAllocator

Replay: TypeAlias = Callable[[PromptContent, Int64Array, int, str], tuple[Int64Array, Int64Array]]
"""From prompts, their lengths in tokens, a capacity in blocks and an eviction policy: blocks and tokens found, by prompt."""


def replay_ideal_lru(
    prompts: PromptContent, prompt_tokens: Int64Array, capacity: int, eviction: str = "lru"
) -> tuple[Int64Array, Int64Array]:
    """Replay an ideal cache, in which partial blocks and last tokens count as found too. Its policy is lru, whatever is asked for.

    Each prompt's blocks are used in order; then the least recently used go until `capacity` are left. O(blocks of all prompts).
    """
    cached = OrderedDict[int, None]()  # the least recently used first
    found = np.zeros(len(prompts), np.int64)
    for i in range(len(prompts)):
        ids = prompts.of(i).tolist()
        found[i] = next((n for n, block in enumerate(ids) if block not in cached), len(ids))
        for block in ids:
            cached[block] = None
            cached.move_to_end(block)
        while len(cached) > capacity:
            cached.popitem(last=False)
    return found, np.minimum(found * prompts.tokens_per_id, prompt_tokens)


def replay_block_pool(
    prompts: PromptContent, prompt_tokens: Int64Array, capacity: int, eviction: str
) -> tuple[Int64Array, Int64Array]:
    """Replay vLLM's block pool with `capacity` blocks besides the null block.

    Only full blocks are kept, and the last token of a prompt is always computed. A prompt that is longer than the pool finds
    nothing and leaves nothing. O(blocks of all prompts) under lru.
    """
    manager = KVCacheManager(
        KVPoolSettings(
            num_blocks=capacity + 1,
            block_size=prompts.tokens_per_id,
            max_num_seqs=1,
            max_model_len=int(prompt_tokens.max()),
            eviction=eviction,
        )
    )
    keys = np.zeros((prompts.ids.size, 2), np.uint64)
    keys[:, 0] = prompts.ids  # an id stands for all before it, as a key does
    found, offsets = np.zeros(len(prompts), np.int64), prompts.offsets.tolist()
    for i, num_tokens in enumerate(prompt_tokens.tolist()):
        request = KVRequest(request_id=i, num_tokens=num_tokens, block_keys=keys[offsets[i] : offsets[i + 1]])
        hits, num_cached = manager.get_computed_blocks(request)
        if manager.allocate_slots(request, num_tokens - num_cached, hits) is not None:
            manager.free(request)
            found[i] = hits.size
    return found, found * prompts.tokens_per_id


def replay_radix(prompts: PromptContent, prompt_tokens: Int64Array, capacity: int, eviction: str) -> tuple[Int64Array, Int64Array]:
    """Replay SGLang's radix tree with room for `capacity` blocks, each one token of the tree.

    Partial blocks are kept as well, but the last token of a prompt is always computed. Whole leaves go when room is needed. A
    prompt that is longer than the tree's room finds nothing and leaves nothing. An eviction is O(nodes freed * log leaves).
    """
    tree, slots = RadixTree(eviction=eviction), SlotAllocator(num_blocks=capacity)
    tokens = np.unique(prompts.ids, return_inverse=True)[1].astype(np.int32)
    found, offsets = np.zeros(len(prompts), np.int64), prompts.offsets.tolist()
    for i in range(len(prompts)):
        prompt = tokens[offsets[i] : offsets[i + 1]]
        if prompt.size > capacity:
            continue
        match = tree.match_prefix(prompt)
        found[i] = match.slots.size
        tree.inc_lock_ref(match.node)
        shortage = tree.total_size + prompt.size - match.slots.size - capacity
        for segment in tree.evict(shortage) if shortage > 0 else ():
            slots.free_segment(segment)
        own = slots.alloc(prompt.size - match.slots.size)
        assert own is not None  # only the prompt's own prefix is locked, and all of it has room
        tree.insert(prompt, np.concatenate((match.slots, own)), held=match.slots.size)
        tree.dec_lock_ref(match.node)
    return found, np.minimum(found * prompts.tokens_per_id, prompt_tokens - 1)


REPLAYS: dict[str, Replay] = {"block-pool": replay_block_pool, "radix": replay_radix, "ideal-lru": replay_ideal_lru}
"""The caches by name."""
