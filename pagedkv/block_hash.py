"""Keys of full blocks: a block is known by its own tokens and by all that stand before them.

key[i] = H(key[i - 1], tokens of block i), 128 bits. Two requests share a block only if all up to its end is the same: the tokens,
the adapter, the salt and the images. Like vLLM's chain, which hashes with SHA-256 by default.

No hit compares tokens: two prefixes of one key would have to be found first. With `blake2b` that is hard for anybody, with
`siphash` for whoever does not know the key of the hash; among n blocks by chance, the odds are n^2 / 2^129. A chain of 64 bits
would need tokens kept and compared on every hit, to save 4 of the 30 rounds that SipHash takes for a block of 16 tokens.
"""

from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from operator import index
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from pagedkv.arrays import NO_KEYS, NO_TOKENS, Int32Array
from pagedkv.errors import ConfigError, unknown_name
from pagedkv.jit import fixed_types
from pagedkv.siphash import extend_chain

BlockKeys: TypeAlias = npt.NDArray[np.uint64]
"""One key per row, uint64 [blocks, 2]."""
Digest: TypeAlias = Callable[[bytes], bytes]
"""A hash function of `KEY_BYTES` bytes."""
HashAlgorithm: TypeAlias = Literal["blake2b", "siphash"]
"""`blake2b`: nothing to keep secret. `siphash`: some eight times faster, sound while its key is secret."""

KEY_BYTES = 16
"""Bytes of a key."""
PUBLIC_SIPHASH_KEY = b"pagedkv: public!"
"""The key of SipHash by default, known to everybody."""
_extend_chain = fixed_types(extend_chain)  # all its arrays are made here
_TOKEN_TYPE, _KEY_TYPE = np.dtype(np.int32), np.dtype(np.uint64)
_LEAST, _MOST = -(2**31), 2**31 - 1
"""What a token id may be."""
_FIRST_PARENT: BlockKeys = np.zeros(2, _KEY_TYPE)


def blake2b_128(data: bytes) -> bytes:
    """Return the 128-bit BLAKE2b hash of `data`."""
    return blake2b(data, digest_size=KEY_BYTES).digest()


_DIGESTS: dict[str, Digest | None] = {"blake2b": blake2b_128, "siphash": None}
"""The hash functions; SipHash is compiled together with its chain."""


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

    Args:
        block_size: Tokens per block.
        salt: Keeps tenants apart.
        lora: Name of the adapter.
        images: The images of the prompt.
        hash_algorithm: `blake2b`, `siphash`, or a function that takes the parent key and the tokens of a block as bytes.
        siphash_key: The key of `siphash`, 16 bytes, the same for all chains of one cache. The default is known to everybody, so
            a user could look for a prompt that hits another one's blocks: a server of several tenants must draw its own
            (`secrets.token_bytes(16)`) and keep it to itself.

    Raises:
        ConfigError: If the block size, the algorithm or the length of the key cannot be.

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

    __slots__ = ("_digest", "_extras", "_keys", "_num_keys", "_parent", "_secret", "_tokens", "block_size", "num_tokens")

    def __init__(
        self,
        *,
        block_size: int,
        salt: str = "",
        lora: str = "",
        images: Sequence[ImageSpan] = (),
        hash_algorithm: HashAlgorithm | Digest = "blake2b",
        siphash_key: bytes = PUBLIC_SIPHASH_KEY,
    ) -> None:
        if block_size < 1:
            raise ConfigError(f"block size {block_size}: needs 1 or more")
        self.block_size = block_size
        self.num_tokens = 0
        self._num_keys = 0
        self._digest = hash_algorithm if callable(hash_algorithm) else _digest_named(hash_algorithm)
        self._secret = _secret_words(siphash_key)
        self._parent = _FIRST_PARENT
        """The key that the next full block is chained to."""
        self._extras = _extras(block_size, salt, lora, images) if salt or lora or images else []
        self._tokens = NO_TOKENS
        """Token ids, with room to grow."""
        self._keys = NO_KEYS
        """Keys, with room for those of as many tokens."""

    @property
    def keys(self) -> BlockKeys:
        """The keys of the full blocks, uint64 [num_tokens // block_size, 2], a view that later calls never change."""
        return self._keys[: self._num_keys]

    @property
    def token_ids(self) -> Int32Array:
        """The tokens, int32 [num_tokens], a view that later calls never change."""
        return self._tokens[: self.num_tokens]

    def extend(self, tokens: Sequence[int] | npt.NDArray[np.integer[Any]]) -> None:
        """Append token ids. O(len(tokens)) amortised: one hash per block that becomes full, and no object per token of an array.

        Raises:
            ConfigError: If they are not one row of integers of 32 bits; nothing has changed then.
        """
        first = self.num_tokens
        try:
            last = first + len(tokens)
            if last > len(self._tokens):
                self._grow(last)
            if last == first + 1:  # decoding: no array for one token
                self._tokens[first] = index(tokens[0])
            else:
                self._tokens[first:last] = _checked(tokens)
        except (TypeError, OverflowError) as error:
            raise ConfigError(f"tokens: {error}; needs one row of integers from {_LEAST} to {_MOST}") from error
        self.num_tokens = last
        if last // self.block_size > self._num_keys:
            self._hash(last // self.block_size)

    def copy(self) -> "BlockHashChain":
        """Return a chain that goes on from here by itself: a fork. O(num_tokens)."""
        chain = object.__new__(BlockHashChain)
        for name in self.__slots__:
            setattr(chain, name, getattr(self, name))
        chain._tokens, chain._keys, chain._extras = self.token_ids.copy(), self.keys.copy(), self._extras.copy()
        return chain

    def _grow(self, num_tokens: int) -> None:
        """Make room for half as many tokens again, so that appending one takes O(1) amortised."""
        room = num_tokens * 3 // 2
        tokens, keys = np.empty(room, _TOKEN_TYPE), np.empty((room // self.block_size, 2), _KEY_TYPE)
        if self.num_tokens:
            tokens[: self.num_tokens], keys[: self._num_keys] = self.token_ids, self.keys
        self._tokens, self._keys = tokens, keys

    def _hash(self, last: int) -> None:
        """Fill in the keys up to block `last`."""
        first = self._num_keys
        while first < last:
            if self._extras and self._extras[-1][0] == first:
                self._parent = self._mixed(self._extras.pop()[1])
            stop = min(self._extras[-1][0], last) if self._extras else last
            if self._digest is None:
                _extend_chain(self._secret, self._parent, self._tokens, self.block_size, self._keys, first, stop)
            else:
                self._extend_by_digest(self._digest, first, stop)
            self._parent = self._keys[stop - 1]
            first = stop
        self._num_keys = last

    def _extend_by_digest(self, digest: Digest, first: int, last: int) -> None:
        parent, width = self._parent.tobytes(), self.block_size * _TOKEN_TYPE.itemsize
        data = self._tokens[first * self.block_size : last * self.block_size].tobytes()
        digests = [parent := digest(parent + data[start : start + width]) for start in range(0, len(data), width)]
        self._keys[first:last] = np.frombuffer(b"".join(digests), _KEY_TYPE).reshape(-1, 2)

    def _mixed(self, extra: bytes) -> BlockKeys:
        """Return the parent mixed with what else enters a block's key; personalized, so that no tokens look like it."""
        secret = self._secret.tobytes() if self._digest is None else b""
        mixed = blake2b(self._parent.tobytes() + extra, digest_size=KEY_BYTES, key=secret, person=b"pagedkv extra")
        return np.frombuffer(mixed.digest(), _KEY_TYPE).copy()


def _digest_named(algorithm: str) -> Digest | None:
    """Return the hash function of that name, None for the compiled SipHash."""
    if algorithm not in _DIGESTS:
        raise unknown_name("hash algorithm", algorithm, _DIGESTS)
    return _DIGESTS[algorithm]


@lru_cache(maxsize=16)
def _secret_words(siphash_key: bytes) -> BlockKeys:
    if len(siphash_key) != KEY_BYTES:
        raise ConfigError(f"siphash_key of {len(siphash_key)} bytes: needs {KEY_BYTES}")
    return np.frombuffer(siphash_key, _KEY_TYPE).copy()


def _extras(block_size: int, salt: str, lora: str, images: Sequence[ImageSpan]) -> list[tuple[int, bytes]]:
    """Return blocks, last first, with what besides tokens enters their keys.

    Parts carry their lengths and their kind: no two lists of parts give the same bytes.
    """
    extras = {0: b"n" + _with_length(salt) + _with_length(lora)} if salt or lora else {}
    for image in images:
        last = (image.first_token + image.num_tokens - 1) // block_size
        for block in range(image.first_token // block_size, last + 1):
            offset = image.first_token - block * block_size
            extras[block] = extras.get(block, b"") + b"i" + _with_length(image.content) + offset.to_bytes(8, "little", signed=True)
    return sorted(extras.items(), reverse=True)


def _with_length(part: str) -> bytes:
    encoded = part.encode()
    return len(encoded).to_bytes(8, "little") + encoded


def _checked(tokens: Sequence[int] | npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.integer[Any]]:
    """Return `tokens` as an array that fits in int32; raise TypeError or OverflowError if they do not."""
    if isinstance(tokens, np.ndarray) and tokens.dtype is _TOKEN_TYPE and tokens.ndim == 1:
        return tokens
    row = np.asarray(array("i", tokens) if isinstance(tokens, list) else tokens)  # array checks each token, and is the faster
    if row.ndim != 1:
        raise TypeError(f"shape {row.shape}")
    if row.dtype != _TOKEN_TYPE and row.size:
        if row.dtype.kind not in "iu":
            raise TypeError(f"type {row.dtype}")
        if row.min() < _LEAST or row.max() > _MOST:
            raise OverflowError(f"{row.min()} to {row.max()}")
    return row
