"""The CPU kernel agrees with the reference, whatever the shape, the layout and the cutting of the work."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numba
import numpy as np
import pytest
from attention_cases import DTYPES, Case, cases
from hypothesis import given, settings

from pagedkv.allocation import KVPoolSettings
from pagedkv.allocators.paged import PagedAllocator
from pagedkv.block_hash import BlockHashChain
from pagedkv.kernels import cpu, cpu_plan, reference, simd
from pagedkv.kernels.cache_ops import reshape_and_cache
from pagedkv.kernels.contract import KernelError, check_call
from pagedkv.kernels.cpu_plan import plan
from pagedkv.kv_request import KVRequest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(numba.config.DISABLE_JIT, reason="the CPU kernel is compiled code")


def agree(case: Case) -> None:
    call = check_call(**case.arrays(), **case.keywords())
    out, lse = cpu.attend(call)
    want, want_lse = reference.attend(call)
    np.testing.assert_allclose(out, want, atol=1e-5, rtol=1e-5)  # both in float32 from the values that are stored
    np.testing.assert_allclose(lse, want_lse, atol=1e-5, rtol=1e-5)


@given(cases())
@settings(max_examples=80)
def test_decode_agrees(case: Case) -> None:
    agree(case)


@given(cases(prefill=True))
@settings(max_examples=40)
def test_prefill_agrees(case: Case) -> None:
    agree(case)


@given(cases(dtypes=("float16", "bfloat16")))
@settings(max_examples=30)
def test_decode_agrees_in_half_precision(case: Case) -> None:
    agree(case)


@given(cases(prefill=True, dtypes=("float16", "bfloat16"), head_dims=(64,)))
@settings(max_examples=15)
def test_prefill_agrees_in_half_precision(case: Case) -> None:
    agree(case)


@given(cases(head_dims=(16, 24, 72, 80, 96, 100, 120)))
@settings(max_examples=30)
def test_heads_that_fill_no_vector_agree(case: Case) -> None:
    agree(case)


LONG = [
    Case(lengths=(4096,), num_kv_heads=8, head_dim=128),
    Case(lengths=(3001, 5, 2500), num_kv_heads=2, block_size=128, options={"num_splits": 7}),
    Case(lengths=(2777,), group_size=8, dtype="bfloat16", options={"window_size": (1500, -1), "with_sinks": True}),
    Case(lengths=(2100,), num_queries=(300,), num_kv_heads=1, group_size=7),
    Case(lengths=(1000,) * 9, num_kv_heads=32, group_size=1, block_size=8),
    Case(lengths=(600,), num_kv_heads=1, group_size=71, options={"softcap": 20.0}),
]


@pytest.mark.parametrize("case", LONG, ids=lambda case: f"{case.lengths[0]}x{len(case.lengths)}")
def test_thousands_of_keys_agree(case: Case) -> None:
    agree(case)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_error_is_that_of_float32_sums(dtype: str) -> None:
    call = check_call(**Case(lengths=(1500, 40), head_dim=128, dtype=dtype).arrays())
    assert np.abs(cpu.attend(call)[0] - reference.attend(call)[0]).max() < 2e-6


def test_large_scores_do_not_overflow() -> None:
    arrays = Case(lengths=(500,)).arrays()
    arrays["q"] *= 1e4
    call = check_call(**arrays)
    out, lse = cpu.attend(call)
    want, want_lse = reference.attend(call)
    np.testing.assert_allclose(out, want, atol=1e-2)  # scores of 1e4 have an absolute error of 1e-3 in float32
    np.testing.assert_allclose(lse, want_lse, rtol=1e-6)


def test_a_nan_that_is_seen_comes_out() -> None:
    arrays = Case(lengths=(40, 40)).arrays()
    arrays["k_cache"][arrays["block_table"][1, 1], 3] = np.nan
    out, lse = cpu.attend(check_call(**arrays))
    assert np.isfinite(out[0]).all()
    assert np.isnan(out[1]).all()
    assert np.isnan(lse[1]).all()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("num_splits", range(8))
def test_splits_and_threads_do_not_matter(num_splits: int, threads: int) -> None:
    if threads > numba.config.NUMBA_NUM_THREADS:
        pytest.skip("one core")
    before = numba.get_num_threads()
    numba.set_num_threads(threads)
    try:
        agree(Case(lengths=(1, 700, 0, 33), num_queries=(1, 40, 0, 2), options={"num_splits": num_splits, "with_sinks": True}))
    finally:
        numba.set_num_threads(before)


@given(cases(prefill=True, head_dims=(16,)))
@settings(max_examples=60)
def test_the_plan_covers_every_query_head_and_key_once(case: Case) -> None:
    call = check_call(**case.arrays(), **case.keywords())
    for threads in (1, 3, 64):
        todo = plan(call, threads)
        done = np.zeros((len(call.q), case.num_kv_heads, max(case.lengths) + 1), int)
        for item in todo.items:
            done[item["q_start"] : item["q_stop"], item["head_start"] : item["head_stop"], item["kv_start"] : item["kv_stop"]] += 1
            rows = (item["q_stop"] - item["q_start"]) * (item["head_stop"] - item["head_start"]) * case.group_size
            assert rows <= todo.num_rows
            assert case.options.get("num_splits", 0) in (0, 1) or item["num_pieces"] <= case.options["num_splits"]
        assert done.max(initial=0) <= 1
        for query in range(len(call.q)):
            assert done[query][:, todo.first[query] : todo.last[query]].all()
        assert todo.pieces_left.sum() == len(todo.items)


def test_one_long_sequence_keeps_all_threads_busy_and_many_short_ones_are_not_split() -> None:
    one = plan(check_call(**Case(lengths=(4096,), num_kv_heads=8).arrays()), 20)
    assert len(one.items) >= 20
    assert max(item["kv_stop"] - item["kv_start"] for item in one.items) <= 4096 // 8
    many = plan(check_call(**Case(lengths=(200,) * 30).arrays()), 4)
    assert len(many.items) == 30
    assert many.num_part_rows == 0


def test_what_lies_around_the_cache_does_not_matter() -> None:
    """A pool of many layers: the cache is a slice of it, with strides of its own, and read only."""
    case = Case(lengths=(50, 7), head_dim=128)
    arrays = case.arrays()
    want = cpu.attend(check_call(**arrays))[0]
    for name in ("k_cache", "v_cache"):
        shape = arrays[name].shape
        pool = np.full((shape[0], 3, shape[1], shape[2] + 1, shape[3] + 5), np.nan, np.float32)
        pool[:, 1, :, 1:, 5:] = arrays[name]
        arrays[name] = pool[:, 1, :, 1:, 5:]
        arrays[name].flags.writeable = False
    np.testing.assert_array_equal(cpu.attend(check_call(**arrays))[0], want)


def test_a_head_with_gaps_or_shorter_than_a_vector_is_refused() -> None:
    arrays = Case(lengths=(5,), head_dim=2 * simd.LANES).arrays()
    gaps = {name: arrays[name][..., ::2] for name in ("q", "k_cache", "v_cache")}
    with pytest.raises(KernelError, match="needs the elements of a head next to each other"):
        cpu.attend(check_call(**{**arrays, **gaps}))
    with pytest.raises(KernelError, match="head_dim is 2: the CPU kernel needs"):
        cpu.attend(check_call(**Case(lengths=(5,), head_dim=2).arrays()))


def test_nothing_to_do_is_done() -> None:
    arrays = Case(lengths=(5,)).arrays()
    nothing = {"q": arrays["q"][:0], "block_table": arrays["block_table"][:0], "cache_seqlens": np.empty(0, np.int32)}
    out, lse = cpu.attend(check_call(**{**arrays, **nothing}))
    assert out.shape == (0, 8, 64)
    assert lse.shape == (0, 8)


def test_tiles_of_any_size_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    for tile_bytes in (1, 4096, 1 << 20):
        monkeypatch.setattr(cpu_plan, "TILE_BYTES", tile_bytes)
        agree(Case(lengths=(333, 64), num_queries=(5, 3), block_size=7))


def test_tables_of_the_real_allocator() -> None:
    """Two requests share a prefix, one is preempted and comes again: keys are written where the allocator says, and found there."""
    rng = np.random.default_rng(5)
    pool = KVPoolSettings(num_blocks=24, block_size=4, max_num_seqs=4, max_model_len=64, enable_prefix_caching=True)
    allocator = PagedAllocator(pool)
    prompts = [[*range(10, 22), 1, 2, 3], [*range(10, 22), 7, 8], [5] * 9]
    requests = []
    for name, tokens in enumerate(prompts):
        chain = BlockHashChain(block_size=4)
        chain.extend(tokens)
        request = KVRequest(request_id=name, num_tokens=len(tokens))
        request.update(chain)
        requests.append(request)

    shape = (24, 4, 2, 64)
    k_cache, v_cache = np.full(shape, np.nan, np.float32), np.full(shape, np.nan, np.float32)
    keys = rng.standard_normal((2, 64, 64, 2, 64)).astype(np.float32)  # by token id and position: what a model would compute

    def step(index: int) -> int:
        request, tokens = requests[index], prompts[index]
        grant = allocator.allocate_slots(request, len(tokens) - allocator.get_computed_tokens(request))
        assert grant is not None
        new = np.arange(grant.num_cached_tokens, len(tokens))
        slots = allocator.slots_held(request)[new]
        where = np.array(tokens)[new], new
        reshape_and_cache(keys[0][where], keys[1][where], k_cache, v_cache, slots)
        request.num_computed_tokens = len(tokens)
        return grant.num_cached_tokens

    assert [step(0), step(1)] == [0, 12]
    allocator.preempt(requests[0])
    requests[0].num_computed_tokens = 0
    assert step(2) == 0
    assert step(0) >= 12

    table = np.full((3, 16), -1, np.int32)
    for row, request in enumerate(requests):
        blocks = allocator.manager.block_table(request)
        table[row, : blocks.size] = blocks
    assert table[0, 0] == table[1, 0]
    q = rng.standard_normal((3, 8, 64)).astype(np.float32)
    out, _ = cpu.attend(check_call(q, k_cache, v_cache, table, [len(tokens) for tokens in prompts]))
    for row, tokens in enumerate(prompts):
        k, v = (keys[part][np.array(tokens), np.arange(len(tokens))].astype(float) for part in range(2))
        for head in range(8):
            weights = np.exp(k[:, head // 4] @ q[row, head] / 8)
            np.testing.assert_allclose(out[row, head], weights @ v[:, head // 4] / weights.sum(), atol=1e-5)


HALF = """
import numpy as np
from numba import njit
from pagedkv.kernels import simd

@njit
def widen(bits, out):
    for i in range(0, bits.size, simd.LANES):
        simd.store(out, i, simd.load(bits, i))

every = np.arange(1 << 16).astype(np.uint16)
out = np.empty(1 << 16, np.float32)
widen(every.view(np.int16), out)
np.testing.assert_array_equal(out, every.view(np.float16).astype(np.float32))
widen(every, out)
want = (every.astype(np.uint32) << 16).view(np.float32)
np.testing.assert_array_equal(out, want)
print(simd.LANES, simd.HALF_IN_HARDWARE)
"""


@pytest.mark.parametrize("features", ["", "+avx2,+f16c"])
def test_every_half_is_widened_whatever_the_machine_can_do(features: str) -> None:
    if os.uname().machine != "x86_64":
        pytest.skip("names features of x86-64")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": features}
    done = subprocess.run([sys.executable, "-c", HALF], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == (["8", "True"] if features else ["4", "False"])


TILE = """
import numba
import numpy as np
from pagedkv.kernels import simd
from pagedkv.kernels.cpu_tiles import tile_kernels

@numba.njit
def call(kernel, rows, cache, where, heads, per_head, dim, scores):
    kernel(rows, cache, 0, where, where, dim, heads, per_head, dim, scores)

assert simd.LANES == 4
rng = np.random.default_rng(0)
heads, per_head, dim, tokens = 2, 5, 70, 8
q, cache = rng.standard_normal((heads, per_head, dim)), rng.standard_normal((tokens, heads, dim)).astype(np.float16)
padded = np.zeros((heads, per_head, 72), np.float32)
padded[..., :68], padded[..., 70:] = q[..., :68], q[..., 68:]  # the last vector overlaps the one before it by two
where, scores, acc = np.arange(tokens) * heads * dim, np.empty((tokens, heads, per_head), np.float32), np.zeros_like(padded)
score, weigh = tile_kernels(np.dtype(np.float16))
call(score, padded.reshape(-1), cache.reshape(-1).view(np.uint8), where, heads, per_head, dim, scores.reshape(-1))
np.testing.assert_allclose(scores, np.einsum("hrd,thd->thr", q, cache.astype(float)), atol=1e-4)
call(weigh, acc.reshape(-1), cache.reshape(-1).view(np.uint8), where, heads, per_head, dim, scores.reshape(-1))
want = np.einsum("thr,thd->hrd", scores, cache.astype(float))
np.testing.assert_allclose(acc[..., :68], want[..., :68], atol=1e-4)
np.testing.assert_allclose(acc[..., 68:], want[..., 66:], atol=1e-4)
"""


def test_a_plain_machine_computes_the_same() -> None:
    """With 4 lanes, as an arm64 machine has."""
    if os.uname().machine != "x86_64":
        pytest.skip("has 4 lanes anyway, or other names")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}
    done = subprocess.run([sys.executable, "-c", TILE], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_q_and_cache_may_differ_in_type() -> None:
    arrays: dict[str, Any] = Case(lengths=(40,), dtype="bfloat16").arrays()
    arrays["q"] = np.random.default_rng(0).standard_normal(arrays["q"].shape).astype(np.float16)
    call = check_call(**arrays)
    np.testing.assert_allclose(cpu.attend(call)[0], reference.attend(call)[0], atol=1e-5)
