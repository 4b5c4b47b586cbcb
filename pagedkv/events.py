"""What happens to cached blocks, as it happens: for a router that wants to know who has what, for plots, for notebooks.

Whoever wants to hear sets `events` of an `Observable`. Between two operations the events so far tell exactly which block carries
which key: see `replay`.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, TypeAlias, runtime_checkable

import numpy as np

from pagedkv.arrays import Int32Array
from pagedkv.block_hash import BlockKeys

Key: TypeAlias = bytes
"""The 16 bytes of a block key."""
Blocks: TypeAlias = tuple[int, ...]
Keys: TypeAlias = tuple[Key, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockStored:
    """Blocks that a request holds carry their key from now on, and can be found."""

    blocks: Blocks
    """Consecutive in the request's sequence."""
    keys: Keys
    """Of each block."""
    parent: Key | None
    """The key of the block before them; None if they begin the sequence."""
    request_id: int | str
    """Whose content it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockRemoved:
    """Blocks lost their key, because they are handed out again. Their content is still there when this is told."""

    blocks: Blocks
    """In the order in which they are handed out."""
    keys: Keys
    """What each carried."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockRevived:
    """Cached blocks that nobody held are held again: a hit took them out of the free queue."""

    blocks: Blocks
    """In the order of the request's sequence."""
    keys: Keys
    """Of each block."""
    request_id: int | str
    """Who found them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockCopied:
    """A request got a block of its own, with what it needs of a shared block that it writes in, or of one that it found cached."""

    source: int
    """The block copied from."""
    destination: int
    """The new one."""
    num_tokens: int
    """Leading tokens copied."""


@dataclass(frozen=True, slots=True)
class CacheCleared:
    """No block carries a key any more."""


Event: TypeAlias = BlockStored | BlockRemoved | BlockRevived | BlockCopied | CacheCleared
EventSink: TypeAlias = Callable[[Event], None]


@runtime_checkable
class Observable(Protocol):
    """Tells what happens to its blocks."""

    events: EventSink | None
    """Is called with each event, in order, within the operation that causes it, which has succeeded by then. It must not call back.
    None: nothing is told, and nothing is computed for it."""


class EventLog(list[Event]):
    """A sink that keeps all events, in order.

    Example:
        >>> log = EventLog()
        >>> log(BlockStored(blocks=(3, 4), keys=(b"k", b"l"), parent=None, request_id="a"))
        >>> log(BlockRemoved(blocks=(4,), keys=(b"l",)))
        >>> replay(log)
        {3: b'k'}
    """

    def __call__(self, event: Event) -> None:
        """Keep `event`."""
        self.append(event)


def replay(events: Iterable[Event], mirror: dict[int, Key] | None = None) -> dict[int, Key]:
    """Return which block carries which key after `events`. O(blocks in them).

    Args:
        events: In order, from the first one, or from where `mirror` ends.
        mirror: What an earlier call returned; it is brought up to date.
    """
    mirror = {} if mirror is None else mirror
    for event in events:
        match event:
            case BlockStored():
                mirror.update(zip(event.blocks, event.keys, strict=True))
            case BlockRemoved():
                for block in event.blocks:
                    del mirror[block]
            case CacheCleared():
                mirror.clear()
    return mirror


def block_ids(blocks: Int32Array) -> Blocks:
    """Return `blocks` for an event."""
    return tuple(blocks.tolist())


def key_bytes(keys: BlockKeys) -> Keys:
    """Return each of `keys`, uint64 [n, 2], as 16 bytes for an event."""
    data = np.ascontiguousarray(keys).tobytes()
    return tuple(data[start : start + 16] for start in range(0, len(data), 16))
