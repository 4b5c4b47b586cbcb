"""Attention in parts, merged, is attention to the whole."""

from typing import Any

import numpy as np
import pytest
from attention_cases import Case
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedkv.kernels.contract import KernelError, check_call, narrowed, widened
from pagedkv.kernels.dispatch import paged_attention
from pagedkv.kernels.merge import cascade_attention, merge_state
from pagedkv.kernels.reference import attend


@given(st.integers(0, 6), st.integers(0, 6), st.booleans())
@settings(max_examples=30)
def test_two_parts_of_the_blocks_are_the_whole(first: int, second: int, sinks: bool) -> None:
    blocks = first + second
    arrays = Case(lengths=(4 * blocks,), block_size=4, head_dim=8).arrays()
    logits = np.linspace(-1, 3, 8).astype(np.float32) if sinks else None
    want, want_lse = attend(check_call(**arrays, sinks=logits))
    table = arrays["block_table"]
    halves = [(table[:, :first], [4 * first]), (table[:, first:blocks], [4 * second])]
    states = []
    for part, (blocks_of, length) in enumerate(halves):
        some = {**arrays, "block_table": blocks_of, "cache_seqlens": length}
        states += attend(check_call(**some, sinks=logits if part == 0 else None))
    out, lse = merge_state(*states)
    np.testing.assert_allclose(out, want, atol=1e-6)
    np.testing.assert_allclose(lse, want_lse, atol=1e-6)


def state(seed: int, *shape: int) -> tuple[Any, Any]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((*shape, 4)).astype(np.float32), (50 * rng.standard_normal(shape)).astype(np.float32)


@given(st.integers(0, 99))
@settings(max_examples=20)
def test_merging_commutes_and_associates_and_nothing_is_neutral(seed: int) -> None:
    a, b, c = (state(seed + i, 3, 2) for i in range(3))
    nothing = np.zeros((3, 2, 4), np.float32), np.full((3, 2), -np.inf, np.float32)
    for one, other in ((merge_state(*a, *b), merge_state(*b, *a)), (merge_state(*a, *nothing), a), (merge_state(*nothing, *a), a)):
        for x, y in zip(one, other, strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
    left, right = merge_state(*merge_state(*a, *b), *c), merge_state(*a, *merge_state(*b, *c))
    np.testing.assert_allclose(left[0], right[0], rtol=1e-4, atol=1e-5)
    out, lse = merge_state(*nothing, *nothing)
    assert (out == 0).all()
    assert (lse == -np.inf).all()


def test_half_precision_comes_out_as_it_went_in() -> None:
    (a, log_a), (b, log_b) = state(0, 5, 2), state(1, 5, 2)
    want = merge_state(a, log_a, b, log_b)[0]
    for kind in (np.float16, np.uint16):
        out, _ = merge_state(narrowed(a, kind), log_a, narrowed(b, kind), log_b)
        assert out.dtype == kind
        np.testing.assert_allclose(widened(out).astype(float), want, atol=2e-2)
    torch = pytest.importorskip("torch")
    out, lse = merge_state(*(torch.tensor(x) for x in (a, log_a, b, log_b)))
    np.testing.assert_allclose(out.numpy(), want, atol=1e-6)
    assert lse.dtype == torch.float32
    assert merge_state(out.bfloat16(), lse, out.bfloat16(), lse)[0].dtype == torch.bfloat16


def test_states_that_do_not_fit_are_refused() -> None:
    a, b = state(0, 3, 2), state(1, 3, 4)
    with pytest.raises(KernelError, match="states of shapes"):
        merge_state(*a, *b)


CASCADES = {
    "decode": {"lengths": (70, 64, 49), "shared_blocks": 3},
    "chunks": {"lengths": (70, 90), "num_queries": (5, 40), "shared_blocks": 3},
    "bf16": {"lengths": (70, 64), "shared_blocks": 3, "dtype": "bfloat16"},
    "HND": {"lengths": (70, 64), "shared_blocks": 3, "kv_layout": "HND"},
    "sinks and softcap": {
        "lengths": (70, 64),
        "shared_blocks": 3,
        "options": {"with_sinks": True, "softcap": 2.0, "num_splits": 3},
    },
    "nothing shared": {"lengths": (70, 64)},
}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", CASCADES)
def test_a_cascade_is_attention(name: str, backend: str) -> None:
    case = Case(**CASCADES[name])
    arrays, options = case.arrays(), case.keywords()
    want, want_lse = paged_attention(**arrays, **options, backend="reference", return_lse=True)
    shared = 16 * case.shared_blocks
    out, lse = cascade_attention(**arrays, **options, num_shared_tokens=shared, backend=backend, return_lse=True)
    assert out.dtype == want.dtype
    tolerance = 2e-2 if case.dtype == "bfloat16" else 1e-5
    np.testing.assert_allclose(widened(out).astype(float), widened(want).astype(float), atol=tolerance)
    np.testing.assert_allclose(lse, want_lse, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_shared_tokens": 20}, "a multiple of the block size 16"),
        ({"num_shared_tokens": 64}, "need to lie before every query"),
        ({"num_shared_tokens": 48}, "blocks of the tables differ"),
        ({"window_size": (4, -1)}, "no window_size"),
    ],
)
def test_what_cannot_be_cut_is_refused(change: dict[str, Any], message: str) -> None:
    arrays = Case(lengths=(70, 64), shared_blocks=2).arrays()
    with pytest.raises(KernelError, match=message):
        cascade_attention(**{**arrays, "num_shared_tokens": 32} | change)
