"""Keys and values get where the slots say, and nowhere else."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedkv.block_table import BlockTables
from pagedkv.kernels.cache_ops import copy_blocks, copy_slots, reshape_and_cache, slot_mapping_for
from pagedkv.kernels.contract import KernelError, narrowed

SHAPE = 6, 4, 2, 8


def caches(kv_layout: str = "NHD", dtype: Any = np.float32) -> tuple[Any, Any]:
    rng = np.random.default_rng(1)
    pool = narrowed(rng.standard_normal((SHAPE[0], 2, *SHAPE[1:]), np.float32), dtype)
    if kv_layout == "HND":
        pool = np.ascontiguousarray(pool.swapaxes(2, 3))
    return pool[:, 0], pool[:, 1]


def by_slot(cache: Any, kv_layout: str) -> Any:
    """A copy [slots, heads, dim]."""
    return (cache.swapaxes(1, 2) if kv_layout == "HND" else cache).reshape(-1, *SHAPE[2:]).copy()


layouts = st.sampled_from(["NHD", "HND"])
slots = st.integers(0, SHAPE[0] * SHAPE[1] - 1)


@given(layouts, st.sampled_from([np.float32, np.float16, np.uint16]), st.lists(slots, unique=True, max_size=9), st.integers(0, 3))
@settings(max_examples=40)
def test_each_token_goes_to_its_slot_and_padding_nowhere(kv_layout: str, dtype: Any, places: list[int], padding: int) -> None:
    k_cache, v_cache = caches(kv_layout, dtype)
    want_k, want_v = by_slot(k_cache, kv_layout), by_slot(v_cache, kv_layout)
    mapping = np.random.default_rng(2).permutation([*places, *[-1] * padding])
    new = narrowed(np.random.default_rng(3).standard_normal((2, len(mapping), *SHAPE[2:]), np.float32), dtype)
    for token, slot in enumerate(mapping.astype(int)):
        if slot >= 0:
            want_k[slot], want_v[slot] = new[0, token], new[1, token]
    reshape_and_cache(new[0], new[1], k_cache, v_cache, mapping.astype(np.int64), kv_layout=kv_layout)
    np.testing.assert_array_equal(by_slot(k_cache, kv_layout), want_k)
    np.testing.assert_array_equal(by_slot(v_cache, kv_layout), want_v)


@given(layouts, st.lists(st.tuples(slots, slots), max_size=6, unique_by=lambda pair: pair[1]), st.booleans())
@settings(max_examples=40)
def test_copies_read_all_before_they_write(kv_layout: str, pairs: list[tuple[int, int]], whole: bool) -> None:
    if whole:
        pairs = list({target % SHAPE[0]: (source % SHAPE[0], target % SHAPE[0]) for source, target in pairs}.values())
    k_cache, v_cache = caches(kv_layout)
    before = [
        by_slot(cache, kv_layout).reshape(-1 if not whole else SHAPE[0], *SHAPE[1 + (not whole) :]) for cache in (k_cache, v_cache)
    ]
    (copy_blocks if whole else copy_slots)(k_cache, v_cache, pairs, kv_layout=kv_layout)
    for cache, old in zip((k_cache, v_cache), before, strict=True):
        want = old.copy()
        for source, target in pairs:
            want[target] = old[source]
        np.testing.assert_array_equal(by_slot(cache, kv_layout).reshape(want.shape), want)


def test_slots_are_those_of_the_block_tables() -> None:
    tables = BlockTables(max_num_seqs=3, max_model_len=40, block_size=4)
    tables.blocks[1, :5] = [7, 2, 9, 4, 1]
    want = tables.slot_mapping(1, 3, 17)
    np.testing.assert_array_equal(slot_mapping_for(tables.blocks, np.full(14, 1), np.arange(3, 17), 4), want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slot_mapping": [0, 24]}, "slot_mapping holds 24: the cache has 0 to 23"),
        ({"slot_mapping": [3, 3]}, r"slot_mapping holds \[3\] more than once"),
        ({"slot_mapping": [3, -2]}, "slot_mapping holds -2: needs slots, or -1"),
        ({"slot_mapping": [3]}, "2 keys, 2 values, slots of shape"),
        ({"value": np.ones((2, 2, 4), np.float32)}, r"value has shape \(2, 2, 4\): the cache needs \[tokens, 2, 8\]"),
        ({"key": np.ones((2, 2, 8), np.float16)}, "key is float16, the cache float32"),
        ({"kv_layout": "NDH"}, "kv_layout is 'NDH'"),
        ({"v_cache": np.ones((6, 4, 2, 8), np.float16)}, "k_cache is float32, v_cache float16"),
        ({"v_cache": np.ones((6, 4, 2, 9), np.float32)}, "needs the same"),
        ({"k_cache": np.ones((6, 4, 16), np.float32)}, "NHD is"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(change: dict[str, Any], message: str) -> None:
    k_cache, v_cache = caches()
    before = k_cache.copy(), v_cache.copy()
    new = np.ones((2, 2, 8), np.float32)
    with pytest.raises(KernelError, match=message):
        reshape_and_cache(**{"key": new, "value": new, "k_cache": k_cache, "v_cache": v_cache, "slot_mapping": [0, 1]} | change)
    np.testing.assert_array_equal((k_cache, v_cache), before)


@pytest.mark.parametrize(
    ("pairs", "message"), [([[0, 24]], "need 0 to 23"), ([[-1, 2]], "need 0 to 23"), ([[0, 1], [2, 1]], "more than once")]
)
def test_a_copy_out_of_the_cache_or_of_two_into_one_is_refused(pairs: list[list[int]], message: str) -> None:
    with pytest.raises(KernelError, match=message):
        copy_slots(*caches(), pairs)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tensors_are_written_as_arrays_are(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    kind = getattr(torch, dtype)
    k_cache, v_cache = (torch.zeros(6, 2, 4, 8, dtype=kind) for _ in range(2))
    new = torch.randn(3, 2, 8).to(kind)
    reshape_and_cache(new, 2 * new, k_cache, v_cache, torch.tensor([5, -1, 22]), kv_layout="HND")
    assert (k_cache[1, :, 1] == new[0]).all()
    assert (v_cache[5, :, 2] == 2 * new[2]).all()
    assert int((k_cache != 0).sum()) == 32
    copy_blocks(k_cache, v_cache, torch.tensor([[1, 0]]), kv_layout="HND")
    copy_slots(k_cache, v_cache, [(1, 9)], kv_layout="HND")
    assert (k_cache[0] == k_cache[1]).all()
    assert (v_cache[2, :, 1] == v_cache[0, :, 1]).all()
    with pytest.raises(KernelError, match="the cache has 0 to 23"):
        reshape_and_cache(new, new, k_cache, v_cache, torch.tensor([5, -1, 24]), kv_layout="HND")
