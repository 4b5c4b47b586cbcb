"""SGLang's slot allocators: the KV cache as token slots, handed out in whole blocks in the order of a free list.

Source: behaviour of SGLang 0.5.23 (its token allocator for blocks of 1, its paged allocator for larger ones).
"""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from pagedkv.arrays import Int32Array
from pagedkv.errors import ConfigError, IntegrityError
from pagedkv.jit import fixed_types
from pagedkv.slot_list import HEAD, TAIL, SlotList, give_back, num_listed, take_listed

NO_SLOT = -1
"""Stands for the last slot of a request that has none yet."""

Integers: TypeAlias = Sequence[int] | npt.NDArray[np.integer]

SpareBlocks: TypeAlias = Callable[[int, int], int]
"""From new tokens and requests: the length of the free list below which waiting blocks are sorted in."""


# Their arguments have the same types in every allocator.
_num_listed, _take_listed, _give_back = fixed_types(num_listed), fixed_types(take_listed), fixed_types(give_back)


def int32_array(values: Integers, *, what: str) -> Int32Array:
    """Return `values` as a one-dimensional int32 array.

    Raises:
        ConfigError: If they are not integers of 0 up to 2**31 - 1 (or NO_SLOT) in one dimension; `what` names them.
    """
    array = np.asarray(values) if len(values) else np.empty(0, np.int32)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise ConfigError(f"{what} must be a list of integers, not {array.dtype} of shape {array.shape}")
    if array.size and not (array.min() >= NO_SLOT and array.max() <= np.iinfo(np.int32).max):
        raise ConfigError(f"{what} range from {array.min()} to {array.max()}: they must lie within 0 and 2**31 - 1")
    return array.astype(np.int32, copy=False)


class SlotAllocator:
    """`num_blocks` blocks of `block_size` slots; block b holds those from b * block_size on. Block 0 is padding, never handed out.

    Blocks leave at the front of the free list. Released ones join it at the back if block_size is 1, at the front if it is
    larger. With `need_sort` (servers that only prefill or only decode) they wait apart, in the order of release, until the list
    runs short; then both are sorted into one, so that blocks of a request lie side by side again. A call that takes or gives k
    slots is O(k log k), but for this sorting; 9 to 13 bytes of state per block.

    Example:
        >>> slots = SlotAllocator(num_blocks=4, block_size=2)
        >>> slots.alloc_extend(pre=[0], seq=[3], last=[-1]).tolist()
        [2, 3, 4]
        >>> slots.alloc_decode(seq=[4], last=[4]).tolist()
        [5]
        >>> slots.alloc(6) is None
        True
        >>> slots.free([2, 3, 4, 5])
        >>> slots.free_list().tolist()
        [1, 2, 3, 4]
    """

    def __init__(self, *, num_blocks: int, block_size: int = 1, need_sort: bool = False) -> None:
        limit = np.iinfo(np.int32).max // max(block_size, 1) - 1
        if block_size < 1 or not 1 <= num_blocks <= limit:
            raise ConfigError(f"{num_blocks} blocks of {block_size} slots: needs 1 slot or more per block, and 1 to {limit} blocks")
        self.num_blocks, self.block_size, self.need_sort = num_blocks, block_size, need_sort
        self.arrays = SlotList.full(num_blocks)
        """The free list, for compiled code."""
        self._waiting = np.empty(0, np.int32)
        self._is_free = self.arrays.is_free

    @property
    def num_free_slots(self) -> int:
        """Slots in free blocks, those that wait to be sorted in included."""
        return int(_num_listed(self.arrays) + self._waiting.size) * self.block_size

    @property
    def num_ready_slots(self) -> int:
        """Slots in blocks that can be handed out without sorting."""
        return int(_num_listed(self.arrays)) * self.block_size

    def ready_list(self) -> Int32Array:
        """Return the blocks that can be handed out without sorting, the next one first."""
        head, tail = self.arrays.ends.tolist()
        return self.arrays.order[head:tail].copy()

    def free_list(self) -> Int32Array:
        """Return every free block: those of `ready_list`, then those that wait."""
        return np.concatenate((self.ready_list(), self._waiting))

    def alloc(self, num_slots: int) -> Int32Array | None:
        """Take `num_slots` slots in whole blocks; None, and nothing taken, if there are too few.

        A shortage may have sorted the waiting blocks in, as in SGLang; what is free stays free.

        Raises:
            ConfigError: If `num_slots` is negative or not a multiple of block_size.
        """
        if num_slots < 0 or num_slots % self.block_size:
            raise ConfigError(f"cannot take {num_slots} slots: 0 or a multiple of the block size {self.block_size} would work")
        num_blocks = num_slots // self.block_size
        blocks = self._take(num_blocks, wanted=num_blocks)
        if blocks is None:
            return None
        slots: Int32Array = np.add.outer(blocks * self.block_size, np.arange(self.block_size, dtype=np.int32)).ravel()
        return slots

    def alloc_extend(self, *, pre: Integers, seq: Integers, last: Integers) -> Int32Array | None:
        """Grow request i from pre[i] to seq[i] tokens; return the new slots, request by request, or None if blocks are short.

        Each request first fills its last block behind the slot last[i] (NO_SLOT if it has none), then takes a block from the
        front of the free list at every multiple of block_size: whole ones, and one that stays partly filled.

        Raises:
            ConfigError: If the lists do not fit together: lengths differ, a request shrinks, or last[i] is not where pre[i] ends.
        """
        return self._grow(pre, seq, last, spare_blocks=lambda tokens, requests: tokens // self.block_size + requests + 1)

    def alloc_decode(self, *, seq: Integers, last: Integers) -> Int32Array | None:
        """Grow each request by one token to seq[i], as `alloc_extend` does. A block is taken when the last one is full."""
        return self._grow(int32_array(seq, what="seq") - 1, seq, last, spare_blocks=lambda tokens, requests: requests)

    def free(self, slots: Integers) -> None:
        """Give back the blocks that hold `slots`, each once and in ascending order (with blocks of 1: as given).

        Raises:
            ConfigError: If a block is not of this pool or is free already; nothing has changed then.
        """
        self._release(self._blocks_of(slots))

    def free_segment(self, slots: Integers) -> None:
        """Give back the blocks of a run of slots, in the run's order. It begins where a block does; a partly filled one goes whole.

        Raises:
            ConfigError: If it is no such run, or as `free`.
        """
        self._release(self._blocks_of_segment(slots))

    def free_group(self, *, whole: Sequence[Integers] = (), segments: Sequence[Integers] = ()) -> None:
        """Give back several at once: all of `whole` as one `free`, then the blocks of all `segments` as one run.

        Raises:
            ConfigError: As `free` and `free_segment`; nothing has changed then.
        """
        slots = [int32_array(part, what="slots") for part in whole]
        first = self._blocks_of(np.concatenate(slots)) if slots else np.empty(0, np.int32)
        second = np.concatenate([np.empty(0, np.int32), *(self._blocks_of_segment(part) for part in segments)])
        self._check_held(np.concatenate((first, second)))
        self._release(first)
        self._release(second)

    def check_integrity(self) -> None:
        """Raise IntegrityError unless the free list holds each free block once. O(num_blocks)."""
        listed = self.free_list()
        state = f"free list {listed.tolist()} of which {self._waiting.size} wait, flags {np.flatnonzero(self._is_free).tolist()}"
        head, tail = self.arrays.ends.tolist()
        if not 0 <= head <= tail <= self.arrays.order.size or (self._waiting.size and not self.need_sort):
            raise IntegrityError(f"the free list lies at {head} to {tail}: {state}")
        if not np.array_equal(np.sort(listed), np.flatnonzero(self._is_free)) or self._is_free[0]:
            raise IntegrityError(f"the free list does not hold each free block once: {state}")

    def _grow(self, pre: Integers, seq: Integers, last: Integers, *, spare_blocks: SpareBlocks) -> Int32Array | None:
        block_size = self.block_size
        before, after, last = (int32_array(x, what=name) for x, name in ((pre, "pre"), (seq, "seq"), (last, "last")))
        if not before.size == after.size == last.size or (before < 0).any() or (after < before).any():
            raise ConfigError(f"cannot grow from {before.tolist()} to {after.tolist()} tokens with last slots {last.tolist()}")
        inside = before % block_size != 0  # the last block has room
        ends, tails = before[inside], last[inside]
        known = ((tails >= block_size) & (tails < (self.num_blocks + 1) * block_size)).all()
        if not known or ((tails - ends + 1) % block_size).any() or self._is_free[tails // block_size].any():
            raise ConfigError(f"slots {last.tolist()} cannot be the last ones of requests of {before.tolist()} tokens")
        held, counts = -(-before // block_size), after - before
        new_blocks = -(-after // block_size) - held
        needed = int(new_blocks.sum())
        blocks = self._take(needed, wanted=needed if block_size == 1 else spare_blocks(int(counts.sum()), before.size))
        if blocks is None:
            return None
        request = np.repeat(np.arange(before.size), counts)
        position = np.arange(request.size) - (np.cumsum(counts) - counts - before)[request]
        nth_new = position // block_size - held[request]
        fresh = nth_new >= 0
        slots = last[request] + 1 + position - before[request]
        nth = (np.cumsum(new_blocks) - new_blocks)[request[fresh]] + nth_new[fresh]
        slots[fresh] = blocks[nth] * block_size + position[fresh] % block_size
        grown: Int32Array = slots.astype(np.int32)
        return grown

    def _take(self, num_blocks: int, *, wanted: int) -> Int32Array | None:
        """Return the first `num_blocks` of the free list, after sorting the waiting ones in if it is shorter than `wanted`."""
        listed = int(_num_listed(self.arrays))
        if listed < wanted and self._waiting.size:
            merged = np.sort(self.free_list())
            ends, listed = self.arrays.ends, merged.size
            ends[HEAD], ends[TAIL] = self.num_blocks - listed, self.num_blocks
            self.arrays.order[ends[HEAD] : ends[TAIL]] = merged
            self._waiting = self._waiting[:0]
        if num_blocks > listed:
            return None
        blocks: Int32Array = np.empty(num_blocks, np.int32)
        _take_listed(self.arrays, blocks, 0, num_blocks)
        return blocks

    def _blocks_of(self, slots: Integers) -> Int32Array:
        array = int32_array(slots, what="slots")
        return array if self.block_size == 1 else np.unique(array // self.block_size)

    def _blocks_of_segment(self, slots: Integers) -> Int32Array:
        array = int32_array(slots, what="slots")
        blocks = array[:: self.block_size] // self.block_size
        expected = np.repeat(blocks, self.block_size)[: array.size] * self.block_size + np.arange(array.size) % self.block_size
        if not np.array_equal(array, expected):
            raise ConfigError(f"slots {array.tolist()} are no run of whole blocks of {self.block_size}: free() takes any slots")
        return blocks

    def _check_held(self, blocks: Int32Array) -> None:
        if blocks.size and not (blocks.min() >= 1 and blocks.max() <= self.num_blocks):
            raise ConfigError(f"cannot free blocks {blocks.tolist()}: this pool hands out 1 to {self.num_blocks}")
        ids, counts = np.unique(blocks, return_counts=True)
        wrong = ids[(counts > 1) | self._is_free[ids]]
        if wrong.size:
            raise ConfigError(f"double free of blocks {wrong.tolist()}")

    def _release(self, blocks: Int32Array) -> None:
        self._check_held(blocks)
        if self.need_sort:
            self._is_free[blocks] = True
            self._waiting = np.concatenate((self._waiting, blocks))
        else:
            _give_back(self.arrays, np.ascontiguousarray(blocks), 0, blocks.size, self.block_size > 1)
