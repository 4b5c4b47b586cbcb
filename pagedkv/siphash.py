"""SipHash-2-4 with 128 bits of output, compiled: a pseudorandom function of short messages under a secret key.

Whoever does not know the key cannot tell its values from random ones, and so cannot look for two messages of one value; whoever
knows it can. Source: Aumasson and Bernstein, SipHash: a fast short-input PRF, 2012; the longer output is that of the authors'
reference implementation.
"""

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from pagedkv.arrays import Int32Array
from pagedkv.jit import jit

Words: TypeAlias = npt.NDArray[np.uint64]
"""Words of 64 bits, little-endian. A key of the hash and a value of it are two."""
_State: TypeAlias = tuple[np.uint64, np.uint64, np.uint64, np.uint64]

# Constants have the type of the words: with a signed operand numba would compute in floating point.
_V0, _V1, _V2, _V3 = (np.uint64(int.from_bytes(word, "big")) for word in (b"somepseu", b"dorandom", b"lygenera", b"tedbytes"))
_LONG_OUTPUT, _FIRST_HALF, _SECOND_HALF = np.uint64(0xEE), np.uint64(0xEE), np.uint64(0xDD)
_13, _16, _17, _21, _32, _56, _64 = (np.uint64(bits) for bits in (13, 16, 17, 21, 32, 56, 64))
_LOW_HALF = np.uint64(0xFFFFFFFF)
_WORD_BYTES, _PARENT_BYTES = 8, 16


@jit
def _rotate(word: np.uint64, bits: np.uint64) -> np.uint64:
    return (word << bits) | (word >> (_64 - bits))


@jit
def _round(v0: np.uint64, v1: np.uint64, v2: np.uint64, v3: np.uint64) -> _State:
    v0 += v1
    v2 += v3
    v1 = _rotate(v1, _13) ^ v0
    v3 = _rotate(v3, _16) ^ v2
    v0 = _rotate(v0, _32) + v3
    v2 += v1
    v1 = _rotate(v1, _17) ^ v2
    v3 = _rotate(v3, _21) ^ v0
    return v0, v1, _rotate(v2, _32), v3


@jit
def _absorb(v0: np.uint64, v1: np.uint64, v2: np.uint64, v3: np.uint64, word: np.uint64) -> _State:
    v0, v1, v2, v3 = _round(v0, v1, v2, v3 ^ word)
    v0, v1, v2, v3 = _round(v0, v1, v2, v3)
    return v0 ^ word, v1, v2, v3


@jit
def _finish(v0: np.uint64, v1: np.uint64, v2: np.uint64, v3: np.uint64) -> _State:
    for _ in range(4):
        v0, v1, v2, v3 = _round(v0, v1, v2, v3)
    return v0, v1, v2, v3


@jit
def _token_words(tokens: Int32Array, block_size: int, first: int, last: int) -> Words:
    """Return the tokens of blocks first to last in pairs, one block per column; behind an odd number of tokens stands a zero."""
    words = np.empty(((block_size + 1) // 2, last - first), np.uint64)
    for column in range(last - first):
        start = (first + column) * block_size
        for i in range(block_size // 2):
            words[i, column] = np.uint64(tokens[start + 2 * i]) & _LOW_HALF | np.uint64(tokens[start + 2 * i + 1]) << _32
        if block_size % 2:
            words[block_size // 2, column] = np.uint64(tokens[start + block_size - 1]) & _LOW_HALF
    return words


@jit
def _absorb_each(states: Words, words: Words) -> None:
    """Absorb words[i] into states[:, i]. No lane waits for another: compiled to vector instructions."""
    s0, s1, s2, s3 = states[0], states[1], states[2], states[3]
    for i in range(words.size):
        s0[i], s1[i], s2[i], s3[i] = _absorb(s0[i], s1[i], s2[i], s3[i], words[i])


@jit
def extend_chain(secret: Words, parent: Words, tokens: Int32Array, block_size: int, keys: Words, first: int, last: int) -> None:
    """Fill keys[first:last] of a row: keys[i] = SipHash(secret, tokens of block i, keys[i - 1]). O(tokens hashed).

    The tokens stand before the parent, so that those of all blocks can be absorbed side by side, before any parent is known.

    Args:
        secret: The key of the hash, uint64 [2].
        parent: What stands before block `first`, uint64 [2]: keys[first - 1], or the row's seed where `first` is 0.
        tokens: The row's token ids, int32, from its first token on; at least last * block_size of them.
        block_size: Tokens per block.
        keys: The row's keys, uint64 [blocks, 2].
        first: First block to hash.
        last: End of the blocks to hash, exclusive.
    """
    words = _token_words(tokens, block_size, first, last)
    states = np.empty((4, last - first), np.uint64)
    states[0], states[1] = secret[0] ^ _V0, secret[1] ^ _V1 ^ _LONG_OUTPUT
    states[2], states[3] = secret[0] ^ _V2, secret[1] ^ _V3
    for i in range(len(words)):
        _absorb_each(states, words[i])
    length = np.uint64(len(words) * _WORD_BYTES + _PARENT_BYTES) << _56  # modulo 256, as SipHash wants it
    h0, h1 = parent[0], parent[1]
    for i in range(last - first):
        v0, v1, v2, v3 = _absorb(states[0, i], states[1, i], states[2, i], states[3, i], h0)
        v0, v1, v2, v3 = _absorb(v0, v1, v2, v3, h1)
        v0, v1, v2, v3 = _absorb(v0, v1, v2, v3, length)
        v0, v1, v2, v3 = _finish(v0, v1, v2 ^ _FIRST_HALF, v3)
        h0 = v0 ^ v1 ^ v2 ^ v3
        v0, v1, v2, v3 = _finish(v0, v1 ^ _SECOND_HALF, v2, v3)
        h1 = v0 ^ v1 ^ v2 ^ v3
        keys[first + i, 0], keys[first + i, 1] = h0, h1
