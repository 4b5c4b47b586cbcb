"""The keys of blocks against SipHash and BLAKE2b in plain Python, over any pieces, salts and images; what a key must tell apart."""

from collections.abc import Callable
from hashlib import blake2b
from typing import Any

import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedkv.block_hash import PUBLIC_SIPHASH_KEY, BlockHashChain, HashAlgorithm, ImageSpan, _extras
from pagedkv.errors import ConfigError
from pagedkv.siphash import extend_chain

LEAST, MOST = -(2**31), 2**31 - 1
ALGORITHMS: tuple[HashAlgorithm, ...] = ("blake2b", "siphash")

SIPHASH_2_4_128 = {
    24: "2db479ae78bd50d8882a8a178a6132ad",
    32: "7c3956ca5eeafc3e363e9d556546eb68",
    40: "df6a301e95c95dad97ae0cc8c6913bd8",
    48: "f7e5aef549f782cf379055a608269b16",
    56: "1938f2cf72d54ee97e94166fa91d2a36",
}
"""By length n of the message 00 01 ... n - 1, under the key 00 01 ... 0f.

Source: vectors_sip128 in vectors.h of the reference implementation, https://github.com/veorq/SipHash.
"""


def siphash(key: bytes, message: bytes) -> bytes:
    """SipHash-2-4 with 128 bits of output, after the paper, over Python's integers."""
    mask = 2**64 - 1
    k0, k1 = int.from_bytes(key[:8], "little"), int.from_bytes(key[8:], "little")
    v = [k0 ^ 0x736F6D6570736575, k1 ^ 0x646F72616E646F6D ^ 0xEE, k0 ^ 0x6C7967656E657261, k1 ^ 0x7465646279746573]

    def half_round(a: int, b: int, c: int, d: int, left: int, right: int) -> None:
        v[a] = (v[a] + v[b]) & mask
        v[c] = (v[c] + v[d]) & mask
        v[b] = (v[b] << left | v[b] >> 64 - left) & mask ^ v[a]
        v[d] = (v[d] << right | v[d] >> 64 - right) & mask ^ v[c]
        v[a] = (v[a] << 32 | v[a] >> 32) & mask

    def rounds(count: int) -> None:
        for _ in range(count):
            half_round(0, 1, 2, 3, 13, 16)
            half_round(2, 1, 0, 3, 17, 21)

    padded = message + bytes(7 - len(message) % 8) + bytes([len(message) % 256])
    for start in range(0, len(padded), 8):
        word = int.from_bytes(padded[start : start + 8], "little")
        v[3] ^= word
        rounds(2)
        v[0] ^= word
    result = b""
    for place, constant in ((2, 0xEE), (1, 0xDD)):
        v[place] ^= constant
        rounds(4)
        result += (v[0] ^ v[1] ^ v[2] ^ v[3]).to_bytes(8, "little")
    return result


def oracle(tokens: list[int], block_size: int, algorithm: HashAlgorithm, key: bytes, **namespace: Any) -> list[bytes]:
    """The keys of all full blocks, from the definition."""
    salt, lora, images = namespace.get("salt", ""), namespace.get("lora", ""), namespace.get("images", ())
    parent, keys = bytes(16), []
    for start in range(0, len(tokens) - block_size + 1, block_size):
        parts = [b"n" + sized(salt) + sized(lora)] if start == 0 and (salt or lora) else []
        for image in images:
            if image.first_token < start + block_size and start < image.first_token + image.num_tokens:
                parts.append(b"i" + sized(image.content) + (image.first_token - start).to_bytes(8, "little", signed=True))
        secret = key if algorithm == "siphash" else b""
        if parts:
            parent = blake2b(parent + b"".join(parts), digest_size=16, key=secret, person=b"pagedkv extra").digest()
        block = np.array(tokens[start : start + block_size], "<i4").tobytes()
        if algorithm == "siphash":
            parent = siphash(key, block + bytes(len(block) % 8) + parent)
        else:
            parent = blake2b(parent + block, digest_size=16).digest()
        keys.append(parent)
    return keys


def sized(part: str) -> bytes:
    return len(part.encode()).to_bytes(8, "little") + part.encode()


def chain(tokens: Any, block_size: int = 4, **settings: Any) -> BlockHashChain:
    keys = BlockHashChain(block_size=block_size, **settings)
    keys.extend(tokens)
    return keys


def rows(keys: BlockHashChain) -> list[bytes]:
    return [key.tobytes() for key in keys.keys]


@pytest.mark.parametrize(("length", "expected"), SIPHASH_2_4_128.items())
def test_siphash_gives_the_published_values(length: int, expected: str) -> None:
    """A message ends with the 16 bytes of the parent; those before it are tokens."""
    message, secret = bytes(range(length)), np.frombuffer(bytes(range(16)), np.uint64)
    tokens, parent = np.frombuffer(message[:-16], np.int32), np.frombuffer(message[-16:], np.uint64)
    keys = np.zeros((1, 2), np.uint64)
    extend_chain(secret, parent, tokens, len(tokens), keys, 0, 1)
    assert keys.tobytes().hex() == siphash(bytes(range(16)), message).hex() == expected


images = st.builds(
    ImageSpan, content=st.sampled_from(["", "cat", "dog"]), first_token=st.integers(0, 40), num_tokens=st.integers(1, 30)
)


@given(
    pieces=st.lists(st.lists(st.integers(LEAST, MOST), max_size=70), max_size=6),
    as_array=st.sampled_from(
        [list, tuple, np.array, lambda piece: np.array(piece, np.int32), lambda piece: np.array(piece + piece)[::2]]
    ),
    block_size=st.integers(1, 17),
    algorithm=st.sampled_from(ALGORITHMS),
    key=st.binary(min_size=16, max_size=16),
    salt=st.sampled_from(["", "a"]),
    lora=st.sampled_from(["", "a"]),
    pictures=st.lists(images, max_size=3),
)
def test_keys_follow_their_definition(
    pieces: list[list[int]],
    as_array: Callable[[list[int]], Any],
    block_size: int,
    algorithm: HashAlgorithm,
    key: bytes,
    salt: str,
    lora: str,
    pictures: list[ImageSpan],
) -> None:
    namespace: dict[str, Any] = {"salt": salt, "lora": lora, "images": pictures}
    keys = BlockHashChain(block_size=block_size, hash_algorithm=algorithm, siphash_key=key, **namespace)
    tokens: list[int] = []
    for piece in pieces:
        more = as_array(piece)
        keys.extend(more)
        tokens += [int(token) for token in more]
        assert keys.num_tokens == len(tokens)
        assert keys.token_ids.tolist() == tokens
        assert keys.keys.shape == (len(tokens) // block_size, 2)
    assert rows(keys) == oracle(tokens, block_size, algorithm, key, **namespace)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_views_taken_earlier_never_change(algorithm: HashAlgorithm) -> None:
    keys, taken = BlockHashChain(block_size=2, hash_algorithm=algorithm), []
    for token in range(200):
        keys.extend([token])
        taken.append((keys.keys, keys.keys.copy(), keys.token_ids, keys.token_ids.copy()))
    assert all(np.array_equal(*view[:2]) and np.array_equal(*view[2:]) for view in taken)
    assert rows(keys) == rows(chain(range(200), 2, hash_algorithm=algorithm))


@pytest.mark.parametrize("block_size", [1, 2, 3, 15, 16, 17])
def test_siphash_follows_its_definition_at_every_kind_of_block_size(block_size: int) -> None:
    tokens = list(range(-20, 40))
    keys = chain(tokens, block_size, hash_algorithm="siphash")
    assert rows(keys) == oracle(tokens, block_size, "siphash", PUBLIC_SIPHASH_KEY)


def test_room_is_made_seldom() -> None:
    """Token by token, 10,000 tokens are moved to a larger array some twenty times, not 10,000 times."""
    keys, arrays = BlockHashChain(block_size=16), list[Any]()
    for token in range(10_000):
        keys.extend([token])
        if not arrays or keys.token_ids.base is not arrays[-1]:
            arrays.append(keys.token_ids.base)
    assert len(arrays) < 30


def test_compiled_code_extends_the_keys_of_many_rows() -> None:
    rng, block_size = np.random.default_rng(1), 3
    tokens, held = rng.integers(LEAST, MOST, (6, 40), np.int32), np.array([0, 5, 12, 12, 39, 40])
    lengths = np.array([40, 40, 12, 14, 40, 40])
    keys = np.zeros((6, 13, 2), np.uint64)
    for row, count in enumerate(held // block_size):
        keys[row, :count] = chain(tokens[row], block_size, hash_algorithm="siphash").keys[:count]
    secret, seed = np.frombuffer(PUBLIC_SIPHASH_KEY, np.uint64), np.zeros(2, np.uint64)

    @numba.njit
    def extend_rows(tokens: Any, lengths: Any, keys: Any, held: Any, secret: Any, seed: Any) -> None:
        for row in range(len(tokens)):
            first, last = held[row] // block_size, lengths[row] // block_size
            parent = keys[row, first - 1] if first else seed
            extend_chain(secret, parent, tokens[row], block_size, keys[row], first, last)

    extend_rows(tokens, lengths, keys, held, secret.copy(), seed)
    for row, length in enumerate(lengths):
        expected = chain(tokens[row, :length], block_size, hash_algorithm="siphash").keys
        assert np.array_equal(keys[row, : len(expected)], expected)
        assert not keys[row, len(expected) :].any()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_no_tokens_look_like_a_salt(algorithm: HashAlgorithm) -> None:
    """Otherwise a prompt that spells the salt's bytes would reach the key of a salted one in its second block."""
    ((_, spelled),) = _extras(6, "1234567", "", ())
    salted = chain(range(6), 6, salt="1234567", hash_algorithm=algorithm)
    spelling = chain([*np.frombuffer(spelled, np.int32).tolist(), *range(6)], 6, hash_algorithm=algorithm)
    assert spelling.keys.shape == (2, 2)
    assert not set(rows(salted)) & set(rows(spelling))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_text_before_an_image_is_shared_with_prompts_that_have_none(algorithm: HashAlgorithm) -> None:
    pictured = chain([5] * 12, images=[ImageSpan(content="cat", first_token=6, num_tokens=2)], hash_algorithm=algorithm)
    plain = chain([5] * 12, hash_algorithm=algorithm)
    assert [a == b for a, b in zip(rows(pictured), rows(plain), strict=True)] == [True, False, False]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_bit_of_a_key_depends_on_every_token(algorithm: HashAlgorithm) -> None:
    """Keys of 500 prompts that differ from the first in one bit: about half of each of the 128 bits differs, in both words."""
    prompts = np.tile(np.arange(16, dtype=np.int32), (501, 1))
    for i in range(500):
        prompts[i + 1, i % 16] ^= 1 << i // 16 % 31
    bits = np.array([np.unpackbits(chain(prompt, 16, hash_algorithm=algorithm).keys.view(np.uint8)) for prompt in prompts])
    differing = (bits[1:] != bits[0]).mean(axis=0)
    assert differing.size == 128
    assert 0.35 < differing.min() < differing.max() < 0.65


def test_the_key_of_siphash_enters_all_keys_of_blocks() -> None:
    settings: dict[str, Any] = {"hash_algorithm": "siphash", "images": [ImageSpan(content="cat", first_token=5, num_tokens=1)]}
    default, other = chain(range(12), **settings), chain(range(12), **settings, siphash_key=bytes(16))
    assert rows(default) == rows(chain(range(12), **settings, siphash_key=PUBLIC_SIPHASH_KEY))
    assert not set(rows(default)) & set(rows(other))


def test_a_function_of_ones_own_can_force_a_collision() -> None:
    seen: list[bytes] = []

    def collide(data: bytes) -> bytes:
        seen.append(data)
        return bytes(range(16))

    one, other = chain([1] * 8, hash_algorithm=collide), chain([2] * 8, hash_algorithm=collide)
    assert rows(one) == rows(other) == [bytes(range(16))] * 2
    assert seen[3] == bytes(range(16)) + np.full(4, 2, "<i4").tobytes()


@pytest.mark.parametrize(
    "tokens",
    [
        [MOST + 1],
        [LEAST - 1],
        [1, MOST + 1],
        [1, LEAST - 1],
        np.array([1, MOST + 1]),
        np.array([1, 2**64 - 1], np.uint64),
        [1, 2**70],
        [1.0],
        [1.0, 2.0],
        ["1"],
        ["1", "2"],
        "12",
        [[1]],
        [[1], [2]],
        np.zeros((1, 1), int),
        np.array(1),
        1,
        None,
        iter([1]),
        {1, 2},
    ],
)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_what_is_no_row_of_32_bit_integers_is_refused_and_changes_nothing(tokens: Any, algorithm: HashAlgorithm) -> None:
    keys = chain([1, 2, 3, 4, 5], hash_algorithm=algorithm)
    with pytest.raises(ConfigError, match="one row of integers from -2147483648 to 2147483647"):
        keys.extend(tokens)
    assert (keys.num_tokens, keys.token_ids.tolist(), len(keys.keys)) == (5, [1, 2, 3, 4, 5], 1)
    keys.extend([6, 7, 8])
    assert rows(keys) == rows(chain(range(1, 9), hash_algorithm=algorithm))


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"unknown hash algorithm 'siphsah': did you mean siphash\?"):
        chain([1], hash_algorithm="siphsah")
    with pytest.raises(ConfigError, match="siphash_key of 3 bytes: needs 16"):
        chain([1], siphash_key=b"abc")
