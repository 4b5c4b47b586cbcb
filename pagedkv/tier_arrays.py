"""A second tier of KV blocks as arrays: which keys' content is there, and what leaves first, for compiled code.

`pagedkv.offload_tier` is the same with other eviction policies, block by block in Python; a test holds the two to each other.
"""

from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from pagedkv.arrays import Int32Array, Int64Array
from pagedkv.errors import IntegrityError
from pagedkv.jit import lean_jit

TIER_BLOCK = np.dtype(
    [("key_a", "<u8"), ("key_b", "<u8"), ("next_in_bucket", "<i4"), ("older", "<i4"), ("newer", "<i4")], align=True
)
"""One block of the tier: the key of its content; the next block of its bucket, 0 at the end; its neighbours by last use."""

TierBlocks: TypeAlias = npt.NDArray[np.void]
"""`TIER_BLOCK` [blocks + 1]. Block 0 has no content: the newest block is its `older` neighbour, the oldest its `newer` one."""

NUM_USED, NUM_REMOVED, NUM_HITS, STEP_LOADED, STEP_STORED, NUM_LOADED, NUM_STORED, NUM_DROPPED, NUM_COUNTS = range(9)
"""In `TierArrays.counts`: blocks with content; keys in `removed`; hits of the lookup done last; blocks copied from and to the tier
in this step, and since the start; blocks whose content is lost."""


class TierArrays(NamedTuple):
    """What is in a second tier. Its blocks are filled in order, then taken from whoever was used longest ago."""

    blocks: TierBlocks
    buckets: Int32Array
    """The first block of each bucket, 0: none. A power of two."""
    hits: Int32Array
    """Room for one request's hits in the tier."""
    removed: npt.NDArray[np.uint64]
    """Keys of pool blocks that are handed out to be overwritten, uint64 [most, 2]."""
    counts: Int64Array

    @classmethod
    def empty(cls, *, num_blocks: int, most_hits: int, most_removed: int) -> "TierArrays":
        """Return a tier of `num_blocks`. A request has at most `most_hits` there; it takes at most `most_removed` pool blocks."""
        num_buckets = 1 << max(num_blocks - 1, 1).bit_length()
        return cls(
            np.zeros(num_blocks + 1, TIER_BLOCK),
            np.zeros(num_buckets, np.int32),
            np.zeros(most_hits, np.int32),
            np.zeros((most_removed, 2), np.uint64),
            np.zeros(NUM_COUNTS, np.int64),
        )

    def check_integrity(self) -> None:
        """Raise IntegrityError unless every block with content is in its bucket once, and once in the order of use. O(blocks)."""
        order: list[int] = []
        found: list[int] = []
        used = int(self.counts[NUM_USED])
        block = int(self.blocks["older"][0])
        while block and len(order) <= used:
            order.append(block)
            block = int(self.blocks["older"][block])
        for bucket, first in enumerate(self.buckets.tolist()):
            block = first
            while block and len(found) <= used:
                found.append(block)
                if int(self.blocks["key_a"][block]) % self.buckets.size != bucket:
                    raise IntegrityError(f"tier block {block} is in bucket {bucket}, its key belongs elsewhere")
                block = int(self.blocks["next_in_bucket"][block])
        expected = list(range(1, used + 1))
        if sorted(order) != expected or sorted(found) != expected:
            raise IntegrityError(
                f"second tier: {used} blocks in use, {sorted(order)} in the order of use, {sorted(found)} in buckets"
            )


@lean_jit
def tier_find(tier: TierArrays, key_a: np.uint64, key_b: np.uint64) -> int:
    """Return the tier block that has the content of a key; 0 if none has. O(1) expected."""
    keys_a, keys_b, following = tier.blocks["key_a"], tier.blocks["key_b"], tier.blocks["next_in_bucket"]
    block = int(tier.buckets[int(key_a & np.uint64(tier.buckets.size - 1))])
    while block != 0 and (keys_a[block] != key_a or keys_b[block] != key_b):
        block = int(following[block])
    return block


@lean_jit
def tier_use(tier: TierArrays, block: int) -> None:
    """Count a use of `block`, which has content: it is the newest now."""
    _unlink(tier, block)
    _link_newest(tier, block)


@lean_jit
def tier_store(tier: TierArrays, key_a: np.uint64, key_b: np.uint64, pinned: Int32Array) -> None:
    """Keep the content of a key: a use if it is here, else a copy in place of what was used longest ago, but for `pinned`."""
    counts = tier.counts
    block = tier_find(tier, key_a, key_b)
    if block != 0:
        tier_use(tier, block)
        return
    if counts[NUM_USED] + 1 < tier.blocks.size:
        counts[NUM_USED] += 1
        block = int(counts[NUM_USED])
    else:
        counts[NUM_DROPPED] += 1
        block = int(tier.blocks["newer"][0])
        while block != 0 and _is_among(pinned, block):
            block = int(tier.blocks["newer"][block])
        if block == 0:  # all are to be loaded
            return
        _unlink(tier, block)
        _leave_bucket(tier, block)
    bucket = int(key_a & np.uint64(tier.buckets.size - 1))
    tier.blocks["key_a"][block], tier.blocks["key_b"][block] = key_a, key_b
    tier.blocks["next_in_bucket"][block] = tier.buckets[bucket]
    tier.buckets[bucket] = block
    _link_newest(tier, block)
    counts[STEP_STORED] += 1
    counts[NUM_STORED] += 1


@lean_jit
def _is_among(blocks: Int32Array, block: int) -> bool:
    found = False
    for each in blocks:
        found |= each == block
    return found


@lean_jit
def _link_newest(tier: TierArrays, block: int) -> None:
    older, newer = tier.blocks["older"], tier.blocks["newer"]
    newest = older[0]
    older[block], newer[block] = newest, 0
    newer[newest] = block
    older[0] = block


@lean_jit
def _unlink(tier: TierArrays, block: int) -> None:
    older, newer = tier.blocks["older"], tier.blocks["newer"]
    newer[older[block]] = newer[block]
    older[newer[block]] = older[block]


@lean_jit
def _leave_bucket(tier: TierArrays, block: int) -> None:
    following = tier.blocks["next_in_bucket"]
    bucket = int(tier.blocks["key_a"][block] & np.uint64(tier.buckets.size - 1))
    if tier.buckets[bucket] == block:
        tier.buckets[bucket] = following[block]
        return
    before = tier.buckets[bucket]
    while following[before] != block:
        before = following[before]
    following[before] = following[block]
