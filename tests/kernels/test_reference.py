"""The reference is softmax attention: against a loop over single keys, and by laws that need no second implementation."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from attention_cases import Case, cases
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedkv.kernels.contract import check_call, nhd
from pagedkv.kernels.reference import attend


def by_hand(case: Case, arrays: dict[str, Any], sequence: int, query: int, head: int) -> tuple[Any, float]:
    """One query of one head: a loop over the tokens that it sees, one by one."""
    options = case.keywords()
    starts = arrays.get("cu_seqlens_q", np.arange(len(case.lengths) + 1))
    position = case.lengths[sequence] - (starts[sequence + 1] - starts[sequence]) + query
    left = options.get("window_size", (-1, -1))[0]
    k_cache, v_cache = (nhd(arrays[name], case.kv_layout) for name in ("k_cache", "v_cache"))
    scale, cap = options.get("softmax_scale") or case.head_dim**-0.5, options.get("softcap", 0.0)
    logits, values = [], []
    for token in range(max(position - left, 0) if left >= 0 else 0, position + 1):
        block, slot = arrays["block_table"][sequence, token // case.block_size], token % case.block_size
        key = k_cache[block, slot, head // case.group_size].astype(float) * options.get("k_scale", 1.0)
        logit = scale * float(np.dot(arrays["q"][starts[sequence] + query, head].astype(float), key))
        logits.append(cap * math.tanh(logit / cap) if cap else logit)
        values.append(v_cache[block, slot, head // case.group_size].astype(float) * options.get("v_scale", 1.0))
    mass = [math.exp(logit) for logit in logits]
    total = sum(mass) + (math.exp(float(options["sinks"][head])) if "sinks" in options else 0.0)
    out = sum((m / total * value for m, value in zip(mass, values, strict=True)), start=np.zeros(case.head_dim))
    return out, math.log(total) if total else -math.inf


@pytest.mark.parametrize("prefill", [False, True])
@given(st.data())
@settings(max_examples=25)
def test_it_is_the_loop_over_tokens(prefill: bool, data: st.DataObject) -> None:
    case = data.draw(cases(prefill=prefill, head_dims=(4,), longest=40))
    arrays = case.arrays()
    out, lse = attend(check_call(**arrays, **case.keywords()))
    assert out.dtype == lse.dtype == np.float64
    for sequence, count in enumerate(case.num_queries or (1,) * len(case.lengths)):
        start = sum((case.num_queries or (1,) * len(case.lengths))[:sequence])
        for query in {0, count // 2, count - 1} & set(range(count)):
            head = data.draw(st.integers(0, case.num_kv_heads * case.group_size - 1))
            want, want_lse = by_hand(case, arrays, sequence, query, head)
            np.testing.assert_allclose(out[start + query, head], want, rtol=1e-6, atol=1e-9)
            np.testing.assert_allclose(lse[start + query, head], want_lse, rtol=1e-6, atol=1e-9)


def test_equal_keys_give_the_mean_of_the_values_and_the_log_of_their_number() -> None:
    k_cache = np.ones((3, 4, 1, 8), np.float32)
    v_cache = np.arange(3 * 4 * 8, dtype=np.float32).reshape(3, 4, 1, 8)
    call = check_call(np.zeros((1, 2, 8), np.float32), k_cache, v_cache, [[2, 0]], [6])
    out, lse = attend(call)
    seen = np.concatenate([v_cache[2, :, 0], v_cache[0, :2, 0]])
    np.testing.assert_allclose(out[0], np.stack([seen.mean(0)] * 2))
    np.testing.assert_allclose(lse, math.log(6))


@pytest.mark.parametrize("sinks", [None, np.array([0.5, -1, 2, 0], np.float32)])
def test_a_row_without_keys_has_output_0_and_the_lse_of_nothing_or_of_its_sink(sinks: Any) -> None:
    arrays = Case(lengths=(0, 5), num_kv_heads=1).arrays()
    out, lse = attend(check_call(**arrays, sinks=sinks))
    assert (out[0] == 0).all()
    assert (lse[0] == (-np.inf if sinks is None else sinks)).all()
    assert np.isfinite(lse[1]).all()


def test_without_a_mask_queries_see_all_keys_and_a_window_may_look_ahead() -> None:
    arrays = Case(lengths=(9,), num_queries=(3,)).arrays()
    last = attend(check_call(**arrays))[0][2]
    arrays["q"][:] = arrays["q"][2]
    for query in attend(check_call(**arrays, causal=False))[0]:
        np.testing.assert_allclose(query, last)
    ahead = attend(check_call(**arrays, causal=False, window_size=(-1, 1)))[0]
    np.testing.assert_allclose(ahead[1], last)
    assert not np.allclose(ahead[0], last)


@given(cases(prefill=True, head_dims=(8,), longest=60))
@settings(max_examples=15)
def test_a_chunk_is_its_queries_one_by_one(case: Case) -> None:
    arrays = case.arrays()
    out, _ = attend(check_call(**arrays, **case.keywords()))
    starts = arrays.pop("cu_seqlens_q")
    for sequence, count in enumerate(case.num_queries or ()):
        if count:
            query = count // 2
            single = {name: arrays[name][sequence : sequence + 1] for name in ("block_table", "cache_seqlens")}
            single["cache_seqlens"] = single["cache_seqlens"] - (count - 1 - query)
            where = starts[sequence] + query
            one, _ = attend(check_call(**{**arrays, **single, "q": arrays["q"][where : where + 1]}, **case.keywords()))
            np.testing.assert_allclose(out[where], one[0], rtol=1e-12, atol=1e-12)


def test_interleaved_and_hnd_are_the_same_cache() -> None:
    case = Case(lengths=(20, 3))
    plain = attend(check_call(**case.arrays()))[0]
    for other in (
        replace(case, kv_layout="HND"),
        replace(case, interleaved=True),
        replace(case, kv_layout="HND", interleaved=True),
    ):
        np.testing.assert_array_equal(attend(check_call(**other.arrays(), **other.keywords()))[0], plain)
