"""A second tier behind the pool: the content of evicted blocks by key, in host memory or on NVMe."""

import heapq
from collections.abc import Collection
from dataclasses import dataclass
from itertools import count
from typing import Literal, get_args

from pagedkv.errors import ConfigError, IntegrityError, unknown_name
from pagedkv.events import Key
from pagedkv.eviction import EVICTION_POLICIES, EvictionSettings, PlainCandidate
from pagedkv.units import gib

TierKind = Literal["host", "nvme"]
TIER_POLICIES = ("lru", "fifo", "lfu")
"""What leaves a tier first: the policies of `pagedkv.eviction` that ask only for times and uses, which is all that a tier knows."""
_MIN_HEAP = 64
"""Heap entries that are not worth looking through for stale ones."""


def tier_blocks(tier_bytes: int, block_bytes: int) -> int:
    """Return the blocks of `block_bytes` bytes, all layers together, that a tier of `tier_bytes` bytes has room for.

    Raises:
        ConfigError: If it has room for none.
    """
    if block_bytes < 1:
        raise ConfigError(f"blocks of {block_bytes} bytes: needs 1 or more")
    if tier_bytes < block_bytes:
        raise ConfigError(f"a second tier of {tier_bytes} bytes has no room for a block of {block_bytes}: needs as many, or none")
    return tier_bytes // block_bytes


@dataclass(slots=True, kw_only=True)
class _Kept(PlainCandidate):
    """A tier block with content, as an eviction policy sees it."""

    key: Key


class OffloadTier:
    """`num_blocks` tier blocks, numbered from 0, each empty or with the content of one key.

    Content that is loaded stays here as well, so that evicting it from the pool again costs no copy. The tier knows no sequences:
    its policy ranks blocks one by one. It decides where content goes; whoever owns the memory copies it there.

    Example:
        >>> tier = OffloadTier(num_blocks=2, block_bytes=1 << 20)
        >>> tier.store(b"a"), tier.store(b"b"), tier.store(b"a")
        (0, 1, None)
        >>> tier.store(b"c")  # in place of b, which was used longest ago
        1
        >>> tier.lookup([b"a", b"c", b"b"]), tier.offloaded_bytes, tier.dropped_blocks
        ([0, 1], 3145728, 1)
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        block_bytes: int | None = None,
        kind: TierKind = "host",
        eviction: str = "lru",
        unified_memory: bool = False,
    ) -> None:
        """Make an empty tier.

        Args:
            num_blocks: Its capacity; 0: it keeps nothing.
            block_bytes: Bytes of a block, all layers together; None: only blocks are counted.
            kind: `host` for host memory, `nvme` for a disk.
            eviction: What leaves first, one of `TIER_POLICIES`.
            unified_memory: The accelerator and the host share one memory.

        Raises:
            ConfigError: If one of them cannot be.
        """
        if num_blocks < 0 or (block_bytes is not None and block_bytes < 1):
            raise ConfigError(f"a second tier of {num_blocks} blocks of {block_bytes} bytes: needs 0 or more, and 1 or more")
        if kind not in get_args(TierKind):
            raise unknown_name("kind of tier", kind, get_args(TierKind))
        if eviction not in TIER_POLICIES:
            raise unknown_name("eviction policy of a second tier", eviction, TIER_POLICIES)
        self.num_blocks = num_blocks
        self.block_bytes = block_bytes
        self.kind = kind
        self.eviction = eviction
        self.unified_memory = unified_memory
        self.offloaded_blocks = 0
        """Blocks copied here so far."""
        self.loaded_blocks = 0
        """Blocks copied back so far."""
        self.dropped_blocks = 0
        """Blocks whose content is lost: evicted from here, or never stored because all room was in use."""
        self._rank, self._settings = EVICTION_POLICIES.load(eviction), EvictionSettings()
        self._blocks: dict[Key, int] = {}
        self._kept: dict[int, _Kept] = {}
        """By tier block that has content."""
        self._empty = list(range(num_blocks))[::-1]
        self._heap: list[tuple[tuple[float, ...], int, float]] = []
        """Rank, tier block, and its last use: another one by now, and the entry is stale. Each block has a valid one."""
        self._now = count(1)

    def __len__(self) -> int:
        """Return the blocks that have content."""
        return len(self._blocks)

    def __contains__(self, key: Key) -> bool:
        """Return whether the content of `key` is here. O(1)."""
        return key in self._blocks

    def keys(self) -> tuple[Key, ...]:
        """Return what is here, in no order."""
        return tuple(self._blocks)

    @property
    def offloaded_bytes(self) -> int:
        """Bytes copied here so far.

        Raises:
            ConfigError: If nobody said how large a block is; the next two likewise.
        """
        return self._bytes(self.offloaded_blocks)

    @property
    def loaded_bytes(self) -> int:
        """Bytes copied back so far."""
        return self._bytes(self.loaded_blocks)

    @property
    def num_bytes(self) -> int:
        """Bytes that the tier takes, full or not."""
        return self._bytes(self.num_blocks)

    @property
    def budget_note(self) -> str:
        """What the tier costs, in a sentence for a reader who plans memory."""
        size = f"{self.num_blocks:,} blocks" + (f" ({gib(self.num_bytes)})" if self.block_bytes is not None else "")
        if self.kind == "nvme":
            return f"The second tier takes {size} of disk, and no memory."
        if self.unified_memory:
            return (
                f"On unified memory the host tier is no memory gained: its {size} come out of the same budget as the KV cache, "
                "which could have as many blocks more instead, and find content there without a copy."
            )
        return f"The second tier takes {size} of host memory, beside the accelerator's."

    def lookup(self, keys: Collection[Key]) -> list[int]:
        """Return the tier blocks of the longest run of `keys` from its start. Changes nothing. O(run)."""
        found = []
        for key in keys:
            if key not in self._blocks:
                break
            found.append(self._blocks[key])
        return found

    def load(self, blocks: Collection[int]) -> None:
        """Count `blocks`, which have content, as copied to the pool; they stay. O(len(blocks) * log(blocks))."""
        for block in blocks:
            self._use(block)
        self.loaded_blocks += len(blocks)

    def store(self, key: Key, *, pinned: Collection[int] = ()) -> int | None:
        """Make room for the content of `key`. O(log(blocks)) amortised, and as much for each of `pinned`.

        Args:
            key: The key.
            pinned: Tier blocks that must stay: their content is still to be copied.

        Returns:
            The tier block to copy it to; None if it is here already, which counts as a use, or all blocks are pinned.
        """
        if key in self._blocks:
            self._use(self._blocks[key])
            return None
        block = self._empty.pop() if self._empty else self._evict(pinned)
        if block is None:
            self.dropped_blocks += 1
            return None
        now = next(self._now)
        self._blocks[key] = block
        self._kept[block] = _Kept(key=key, created=now, last_access=now, hit_count=1)
        self._push(block)
        self.offloaded_blocks += 1
        return block

    def clear(self) -> None:
        """Forget all content; what was copied stays counted."""
        self._blocks.clear()
        self._kept.clear()
        self._heap.clear()
        self._empty = list(range(self.num_blocks))[::-1]

    def check_integrity(self) -> None:
        """Raise IntegrityError unless each tier block is empty or has one key and one entry in the heap. O(blocks)."""
        keys = {block: kept.key for block, kept in self._kept.items()}
        entries = sorted(block for _, block, used in self._heap if self._is_current(block, used))
        tiled = sorted([*self._kept, *self._empty]) == list(range(self.num_blocks))
        if not tiled or entries != sorted(self._kept) or {key: block for block, key in keys.items()} != self._blocks:
            raise IntegrityError(
                f"second tier: {self._blocks} of {self.num_blocks}, {self._kept}, empty {self._empty}, {self._heap}"
            )

    def _bytes(self, num_blocks: int) -> int:
        if self.block_bytes is None:
            raise ConfigError("this second tier counts blocks: set its block_bytes to have bytes")
        return num_blocks * self.block_bytes

    def _use(self, block: int) -> None:
        kept = self._kept[block]
        kept.last_access = next(self._now)
        kept.hit_count += 1
        self._push(block)

    def _push(self, block: int) -> None:
        kept = self._kept[block]
        heapq.heappush(self._heap, (self._rank(kept, self._settings), block, kept.last_access))
        if len(self._heap) > max(2 * len(self._kept), _MIN_HEAP):
            self._heap = [entry for entry in self._heap if self._is_current(entry[1], entry[2])]
            heapq.heapify(self._heap)

    def _is_current(self, block: int, used: float) -> bool:
        return block in self._kept and self._kept[block].last_access == used

    def _evict(self, pinned: Collection[int]) -> int | None:
        """Empty the block that goes first and return it; None if all are pinned."""
        aside, victim = [], None
        while self._heap and victim is None:
            entry = heapq.heappop(self._heap)
            if self._is_current(entry[1], entry[2]):
                if entry[1] in pinned:
                    aside.append(entry)
                else:
                    victim = entry[1]
        for entry in aside:
            heapq.heappush(self._heap, entry)
        if victim is not None:
            del self._blocks[self._kept.pop(victim).key]
            self.dropped_blocks += 1
        return victim
