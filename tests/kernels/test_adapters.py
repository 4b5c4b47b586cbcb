"""FlashAttention's and FlashInfer's names mean what they mean there."""

from typing import Any

import numpy as np
import pytest
from attention_cases import Case
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedkv.kernels.adapters import (
    BatchDecodeWithPagedKVCacheWrapper,
    block_table_to_csr,
    csr_to_block_table,
    flash_attn_with_kvcache,
)
from pagedkv.kernels.contract import KernelError
from pagedkv.kernels.dispatch import paged_attention, paged_attention_decode


@given(st.lists(st.integers(0, 40), min_size=1, max_size=6), st.integers(1, 9), st.integers(0, 3))
def test_a_table_survives_the_way_to_csr_and_back(lengths: list[int], block_size: int, padding: int) -> None:
    counts = [-(-n // block_size) for n in lengths]
    table = np.full((len(lengths), max(counts) + padding), -1, np.int32)
    for row, count in enumerate(counts):
        table[row, :count] = np.random.default_rng(row).integers(0, 99, count)
    indptr, indices, last = block_table_to_csr(table, lengths, block_size)
    assert indices.size == sum(counts) == indptr[-1]
    assert ((last >= 1) | (np.array(lengths) == 0)).all()
    assert (last <= block_size).all()
    back, seqlens = csr_to_block_table(indptr, indices, last, block_size)
    np.testing.assert_array_equal(seqlens, lengths)
    np.testing.assert_array_equal(back, table[:, : max(counts)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0, 2], [5], [1]), "needs to rise from 0 to the number of indices, 1"),
        (([0, 1], [5], [1, 1]), "indptr has 2 entries: 2 sequences need 3"),
        (([0, 1], [5], [0]), "needs 1 to 4"),
        (([0, 1], [5], [5]), "needs 1 to 4"),
    ],
)
def test_csr_that_does_not_fit_is_refused(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(KernelError, match=message):
        csr_to_block_table(*arguments, 4)


def test_a_length_beyond_the_table_is_refused() -> None:
    with pytest.raises(KernelError, match=r"cache_seqlens \[9\]: the table holds 0 to 8"):
        block_table_to_csr(np.zeros((1, 2)), [9], 4)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("seqlen_q", [1, 5])
def test_flash_attention_on_blocks(seqlen_q: int, causal: bool) -> None:
    case = Case(lengths=(40, 17), num_queries=(seqlen_q, seqlen_q))
    arrays = case.arrays()
    starts, q = arrays.pop("cu_seqlens_q"), arrays.pop("q")
    want, want_lse = paged_attention(q, **arrays, cu_seqlens_q=starts, causal=causal, return_lse=True, softcap=2.0)
    out, lse = flash_attn_with_kvcache(q.reshape(2, seqlen_q, 8, 64), **arrays, causal=causal, softcap=2.0, return_softmax_lse=True)
    np.testing.assert_allclose(out.reshape(want.shape), want, atol=1e-5)
    assert lse.shape == (2, 8, seqlen_q)
    np.testing.assert_allclose(lse.swapaxes(1, 2).reshape(want_lse.shape), want_lse, atol=1e-5)


@pytest.mark.parametrize("paged", [True, False])
def test_flash_attention_appends_what_is_new(paged: bool) -> None:
    """As if it had been in the cache before; the rest of the cache stays as it is."""
    rng = np.random.default_rng(4)
    keys, values = rng.standard_normal((2, 2, 12, 2, 64)).astype(np.float32)
    q = rng.standard_normal((2, 3, 4, 64)).astype(np.float32)
    have = np.array([9, 4], np.int32)
    if paged:
        table = np.array([[5, 0, 3], [1, 4, 2]], np.int32)
        k_cache, v_cache = np.full((2, 6, 4, 2, 64), np.nan, np.float32)
        place = {"block_table": table, "cache_seqlens": have}
        where = [(table[row, t // 4], t % 4) for row in range(2) for t in range(12)]
    else:
        k_cache, v_cache = np.full((2, 4, 12, 2, 64), np.nan, np.float32)
        place = {"cache_batch_idx": np.array([3, 1]), "cache_seqlens": have}
        where = [(row, t) for row in (3, 1) for t in range(12)]
    for i, slot in enumerate(where):
        if i % 12 < have[i // 12]:
            k_cache[slot], v_cache[slot] = keys[i // 12, i % 12], values[i // 12, i % 12]
    new = [np.stack([part[row, have[row] : have[row] + 3] for row in range(2)]) for part in (keys, values)]
    out = flash_attn_with_kvcache(q, k_cache, v_cache, *new, **place, causal=True)
    written = np.array([[not np.isnan(k_cache[where[12 * row + t]]).any() for t in range(12)] for row in range(2)])
    np.testing.assert_array_equal(written, np.arange(12) < (have + 3)[:, None])
    for row in range(2):
        for query in range(3):
            seen = have[row] + query + 1
            for head in range(4):
                weights = np.exp(keys[row, :seen, head // 2] @ q[row, query, head] / 8)
                want = weights @ values[row, :seen, head // 2] / weights.sum()
                np.testing.assert_allclose(out[row, query, head], want, atol=1e-5)


def test_flash_attention_of_a_full_cache_without_lengths() -> None:
    rng = np.random.default_rng(0)
    cache = rng.standard_normal((2, 3, 16, 2, 64)).astype(np.float32)
    q = rng.standard_normal((3, 1, 2, 64)).astype(np.float32)
    want = paged_attention_decode(q[:, 0], *cache, np.arange(3)[:, None], [16, 16, 16])
    np.testing.assert_array_equal(flash_attn_with_kvcache(q, *cache)[:, 0], want)
    np.testing.assert_array_equal(flash_attn_with_kvcache(q, *cache, cache_seqlens=16)[:, 0], want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rotary_cos": 1, "alibi_slopes": 2}, "rotary_cos, alibi_slopes: not supported"),
        ({"cache_batch_idx": [0, 1]}, "leave one out"),
        ({"cache_seqlens": None}, "cache_seqlens is None"),
        ({"q": np.ones((2, 8, 64), np.float32)}, "q has shape"),
        ({"k": np.ones((2, 50, 2, 64), np.float32), "v": np.ones((2, 50, 2, 64), np.float32)}, "room for 80 per sequence"),
        (
            {"k": np.ones((2, 30, 2, 64), np.float32), "v": np.ones((2, 30, 2, 64), np.float32)},
            "holds -1 for position 48 of sequence 0",
        ),
        ({"k": np.ones((2, 3, 2, 64), np.float32)}, "k and v: need"),
    ],
)
def test_what_flash_attention_would_do_and_this_does_not_is_refused(change: dict[str, Any], message: str) -> None:
    arrays = Case(lengths=(40, 17)).arrays()
    arrays["q"] = arrays["q"][:, None]
    with pytest.raises(KernelError, match=message):
        flash_attn_with_kvcache(**{**arrays, **change})


@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
@pytest.mark.parametrize("together", [False, True])
@given(st.lists(st.integers(0, 60), min_size=1, max_size=3), st.sampled_from([-1, 0, 9]))
@settings(max_examples=10)
def test_flashinfer_plans_and_runs(kv_layout: str, together: bool, lengths: list[int], left: int) -> None:
    case = Case(lengths=tuple(lengths), kv_layout=kv_layout, interleaved=together)
    arrays = case.arrays()
    wrapper = BatchDecodeWithPagedKVCacheWrapper(None, kv_layout, use_cuda_graph=False, use_tensor_cores=True)
    csr = block_table_to_csr(arrays["block_table"], lengths, 16)
    wrapper.plan(*csr, 8, 2, 64, 16, window_left=left, logits_soft_cap=3.0, sm_scale=0.2, q_data_type="float32")
    cache: Any = (arrays["k_cache"], arrays["v_cache"])
    if together:
        cache = arrays["k_cache"].base
        cache = cache if cache.ndim == 5 else cache.base
        assert cache.shape[1] == 2
    out, lse = wrapper.run(arrays["q"], cache, q_scale=0.5, k_scale=2.0, v_scale=3.0, return_lse=True)
    want, natural = paged_attention_decode(
        **arrays, kv_layout=kv_layout, window_size=(left, -1), softcap=3.0, softmax_scale=0.2, v_scale=3.0, return_lse=True
    )
    np.testing.assert_allclose(out, want, atol=1e-5)
    np.testing.assert_allclose(lse, natural * np.log2(np.e), atol=1e-5)
    target = np.empty_like(arrays["q"])
    assert wrapper.run(arrays["q"], cache, out=target) is target


def test_a_run_that_was_not_planned_so_is_refused() -> None:
    arrays = Case(lengths=(30,)).arrays()
    wrapper = BatchDecodeWithPagedKVCacheWrapper()
    cache = arrays["k_cache"], arrays["v_cache"]
    with pytest.raises(KernelError, match="run before plan"):
        wrapper.run(arrays["q"], cache)
    wrapper.begin_forward(*block_table_to_csr(arrays["block_table"], [30], 16), 8, 2, 64, 16)
    with pytest.raises(KernelError, match=r"planned for \(8, 2, 64, 16\)"):
        wrapper.run(arrays["q"][:, :4], cache)
    with pytest.raises(KernelError, match="pos_encoding_mode"):
        wrapper.plan([0, 1], [0], [3], 8, 2, 64, 16, pos_encoding_mode="ROPE_LLAMA")


@pytest.mark.parametrize("left", [0, 9])
def test_a_run_has_a_window_and_sinks_of_its_own(left: int) -> None:
    arrays, sinks = Case(lengths=(30, 17)).arrays(), np.linspace(-1, 3, 8).astype(np.float32)
    wrapper = BatchDecodeWithPagedKVCacheWrapper()
    wrapper.plan(*block_table_to_csr(arrays["block_table"], arrays["cache_seqlens"], 16), 8, 2, 64, 16, window_left=20)
    cache = arrays["k_cache"], arrays["v_cache"]
    want = paged_attention_decode(**arrays, window_size=(left, -1), sinks=sinks)
    np.testing.assert_array_equal(wrapper.run(arrays["q"], cache, window_left=left, sinks=sinks, enable_pdl=True), want)
    planned = paged_attention_decode(**arrays, window_size=(20, -1))
    np.testing.assert_array_equal(wrapper.run(arrays["q"], cache), planned)


def test_keywords_that_would_change_the_result_are_refused() -> None:
    wrapper = BatchDecodeWithPagedKVCacheWrapper()
    table = [0, 1], [0], [3], 8, 2, 64, 16
    with pytest.raises(
        KernelError, match=r"use_cuda_graph: not supported. the wrapper supports kv_layout and backend; .*use_tensor"
    ):
        BatchDecodeWithPagedKVCacheWrapper(use_cuda_graph=True)
    with pytest.raises(KernelError, match=r"o_data_type, q_len_per_req: not supported. plan supports window_left"):
        wrapper.plan(*table, o_data_type="float16", q_len_per_req=2)
    wrapper.plan(*table, o_data_type=None, non_blocking=True)
    arrays = Case(lengths=(3,)).arrays()
    with pytest.raises(KernelError, match=r"window_lft: not supported. run supports .*window_left and sinks; .* enable_pdl"):
        wrapper.run(arrays["q"], (arrays["k_cache"], arrays["v_cache"]), window_lft=3)


def test_tensors_go_through_the_adapters() -> None:
    torch = pytest.importorskip("torch")
    arrays = {name: torch.from_numpy(array) for name, array in Case(lengths=(40, 17)).arrays().items()}
    want = paged_attention_decode(**arrays)
    q = arrays.pop("q")
    assert torch.equal(flash_attn_with_kvcache(q[:, None], **arrays)[:, 0], want)
    wrapper = BatchDecodeWithPagedKVCacheWrapper(torch.empty(8))
    wrapper.plan(*block_table_to_csr(arrays["block_table"], arrays["cache_seqlens"], 16), 8, 2, 64, 16)
    assert torch.equal(wrapper.run(q, (arrays["k_cache"], arrays["v_cache"])), want)
    new = torch.randn(2, 1, 2, 64)
    before = arrays["k_cache"].clone()
    flash_attn_with_kvcache(q[:, None], k=new, v=new, **arrays)
    assert int((arrays["k_cache"] != before).sum()) - int(before.isnan().sum()) <= 2 * 2 * 64
    assert torch.equal(arrays["k_cache"][arrays["block_table"][0, 2], 8], new[0, 0])


def test_tables_on_a_gpu_are_fetched_for_a_plan() -> None:
    """Tensors without data stand for those on a GPU: that there is none to fetch is as far as it gets."""
    torch = pytest.importorskip("torch")
    there = [torch.tensor(numbers, dtype=torch.int32, device="meta") for numbers in ([0, 1], [0], [3])]
    with pytest.raises(NotImplementedError, match="out of meta tensor"):
        BatchDecodeWithPagedKVCacheWrapper().plan(*there, 8, 2, 64, 16)
    with pytest.raises(NotImplementedError, match="out of meta tensor"):
        block_table_to_csr(there[1].reshape(1, 1), there[2], 16)
