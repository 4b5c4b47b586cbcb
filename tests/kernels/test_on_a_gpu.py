"""The kernels on a GPU against the reference: what no interpreter and no simulator can tell. Skipped where there is none.

`TRITON_INTERPRET=1 pytest tests/kernels/test_on_a_gpu.py` runs what can be run without one, slowly: it tests these tests.
"""

from typing import Any

import numpy as np
import pytest
from attention_cases import Case

torch = pytest.importorskip("torch", reason="the GPU kernels take torch's tensors")

from pagedkv.kernels import reshape_and_cache  # noqa: E402  after the skip
from pagedkv.kernels.contract import check_call  # noqa: E402
from pagedkv.kernels.dispatch import paged_attention, paged_attention_decode, why_not  # noqa: E402
from pagedkv.kernels.reference import attend  # noqa: E402

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
needs_gpu = pytest.mark.skipif(not GPU, reason="torch finds no GPU")
needs_triton = pytest.mark.skipif(why_not("triton") is not None, reason=str(why_not("triton")))
needs_numba = pytest.mark.skipif(not GPU or why_not("cuda") is not None, reason=f"no GPU for numba: {why_not('cuda')}")

TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
TOLERANCE = {"float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}
"""Of outputs that average values of a standard normal distribution, with weights rounded to the type."""

VARIANTS: dict[str, dict[str, Any]] = {
    "usual": {},
    "fp16": {"dtype": "float16"},
    "fp32": {"dtype": "float32"},
    "MHA": {"group_size": 1},
    "MHA, fp32": {"group_size": 1, "dtype": "float32"},
    "group of 7": {"group_size": 7, "num_kv_heads": 1},
    "group of 8, heads of 128": {"group_size": 8, "head_dim": 128},
    "group of 32": {"group_size": 32, "num_kv_heads": 1},
    "heads of 80": {"head_dim": 80},
    "heads of 256": {"head_dim": 256},
    "heads of 512": {"head_dim": 512},
    "blocks of 1": {"block_size": 1},
    "blocks of 7": {"block_size": 7},
    "blocks of 128": {"block_size": 128},
    "HND": {"kv_layout": "HND"},
    "interleaved HND": {"kv_layout": "HND", "interleaved": True},
    "a window": {"options": {"window_size": (20, 0)}},
    "a window of 0": {"options": {"window_size": (0, 0)}},
    "softcap, sinks": {"options": {"softcap": 3.0, "with_sinks": True}},
    "scales": {"options": {"softmax_scale": 0.3, "k_scale": 0.5, "v_scale": 2.0}},
    "everything": {
        "kv_layout": "HND",
        "interleaved": True,
        "block_size": 7,
        "group_size": 3,
        "options": {"softcap": 3.0, "with_sinks": True, "window_size": (30, 0)},
    },
}


def on_device(array: Any, dtype: str) -> Any:
    """Return an array of a case where the kernels are; uint16 are bit patterns of bfloat16."""
    tensor = torch.from_numpy(np.ascontiguousarray(array) if array.ndim < 4 else array)
    return (tensor.view(TYPES[dtype]) if array.dtype == np.uint16 else tensor).to(DEVICE)


def compare(case: Case, backend: str, **more: Any) -> None:
    arrays, keywords = case.arrays(), case.keywords()
    want, want_lse = attend(check_call(**arrays, **keywords))
    tensors = {name: on_device(array, case.dtype) for name, array in arrays.items()}
    if "sinks" in keywords:
        keywords["sinks"] = on_device(keywords["sinks"], "float32")
    out, lse = paged_attention(**tensors, **{**keywords, **more}, backend=backend, return_lse=True)
    scale = float(keywords.get("v_scale", 1.0))
    np.testing.assert_allclose(out.double().cpu(), want, atol=scale * TOLERANCE[case.dtype], rtol=2**-7)
    np.testing.assert_allclose(lse.double().cpu(), want_lse, atol=2e-3 if case.dtype == "float32" else 2e-2)


def case_of(variant: str, **more: Any) -> Case:
    return Case(**{"dtype": "bfloat16", "head_dim": 64, "lengths": (75, 1, 0, 300), **VARIANTS[variant], **more})


@needs_triton
@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_decode(variant: str, num_splits: int) -> None:
    compare(case_of(variant), "triton", num_splits=num_splits)


@needs_triton
@pytest.mark.parametrize("variant", VARIANTS)
def test_prefill(variant: str) -> None:
    compare(case_of(variant, num_queries=(30, 1, 0, 140)), "triton")


@needs_numba
@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "heads of 512"])
def test_the_readable_kernel(variant: str, num_splits: int) -> None:
    compare(case_of(variant), "cuda", num_splits=num_splits)


@needs_triton
@pytest.mark.parametrize("q_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("num_queries", [None, (30, 1, 0, 140)])
def test_fp8(q_dtype: str, num_queries: tuple[int, ...] | None) -> None:
    case = Case(lengths=(75, 1, 0, 300), num_queries=num_queries, head_dim=128)
    arrays = case.arrays()
    stored = {name: torch.from_numpy(arrays[name].copy()).to(torch.float8_e4m3fn) for name in ("k_cache", "v_cache")}
    q = torch.from_numpy(arrays["q"]).to(TYPES[q_dtype])
    exact = {**arrays, "q": q.float().numpy(), **{name: cache.float().numpy() for name, cache in stored.items()}}
    want, _ = attend(check_call(**exact, k_scale=0.5, v_scale=2.0))
    tensors = {name: on_device(array, "float32") for name, array in arrays.items()}
    tensors |= {"q": q.to(DEVICE), **{name: cache.to(DEVICE) for name, cache in stored.items()}}
    out = paged_attention(**tensors, k_scale=0.5, v_scale=2.0, backend="triton")
    np.testing.assert_allclose(out.double().cpu(), want, atol=2 * TOLERANCE[q_dtype], rtol=2**-7)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_tokens_get_where_their_slots_say(dtype: Any) -> None:
    k_cache, v_cache = (torch.zeros(9, 16, 4, 80, device=DEVICE).to(dtype) for _ in range(2))
    key, value = (torch.randn(5, 4, 80, device=DEVICE).to(dtype) for _ in range(2))
    slots = torch.tensor([140, -1, 3, 16, -1], device=DEVICE)
    reshape_and_cache(key, value, k_cache, v_cache, slots)
    for cache, new in ((k_cache, key), (v_cache, value)):
        flat = cache.float().flatten(0, 1)
        assert (flat[[140, 3, 16]] == new.float()[[0, 2, 3]]).all()
        flat[[140, 3, 16]] = 0
        assert not flat.any()


def _step(batch: int = 4, length: int = 200) -> dict[str, Any]:
    """A step on the GPU whose every number is of one sign, so that what is not there yet shows."""
    shape = (batch * 13, 16, 2, 64)
    return {
        "q": torch.rand(batch, 8, 64, device=DEVICE, dtype=torch.bfloat16),
        "k_cache": torch.rand(shape, device=DEVICE, dtype=torch.bfloat16),
        "v_cache": torch.rand(shape, device=DEVICE, dtype=torch.bfloat16),
        "block_table": torch.randperm(batch * 13, device=DEVICE).int().view(batch, 13),
        "cache_seqlens": torch.full((batch,), length, device=DEVICE, dtype=torch.int32),
    }


BACKENDS = [pytest.param("triton", marks=needs_triton), pytest.param("cuda", marks=needs_numba)]


@needs_gpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_graph_reads_what_is_there_when_it_is_replayed(backend: str) -> None:
    step = _step()
    call = {**step, "backend": backend, "num_splits": 3}
    paged_attention_decode(**call)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = paged_attention_decode(**call)
    step["cache_seqlens"].copy_(torch.tensor([1, 0, 77, 208], dtype=torch.int32))
    step["q"].normal_()
    graph.replay()
    torch.testing.assert_close(out, paged_attention_decode(**call), rtol=0, atol=0)


@needs_gpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_kernel_waits_for_what_came_before_it_on_its_stream(backend: str) -> None:
    step = _step()
    want = paged_attention_decode(**step, backend=backend)
    late = {**step, "k_cache": torch.zeros_like(step["k_cache"]), "v_cache": torch.zeros_like(step["v_cache"])}
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(100_000_000)  # cycles, some 50 ms
        for name in ("k_cache", "v_cache"):
            late[name].copy_(step[name])
        got = paged_attention_decode(**late, backend=backend)
        late["v_cache"].zero_()  # and what comes after waits for it
        assert torch.equal(got, want)


@needs_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_kernel_runs_where_its_tensors_are(backend: str) -> None:
    step = _step()
    there = {name: tensor.to("cuda:1") for name, tensor in step.items()}
    out = paged_attention_decode(**there, backend=backend)
    torch.testing.assert_close(out.to("cuda:0"), paged_attention_decode(**step, backend=backend))


@needs_gpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_batch_may_be_larger_than_a_grid_is_wide(backend: str) -> None:
    step = _step(1)
    many = {**step, "q": step["q"].expand(70_000, -1, -1).contiguous(), "block_table": step["block_table"].expand(70_000, -1)}
    many["cache_seqlens"] = torch.full((70_000,), 20, device=DEVICE, dtype=torch.int32)
    out = paged_attention_decode(**many, backend=backend)
    assert (out == out[0]).all()


@needs_gpu
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_end_of_a_pool_of_more_than_2_to_the_31_elements_is_read(backend: str) -> None:
    num_blocks = 2**31 // (16 * 2 * 64) + 99
    if torch.cuda.mem_get_info()[0] < 5 * num_blocks * 16 * 2 * 64:
        pytest.skip("too little memory for keys and values of 4 GiB each")
    step = _step()
    far = dict(step)
    for name in ("k_cache", "v_cache"):
        far[name] = torch.empty(num_blocks, 16, 2, 64, device=DEVICE, dtype=torch.bfloat16)
        far[name][-52:] = step[name]
    far["block_table"] = step["block_table"] + (num_blocks - 52)
    assert torch.equal(paged_attention_decode(**far, backend=backend), paged_attention_decode(**step, backend=backend))
