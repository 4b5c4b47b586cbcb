"""Keys of full blocks: a block is known by its own tokens and by all that stand before them.

key[i] = H(key[i - 1], tokens of block i, extra of block i), 128 bits of BLAKE2b. Two requests share a block only if all up to its
end is the same: the tokens, the adapter, the salt and the images. Like vLLM's chain, which hashes with SHA-256 by default.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from pagedkv.arrays import Int64Array
from pagedkv.errors import ConfigError

BlockKeys: TypeAlias = npt.NDArray[np.uint64]
"""One key per row, uint64 [blocks, 2]."""
Digest: TypeAlias = Callable[[bytes], bytes]
"""A hash function of `KEY_BYTES` bytes."""

KEY_BYTES = 16
"""Bytes of a key."""
_FIRST_PARENT = bytes(KEY_BYTES)
_TOKEN_BYTES = 8


def blake2b_128(data: bytes) -> bytes:
    """Return the 128-bit BLAKE2b hash of `data`."""
    return blake2b(data, digest_size=KEY_BYTES).digest()


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageSpan:
    """An image in a prompt. Its placeholder tokens look alike in every prompt, so its content enters the keys of its blocks."""

    content: str
    """What tells images apart, e.g. a hash of the pixels."""
    first_token: int
    """Position of its first placeholder token."""
    num_tokens: int
    """Placeholder tokens."""

    def __post_init__(self) -> None:
        """Refuse a span that covers no token of a prompt.

        Raises:
            ConfigError: With the values that would work.
        """
        if self.first_token < 0 or self.num_tokens < 1:
            raise ConfigError(f"image at token {self.first_token}, {self.num_tokens} tokens: needs 0 or more, and 1 or more")


class BlockHashChain:
    """The keys of one request's full blocks, extended as its tokens become known.

    Requests share blocks only within a namespace: equal `salt` and equal `lora`. Both enter the first key, and so all.

    Example:
        >>> prompt, longer = BlockHashChain(block_size=2), BlockHashChain(block_size=2)
        >>> prompt.extend([7, 8, 9])
        >>> longer.extend([7, 8, 9, 9, 9])
        >>> prompt.keys.shape, longer.keys.shape
        ((1, 2), (2, 2))
        >>> bool((prompt.keys[0] == longer.keys[0]).all())
        True
        >>> salted = BlockHashChain(block_size=2, salt="tenant-1")
        >>> salted.extend([7, 8, 9])
        >>> bool((prompt.keys[0] == salted.keys[0]).all())
        False
    """

    def __init__(
        self, *, block_size: int, salt: str = "", lora: str = "", images: Sequence[ImageSpan] = (), digest: Digest = blake2b_128
    ) -> None:
        if block_size < 1:
            raise ConfigError(f"block size {block_size}: needs 1 or more")
        self.block_size = block_size
        self.num_tokens = 0
        self._images = tuple(images)
        self._namespace = (lora, salt) if lora or salt or images else ()
        self._digest = digest
        self._parent = _FIRST_PARENT
        self._tail: Int64Array = np.empty(0, "<i8")
        """Tokens behind the last full block."""
        self._keys: BlockKeys = np.empty((0, 2), "<u8")
        """Keys, with room to grow."""

    @property
    def keys(self) -> BlockKeys:
        """The keys of the full blocks, uint64 [num_tokens // block_size, 2], a view that later calls never change."""
        return self._keys[: self.num_tokens // self.block_size]

    def extend(self, tokens: Sequence[int] | Int64Array) -> None:
        """Append tokens. One hash per block that becomes full, and no object per token of an array; O(len(tokens)).

        Raises:
            ConfigError: If the tokens are not one row of integers; nothing has changed then.
        """
        more = np.asarray(tokens)
        if more.ndim != 1 or (more.size and more.dtype.kind not in "iu"):
            raise ConfigError(f"tokens of shape {more.shape} and type {more.dtype}: needs one row of integers")
        pending = np.concatenate((self._tail, more.astype("<i8")))
        first = self.num_tokens // self.block_size
        num_blocks = pending.size // self.block_size
        width = self.block_size * _TOKEN_BYTES
        data, parent, digests = pending.tobytes(), self._parent, []
        for i in range(num_blocks):
            parent = self._digest(parent + data[i * width : (i + 1) * width] + self._extra(first + i))
            digests.append(parent)
        if first + num_blocks > len(self._keys):
            grown = np.empty((max(first + num_blocks, 2 * len(self._keys)), 2), "<u8")
            grown[:first] = self._keys[:first]
            self._keys = grown
        self._keys[first : first + num_blocks] = np.frombuffer(b"".join(digests), "<u8").reshape(-1, 2)
        self._parent = parent
        self._tail = pending[num_blocks * self.block_size :].copy()
        self.num_tokens += more.size

    def _extra(self, block: int) -> bytes:
        """What besides tokens enters the key of `block`. Parts carry their lengths: no two lists of parts give the same bytes."""
        if not self._namespace:
            return b""
        start = block * self.block_size
        extra = b"".join(map(_with_length, self._namespace)) if block == 0 else b""
        for image in self._images:
            offset = image.first_token - start
            if offset < self.block_size and offset + image.num_tokens > 0:
                extra += _with_length(image.content) + offset.to_bytes(8, "little", signed=True)
        return extra


def _with_length(part: str) -> bytes:
    encoded = part.encode()
    return len(encoded).to_bytes(8, "little") + encoded
