"""How blocks move between tables, the free queue and the prefix cache: compiled functions over a pool's arrays."""

from pagedkv.arrays import Int32Array
from pagedkv.block_hash import BlockKeys
from pagedkv.free_queue import (
    FIRST,
    HEAD,
    HELD,
    NULL_BLOCK,
    NUM_FREE,
    NUM_KEYED,
    NUM_SHARES,
    SPAN,
    Blocks,
    FreeQueue,
    make_room,
    put_behind,
    put_in_front,
    take_out,
)
from pagedkv.jit import lean_jit
from pagedkv.prefix_cache import Buckets, KeyIndex, find_prefix, insert_block, remove_block

_MARKED = -1


@lean_jit
def take_blocks(
    blocks: Blocks, queue: FreeQueue, index: KeyIndex, buckets: Buckets, num_blocks: int, table: Int32Array, offset: int
) -> bool:
    """Move the first `num_blocks` of the free queue to table[offset:]; return False, and change nothing, if there are fewer.

    A block that carried a key loses it, since its content will be overwritten. O(num_blocks) expected.
    """
    if num_blocks > queue[NUM_FREE]:
        return False
    ref_cnt, place, next_same = blocks["ref_cnt"], blocks["place"], blocks["next_same"]
    head, span, capacity = queue[HEAD], queue[SPAN], queue.size - FIRST
    taken = 0
    while taken < num_blocks:
        block = queue[FIRST + head]
        head = head + 1 if head + 1 < capacity else 0
        span -= 1
        if block == NULL_BLOCK:
            continue
        if next_same[block] != NULL_BLOCK:
            remove_block(blocks, index, buckets, block)
            queue[NUM_KEYED] -= 1
        place[block] = HELD
        ref_cnt[block] = 1
        table[offset + taken] = block
        taken += 1
    queue[HEAD], queue[SPAN] = head, span
    queue[NUM_FREE] -= num_blocks
    return True


@lean_jit
def release_blocks(blocks: Blocks, queue: FreeQueue, table: Int32Array, num_blocks: int) -> int:
    """Drop one reference to each of table[:num_blocks], from the last to the first. O(num_blocks).

    Those that nobody holds any more: without a key they go to the front of the free queue as one batch in this order, so that the
    tail is handed out first; with a key they keep it and go, in this order, to the back.

    Returns:
        -1, or the place in `table` of a block that is not of this pool or has no reference left: then nothing has changed.
    """
    ref_cnt, place, next_same = blocks["ref_cnt"], blocks["place"], blocks["next_same"]
    with_key = shares = 0
    for i in range(num_blocks):
        block = table[i]
        if not NULL_BLOCK < block < ref_cnt.size or ref_cnt[block] == 0:
            for k in range(i):
                ref_cnt[table[k]] += 1
            return i
        ref_cnt[block] -= 1
        shares += ref_cnt[block] > 0
        with_key += next_same[block] != NULL_BLOCK
    queue[NUM_SHARES] -= shares
    make_room(blocks, queue, num_blocks)
    head, freed, capacity = queue[HEAD], 0, queue.size - FIRST
    for i in range(num_blocks):  # each in front of the one before it: the tail ends up first
        block = table[i]
        if ref_cnt[block] == 0 and place[block] == HELD and next_same[block] == NULL_BLOCK:
            head = head - 1 if head > 0 else capacity - 1
            queue[FIRST + head] = block
            place[block] = head
            freed += 1
    queue[HEAD] = head
    queue[SPAN] += freed
    queue[NUM_FREE] += freed
    if with_key > 0:
        for i in range(num_blocks - 1, -1, -1):
            block = table[i]
            if ref_cnt[block] == 0 and place[block] == HELD:
                put_behind(blocks, queue, block)
                queue[NUM_KEYED] += 1
    return -1


@lean_jit
def release_behind(blocks: Blocks, queue: FreeQueue, table: Int32Array, num_blocks: int) -> None:
    """Drop one reference to each of table[:num_blocks], from the last to the first; all go to the back: vLLM 0.19's order."""
    make_room(blocks, queue, num_blocks)
    for i in range(num_blocks - 1, -1, -1):
        blocks["ref_cnt"][table[i]] -= 1
        if blocks["ref_cnt"][table[i]] == 0:
            put_behind(blocks, queue, table[i])
            queue[NUM_KEYED] += blocks["next_same"][table[i]] != NULL_BLOCK
        else:
            queue[NUM_SHARES] -= 1


@lean_jit
def register_blocks(
    blocks: Blocks, index: KeyIndex, buckets: Buckets, table: Int32Array, keys: BlockKeys, first: int, last: int
) -> bool:
    """Let table[first:last] carry keys[first:last]; return False, and change nothing, unless all are held and carry none yet."""
    ref_cnt, next_same = blocks["ref_cnt"], blocks["next_same"]
    for i in range(first, last):
        block = table[i]
        if not NULL_BLOCK < block < ref_cnt.size or ref_cnt[block] == 0 or next_same[block] != NULL_BLOCK:
            for k in range(first, i):
                next_same[table[k]] = NULL_BLOCK
            return False
        next_same[block] = _MARKED  # so that a block which is there twice is noticed
    for i in range(first, last):
        insert_block(blocks, index, buckets, table[i], keys, i)
    return True


@lean_jit
def touch_blocks(blocks: Blocks, queue: FreeQueue, table: Int32Array) -> None:
    """Add one reference to each of `table`; those that nobody held leave the free queue, wherever they are. O(table.size)."""
    for block in table:
        if blocks["ref_cnt"][block] == 0:
            take_out(blocks, queue, block)
            queue[NUM_KEYED] -= blocks["next_same"][block] != NULL_BLOCK
        else:
            queue[NUM_SHARES] += 1
        blocks["ref_cnt"][block] += 1


@lean_jit
def hold_prefix(blocks: Blocks, queue: FreeQueue, index: KeyIndex, buckets: Buckets, keys: BlockKeys, hits: Int32Array) -> int:
    """Write the cached blocks of the longest run of `keys` from its start into `hits`, hold each once more, return their number."""
    num_hits = find_prefix(index, buckets, keys, hits)
    touch_blocks(blocks, queue, hits[:num_hits])
    return num_hits


@lean_jit
def evict_blocks(blocks: Blocks, queue: FreeQueue, index: KeyIndex, buckets: Buckets, victims: Int32Array) -> None:
    """Take the keys of `victims`, which are free, and let them be handed out next, in this order. O(victims.size) expected."""
    make_room(blocks, queue, victims.size)
    queue[NUM_KEYED] -= victims.size
    for i in range(victims.size - 1, -1, -1):
        remove_block(blocks, index, buckets, victims[i])
        take_out(blocks, queue, victims[i])
        put_in_front(blocks, queue, victims[i])
