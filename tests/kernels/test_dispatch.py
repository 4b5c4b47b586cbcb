"""Calls reach a kernel that can serve them, with results of the caller's kind; others are refused with what works."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attention_cases import DTYPES, TOLERANCE, Case, cases
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedkv.errors import ConfigError
from pagedkv.kernels.contract import KernelError, check_call, narrowed, widened
from pagedkv.kernels.dispatch import available, paged_attention, paged_attention_decode, paged_attention_prefill
from pagedkv.kernels.gpu_arguments import check_devices
from pagedkv.kernels.reference import attend

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_output_is_of_the_queries_type(dtype: str, backend: str) -> None:
    arrays = Case(lengths=(30, 0), dtype=dtype).arrays()
    out, lse = paged_attention_decode(**arrays, backend=backend, return_lse=True)
    want, want_lse = attend(check_call(**arrays))
    assert out.dtype == DTYPES[dtype]
    assert lse.dtype == np.float32
    np.testing.assert_allclose(widened(out).astype(float), want, atol=TOLERANCE[dtype])
    np.testing.assert_allclose(lse, want_lse, atol=1e-5)
    target = np.full((2, 16, 64), np.float32(7))[:, 4:12]
    assert paged_attention_decode(**arrays, backend=backend, out=target) is target
    np.testing.assert_allclose(target, want, atol=1e-5)


@given(cases(prefill=True, dtypes=tuple(DTYPES)))
@settings(max_examples=20)
def test_tensors_and_arrays_give_the_same(case: Case) -> None:
    torch = pytest.importorskip("torch")
    arrays, options = case.arrays(), case.keywords()

    def tensor(array: Any) -> Any:
        return torch.from_numpy(array).view(torch.bfloat16) if array.dtype == np.uint16 else torch.from_numpy(array)

    want, want_lse = paged_attention(**arrays, **options, return_lse=True)
    tensors = {name: tensor(array) for name, array in arrays.items()}
    if "sinks" in options:
        options["sinks"] = torch.tensor(options["sinks"])
    out, lse = paged_attention(**tensors, **options, return_lse=True)
    assert out.dtype == tensors["q"].dtype
    np.testing.assert_array_equal(lse.numpy(), want_lse)
    torch.testing.assert_close(out, tensor(want), atol=0, rtol=0, equal_nan=True)
    target = torch.empty_like(tensors["q"])
    assert paged_attention(**tensors, **options, out=target) is target
    assert torch.equal(target, out)


def test_prefill_is_attention_with_chunks() -> None:
    case = Case(lengths=(30, 20), num_queries=(4, 20))
    arrays = case.arrays()
    np.testing.assert_array_equal(paged_attention_prefill(**arrays), paged_attention(**arrays))
    everything = paged_attention_prefill(**arrays, causal=False, backend="reference")
    np.testing.assert_allclose(paged_attention_prefill(**arrays, causal=False), everything, atol=1e-5)


@given(st.floats(width=32, allow_nan=True))
def test_bit_patterns_of_bfloat16_are_rounded_to_nearest_even(number: float) -> None:
    bits = int(narrowed(np.array([number], np.float32), np.uint16)[0])
    back = float(widened(np.array([bits], np.uint16))[0])
    if np.isnan(number):
        assert np.isnan(back)
    elif np.isfinite(back):
        below, above = (float(widened(np.array([bits + step], np.uint16))[0]) for step in (-1, 1)) if bits & 0x7FFF else (0.0, 0.0)
        distances = [abs(x - number) for x in (below, above) if np.isfinite(x)]
        if bits & 0x7FFF:
            assert all(abs(back - number) <= distance for distance in distances)
            assert bits % 2 == 0 or abs(back - number) not in distances


def test_what_is_available_is_said_and_why_the_rest_is_not() -> None:
    reasons = available()
    assert set(reasons) == {"triton", "cuda", "cpu", "reference"}
    assert reasons["reference"] is None
    arrays = Case(lengths=(5,)).arrays()
    for name, reason in reasons.items():
        if reason is not None:
            assert len(reason) > 10
            with pytest.raises(KernelError, match=f"backend '{name}' cannot run here: .* What can: .*reference"):
                paged_attention_decode(**arrays, backend=name)


def test_an_unknown_backend_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="unknown backend 'cpuu': did you mean cpu"):
        paged_attention_decode(**Case(lengths=(5,)).arrays(), backend="cpuu")


def test_without_the_compiler_the_reference_serves_who_asks_for_it() -> None:
    script = """
import numpy as np
from pagedkv.kernels.contract import KernelError
from pagedkv.kernels.dispatch import available, paged_attention_decode
assert "NUMBA_DISABLE_JIT" in available()["cpu"], available()
cache = np.ones((1, 4, 1, 16), np.float32)
arguments = np.ones((1, 2, 16), np.float32), cache, cache, [[0]], [3]
np.testing.assert_allclose(paged_attention_decode(*arguments, backend="reference"), 1)
try:
    paged_attention_decode(*arguments)
except KernelError as refused:
    assert "'cpu': numba does not compile here" in str(refused) and "'reference'" in str(refused), refused
else:
    raise AssertionError("auto chose the reference")
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NUMBA_DISABLE_JIT": "1"}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_call_imports_what_its_own_backend_needs() -> None:
    script = """
import sys
import numpy as np
from pagedkv.kernels.dispatch import paged_attention_decode
cache = np.ones((1, 4, 1, 16), np.float32)
for backend in ("reference", "auto"):
    paged_attention_decode(np.ones((1, 2, 16), np.float32), cache, cache, [[0]], [3], backend=backend)
    print(*sys.modules, sep="\\n")
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()).isdisjoint({"torch", "triton", "numba.cuda"})


def test_the_dispatcher_is_imported_without_heavy_modules() -> None:
    script = "import sys, pagedkv.kernels.dispatch, pagedkv.kernels.adapters, pagedkv.kernels.merge; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()).isdisjoint({"torch", "triton", "numba", "numba.cuda"})


WRONG = [
    ({"q": np.ones((2, 64), np.float32)}, r"q has shape \(2, 64\): needs \[queries"),
    ({"q": np.ones((2, 8, 32), np.float32)}, "q has head_dim 32, the caches 64"),
    ({"q": np.ones((2, 7, 64), np.float32)}, "7 query heads over 2 KV heads: needs a multiple of 2"),
    ({"q": np.ones((2, 8, 64), np.float64)}, "q is float64: needs float32"),
    ({"q": np.ones((3, 8, 64), np.float32)}, "3 queries for 2 block tables"),
    (
        {"k_cache": np.ones((9, 16, 2, 64), np.int8), "v_cache": np.ones((9, 16, 2, 64), np.int8)},
        "the caches are int8: the CPU reads",
    ),
    ({"cache_seqlens": [1, 2, 3]}, r"cache_seqlens has shape \(3,\): 2 sequences need \[2\]"),
    ({"cache_seqlens": [30, 1000]}, r"cache_seqlens\[1\] is 1000: a block table of 4 blocks of 16 tokens holds 0 to 64"),
    ({"cache_seqlens": [-1, 3]}, r"cache_seqlens\[0\] is -1"),
    ({"cache_seqlens": [30, 33]}, r"block_table\[1, 2\] is -1: sequence 1 needs blocks 0 to 2 of its table, each 0 to"),
    ({"block_table": np.full((2, 4), 99)}, r"block_table\[0, 0\] is 99"),
    ({"block_table": [0, 1]}, r"block_table has shape \(2,\): needs \[batch, max_blocks\]"),
    ({"cu_seqlens_q": [0, 1]}, r"cu_seqlens_q has shape \(2,\): 2 sequences need \[3\]"),
    ({"cu_seqlens_q": [0, 3, 2]}, r"cu_seqlens_q is \[0, 3, 2\]: needs to rise from 0 to the number of queries, 2"),
    ({"sinks": np.ones(3, np.float32)}, r"sinks have shape \(3,\): 8 query heads need \[8\]"),
    ({"num_splits": -1}, "num_splits is -1: needs 0"),
    ({"window_size": (-2, 0)}, "needs \\(left, right\\)"),
    ({"softcap": -1.0}, "softcap is -1.0: needs 0"),
    ({"kv_layout": "HDN"}, "kv_layout is 'HDN': needs 'NHD' or 'HND'"),
    ({"softmax_scale": float("nan")}, "needs a finite number"),
    ({"out": np.ones((2, 8, 32), np.float32)}, "out has shape"),
    ({"out": np.ones((2, 8, 64), np.int32)}, "out is int32: needs a writable array of float32"),
]


@pytest.mark.parametrize(("change", "message"), WRONG, ids=[message[:40] for _, message in WRONG])
def test_what_does_not_fit_is_refused_with_what_works(change: dict[str, Any], message: str) -> None:
    with pytest.raises(KernelError, match=message):
        paged_attention(**{**Case(lengths=(30, 17)).arrays(), **change})


def test_keywords_that_do_not_exist_are_refused() -> None:
    arrays = Case(lengths=(30,), num_queries=(1,)).arrays()
    with pytest.raises(TypeError, match="softcaps"):
        paged_attention_prefill(**arrays, softcaps=2.0)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="cu_seqlens_q"):
        paged_attention_decode(**arrays)


@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
def test_fp8_on_the_cpu_is_refused_with_what_works(backend: str) -> None:
    torch = pytest.importorskip("torch")
    arrays = {name: torch.from_numpy(array) for name, array in Case(lengths=(30,)).arrays().items()}
    arrays |= {name: arrays[name].to(torch.float8_e4m3fn) for name in ("k_cache", "v_cache")}
    with pytest.raises(KernelError, match=r"a float8_e4m3fn tensor on the CPU.* read float32, .* on a GPU"):
        paged_attention_decode(**arrays, backend=backend)


def test_entries_that_no_visible_key_needs_are_not_looked_at() -> None:
    arrays = Case(lengths=(64, 17)).arrays()
    want = paged_attention_decode(**arrays, window_size=(20, -1))
    arrays["block_table"][0, :2] = 99  # positions 0 to 31, of which none is within 20 of position 63
    np.testing.assert_array_equal(paged_attention_decode(**arrays, window_size=(20, -1)), want)


def test_what_lies_elsewhere_than_the_queries_is_refused() -> None:
    torch = pytest.importorskip("torch")
    here, there = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32, device="meta")
    with pytest.raises(KernelError, match="block_table is on cpu, q is on meta: needs both in one place"):
        check_devices(there, {"block_table": here, "cu_seqlens_q": None}, {})
    with pytest.raises(KernelError, match="sinks is of numpy, q is on cpu"):
        check_devices(here, {"block_table": here}, {"k_cache": here, "sinks": np.zeros(1)})
    with pytest.raises(KernelError, match="cache_seqlens is float32: needs int32"):
        check_devices(here, {"cache_seqlens": here.float()}, {})
    check_devices(here, {"cache_seqlens": here, "cu_seqlens_q": None}, {"sinks": None, "out": here.float()})


def test_scales_are_numbers_that_nobody_waits_for() -> None:
    torch = pytest.importorskip("torch")
    arrays = Case(lengths=(3,)).arrays()
    want = paged_attention(**arrays, k_scale=0.5, v_scale=2.0)
    np.testing.assert_array_equal(paged_attention(**arrays, k_scale=torch.tensor(0.5), v_scale=np.float32(2)), want)
    with pytest.raises(KernelError, match=r"v_scale is a tensor on meta: needs a number, .* keep float\(v_scale\)"):
        paged_attention(**arrays, v_scale=torch.ones((), device="meta"))
