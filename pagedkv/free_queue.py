"""The blocks that nobody holds, in the order in which they will be handed out: a double-ended queue in one array.

A block knows its place in the queue, so it can leave from the middle: its entry becomes empty and is skipped later. When the ring
has no room for more entries, the empty ones are squeezed out; it has two places per block, so that costs O(1) per entry.
"""

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from pagedkv.arrays import Int32Array
from pagedkv.errors import IntegrityError
from pagedkv.jit import lean_jit

NULL_BLOCK = 0
"""Never handed out. It stands for "no block" in tables, and for an empty entry of the queue."""
HELD = -1
"""The place of a block that is not in the queue."""

BLOCK = np.dtype([("ref_cnt", "<i4"), ("place", "<i4"), ("next_same", "<i4"), ("prev_same", "<i4")])
"""What is known of a block: how many tables hold it, its place in the queue, and its neighbours among the blocks that carry the
same key (`pagedkv.prefix_cache`; next_same is 0 while it carries none). A block is in the queue exactly when nobody holds it."""

Blocks: TypeAlias = npt.NDArray[np.void]
"""`BLOCK` [num_blocks]; the entry of the null block is never used."""
FreeQueue: TypeAlias = Int32Array
"""[FIRST + 2 * num_blocks]: some numbers, then the ring of block ids."""

NUM_FREE, HEAD, SPAN, NUM_KEYED, NUM_SHARES, FIRST = 0, 1, 2, 3, 4, 8
"""In a queue: blocks in it; place of the first entry; entries, empty ones included; those of its blocks that carry a key;
references to held blocks beyond the first of each; where the ring begins."""


def new_queue(num_blocks: int) -> tuple[Blocks, FreeQueue]:
    """Return `num_blocks` blocks, all but the null block free, in ascending order."""
    blocks = np.zeros(num_blocks, BLOCK)
    blocks["place"] = np.arange(-1, num_blocks - 1)
    queue = np.zeros(FIRST + 2 * num_blocks, np.int32)
    queue[NUM_FREE] = queue[SPAN] = num_blocks - 1
    queue[FIRST : FIRST + num_blocks - 1] = np.arange(1, num_blocks)
    return blocks, queue


@lean_jit
def make_room(blocks: Blocks, queue: FreeQueue, num_entries: int) -> None:
    """See that `num_entries` more fit into the ring. O(1) amortised per entry."""
    capacity = queue.size - FIRST
    if queue[SPAN] + num_entries <= capacity:
        return
    place = blocks["place"]
    read = write = queue[HEAD]
    for _ in range(queue[SPAN]):
        block = queue[FIRST + read]
        read = read + 1 if read + 1 < capacity else 0
        if block != NULL_BLOCK:
            queue[FIRST + write] = block
            place[block] = write
            write = write + 1 if write + 1 < capacity else 0
    queue[SPAN] = queue[NUM_FREE]


@lean_jit
def take_out(blocks: Blocks, queue: FreeQueue, block: int) -> None:
    """Let `block` leave the queue from wherever it is. O(1)."""
    queue[FIRST + blocks["place"][block]] = NULL_BLOCK
    blocks["place"][block] = HELD
    queue[NUM_FREE] -= 1


@lean_jit
def put_in_front(blocks: Blocks, queue: FreeQueue, block: int) -> None:
    """Let `block` be the next to be handed out. There must be room. O(1)."""
    head = queue[HEAD] - 1 if queue[HEAD] > 0 else queue.size - FIRST - 1
    queue[HEAD] = head
    queue[FIRST + head] = block
    blocks["place"][block] = head
    queue[NUM_FREE] += 1
    queue[SPAN] += 1


@lean_jit
def put_behind(blocks: Blocks, queue: FreeQueue, block: int) -> None:
    """Let `block` be the last to be handed out. There must be room. O(1)."""
    place = queue[HEAD] + queue[SPAN]
    if place >= queue.size - FIRST:
        place -= queue.size - FIRST
    queue[FIRST + place] = block
    blocks["place"][block] = place
    queue[NUM_FREE] += 1
    queue[SPAN] += 1


def queued(queue: FreeQueue) -> Int32Array:
    """Return the blocks in the queue, the next to be handed out first. O(num_blocks)."""
    places = (queue[HEAD] + np.arange(queue[SPAN])) % (queue.size - FIRST)
    entries = queue[FIRST + places]
    order: Int32Array = entries[entries != NULL_BLOCK]
    return order


def check_queue(blocks: Blocks, queue: FreeQueue) -> None:
    """Raise IntegrityError unless the queue is exactly the blocks that nobody holds, each where it thinks it is. O(num_blocks)."""
    state = f"{queue[:FIRST].tolist()}, ring {queue[FIRST:].tolist()}, blocks {blocks.tolist()}"
    capacity, unheld = queue.size - FIRST, np.flatnonzero(blocks["ref_cnt"][1:] == 0) + 1
    if not 0 <= queue[SPAN] <= capacity or not 0 <= queue[HEAD] < capacity or (blocks["ref_cnt"] < 0).any():
        raise IntegrityError(f"the free queue lies outside its ring: {state}")
    order = queued(queue)
    if not np.array_equal(np.sort(order), unheld) or order.size != queue[NUM_FREE]:
        raise IntegrityError(f"the free queue does not hold {unheld.tolist()}, each once: {state}")
    keyed, shares = np.count_nonzero(blocks["next_same"][order]), np.maximum(blocks["ref_cnt"] - 1, 0).sum()
    if (keyed, shares) != (queue[NUM_KEYED], queue[NUM_SHARES]):
        raise IntegrityError(f"{keyed} free blocks carry a key, and blocks are held {shares} times more than once: {state}")
    expected = np.full(len(blocks), HELD)
    places = (queue[HEAD] + np.arange(queue[SPAN])) % capacity
    expected[queue[FIRST + places]] = places
    expected[NULL_BLOCK] = HELD
    if not np.array_equal(expected, blocks["place"]):
        raise IntegrityError(f"blocks of the free queue are not where they think: {state}")
