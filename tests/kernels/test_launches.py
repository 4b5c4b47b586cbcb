"""What reaches a GPU's launcher, without a GPU: the versions of a kernel that are compiled, grids, that the host waits for nothing.

Tensors that have no data ("meta") stand for those on a GPU: whatever would fetch a value from one fails.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the Triton kernels need torch")
triton = pytest.importorskip("triton", reason="the Triton kernels need triton")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402  after the skips
from triton.runtime.jit import JITFunction  # noqa: E402

from pagedkv.kernels import cache_ops, dispatch  # noqa: E402
from pagedkv.kernels.adapters import BatchDecodeWithPagedKVCacheWrapper, flash_attn_with_kvcache  # noqa: E402
from pagedkv.kernels.contract import KernelError  # noqa: E402
from pagedkv.kernels.merge import cascade_attention  # noqa: E402
from pagedkv.kernels.triton_cache import write_slots  # noqa: E402
from pagedkv.kernels.triton_decode import decode  # noqa: E402
from pagedkv.kernels.triton_prefill import prefill  # noqa: E402


@pytest.fixture(params=[90, 121])
def launches(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, Any, Any]]]:
    """What is launched: (kernel, the version that would be compiled, grid). Nothing is compiled, and nothing runs."""
    found: list[tuple[str, Any, Any]] = []
    versions: dict[str, list[str]] = {}

    def compiling(*, key: str, fn: Any, **_: Any) -> bool:
        versions.setdefault(fn.name, []).append(key)
        return True  # do not

    run = JITFunction.run

    def running(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        run(self, *arguments, grid=grid, warmup=warmup, **options)
        name = self.fn.__name__
        found.append((name, next(key for full, keys in versions.items() if full.endswith(name) for key in reversed(keys)), grid))

    target = GPUTarget("cuda", request.param, 32)
    device = SimpleNamespace(get_current_target=lambda: target, get_current_device=object, get_current_stream=lambda _: 0)
    active = triton.runtime.driver._active
    triton.runtime.driver.set_active(device)
    monkeypatch.setattr(triton.knobs.runtime, "jit_cache_hook", compiling)
    monkeypatch.setattr(JITFunction, "run", running)
    yield found
    triton.runtime.driver._active = active


def step(batch: int, width: int, *, heads: int = 32, kv_heads: int = 8, head_dim: int = 128) -> dict[str, Any]:
    """A decode step over tables of `width` blocks, in bf16."""
    pool = torch.empty(2, 2, 16, kv_heads, head_dim, dtype=torch.bfloat16)
    return {
        "q": torch.empty(batch, heads, head_dim, dtype=torch.bfloat16),
        "k_cache": pool[:, 0],
        "v_cache": pool[:, 1],
        "block_table": torch.zeros(batch, width, dtype=torch.int32),
        "cache_seqlens": torch.zeros(batch, dtype=torch.int32),
    }


def test_what_changes_from_step_to_step_compiles_no_new_version(launches: list[tuple[str, Any, Any]]) -> None:
    for batch, width in ((1, 1), (1, 16), (1, 37), (2, 300), (3, 1000), (16, 48), (64, 9)):
        for window in (-1, 0, 1, 16, 99):
            for num_splits in (0, 1, 2, 16, 33):
                decode(**step(batch, width), window_size=(window, -1), num_splits=num_splits)
    by_kernel = {name: {key for kernel, key, _ in launches if kernel == name} for name in ("decode_kernel", "merge_kernel")}
    assert len(by_kernel["decode_kernel"]) == 2  # into the output, or into partial results
    assert len(by_kernel["merge_kernel"]) == 1


def test_chunks_of_all_kinds_are_one_version(launches: list[tuple[str, Any, Any]]) -> None:
    for batch, width in ((1, 1), (1, 16), (2, 37), (16, 48), (33, 300)):
        for window in (-1, 0, 1, 16, 99):
            arrays = step(batch, width)
            arrays["q"] = torch.empty(batch * 5, 32, 128, dtype=torch.bfloat16)
            starts = torch.arange(batch + 1, dtype=torch.int32) * 5
            for causal in (True, False):
                prefill(**arrays, cu_seqlens_q=starts, window_size=(window, window), causal=causal)
    assert len({key for _, key, _ in launches}) == 1


def test_grids_fit_a_gpu_however_large_the_batch(launches: list[tuple[str, Any, Any]]) -> None:
    decode(**step(70_000, 1, heads=2, kv_heads=1, head_dim=16), num_splits=100_000)
    arrays = step(70_000, 1, heads=2, kv_heads=1, head_dim=16)
    prefill(**arrays, cu_seqlens_q=torch.arange(70_001, dtype=torch.int32))
    assert {name for name, _, _ in launches} == {"decode_kernel", "merge_kernel", "prefill_kernel"}
    for _, _, grid in launches:
        assert grid[0] < 2**31
        assert all(size <= 65_535 for size in grid[1:])  # CUDA C++ Programming Guide, technical specifications


class OnTheGpu(TorchDispatchMode):
    """Fails where an operation takes a tensor from the host: such a copy waits, and no CUDA graph can hold it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for array in args:
            assert not isinstance(array, torch.Tensor) or array.device.type == "meta", f"{func} takes a tensor from the host"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def gpu(launches: list[tuple[str, Any, Any]], monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, Any, Any]]]:
    """As if a GPU were there: what is launched on it."""
    for module in (dispatch, cache_ops):
        monkeypatch.setattr(module, "why_not", lambda _: None)
    with torch.device("meta"), OnTheGpu():
        yield launches


def test_a_decode_step_waits_for_nothing(gpu: list[tuple[str, Any, Any]]) -> None:
    dispatch.paged_attention(**step(4, 9), return_lse=True, sinks=torch.empty(32), window_size=(2**40, -1), num_splits=2)
    assert [name for name, _, _ in gpu] == ["decode_kernel", "merge_kernel"]


def test_a_kernel_is_launched_on_the_gpu_of_its_queries(gpu: list[tuple[str, Any, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    at: list[tuple[Any, int]] = []

    @contextmanager
    def device_of(array: Any) -> Iterator[None]:
        before = len(gpu)
        yield
        at.append((array, len(gpu) - before))

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    arrays = step(4, 9)
    dispatch.paged_attention(**arrays, num_splits=2)
    assert [(array is arrays["q"], launched) for array, launched in at] == [(True, 2)]
    new = torch.empty(3, 8, 128, dtype=torch.bfloat16)
    cache_ops.reshape_and_cache(new, new, arrays["k_cache"], arrays["v_cache"], torch.empty(3, dtype=torch.int64))
    assert at[1][1] == 1


def test_what_lies_elsewhere_is_refused(gpu: list[tuple[str, Any, Any]]) -> None:
    for name in ("block_table", "cache_seqlens", "k_cache"):
        arrays = step(4, 9)
        arrays[name] = torch.zeros(arrays[name].shape, dtype=arrays[name].dtype, device="cpu")
        with pytest.raises(KernelError, match=f"{name} is on cpu, q is on meta"):
            dispatch.paged_attention(**arrays)
    assert not gpu


def test_a_window_wider_than_32_bits_is_no_new_version(gpu: list[tuple[str, Any, Any]]) -> None:
    for left in (5, 2**31 - 1, 2**40):
        dispatch.paged_attention(**step(4, 9), window_size=(left, -1))
    assert len({key for _, key, _ in gpu}) == 1


@pytest.mark.parametrize("seqlen_q", [1, 5])
def test_flash_attention_waits_for_nothing(gpu: list[tuple[str, Any, Any]], seqlen_q: int) -> None:
    arrays = step(4, 9)
    new = torch.empty(4, seqlen_q, 8, 128, dtype=torch.bfloat16)
    q = torch.empty(4, seqlen_q, 32, 128, dtype=torch.bfloat16)
    cache = arrays["k_cache"], arrays["v_cache"]
    tables = {"block_table": arrays["block_table"], "cache_seqlens": arrays["cache_seqlens"]}
    flash_attn_with_kvcache(q, *cache, new, new, **tables, causal=True, return_softmax_lse=True)
    names = [name for name, _, _ in gpu]
    assert names[0] == "write_kernel"
    assert names[1] == ("decode_kernel" if seqlen_q == 1 else "prefill_kernel")


def test_a_full_cache_and_one_of_one_length_wait_for_nothing(gpu: list[tuple[str, Any, Any]]) -> None:
    cache = torch.empty(2, 4, 256, 8, 128, dtype=torch.bfloat16)
    for cache_seqlens in (None, 9):
        flash_attn_with_kvcache(torch.empty(4, 1, 32, 128, dtype=torch.bfloat16), *cache, cache_seqlens=cache_seqlens)
    assert {name for name, _, _ in gpu} == {"decode_kernel"}


@pytest.mark.parametrize("chunks", [False, True])
def test_a_cascade_waits_for_nothing(gpu: list[tuple[str, Any, Any]], chunks: bool) -> None:
    starts = {"cu_seqlens_q": torch.empty(5, dtype=torch.int32)} if chunks else {}
    cascade_attention(**step(4, 9), **starts, num_shared_tokens=48)
    assert gpu[0][0] == "prefill_kernel"


def test_runs_after_the_first_of_a_plan_wait_for_nothing(
    launches: list[tuple[str, Any, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "why_not", lambda _: None)
    wrapper = BatchDecodeWithPagedKVCacheWrapper()
    wrapper.plan([0, 1, 3], [0, 1, 1], [5, 16], 32, 8, 128, 16)
    with torch.device("meta"):
        arrays = step(2, 2)
        cache = arrays["k_cache"], arrays["v_cache"]
        wrapper.run(arrays["q"], cache)
        with OnTheGpu():
            wrapper.run(arrays["q"], cache, return_lse=True)
    assert len(launches) >= 2


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
def test_a_storage_writes_and_reads_without_waiting(gpu: list[tuple[str, Any, Any]], dtype: str, kv_layout: str) -> None:
    from pagedkv.kv_spec import LayerGroup  # noqa: PLC0415
    from pagedkv.runtime import PagedKVStorage, plan_storage  # noqa: PLC0415

    layer = LayerGroup(kind="full", num_layers=1, num_kv_heads=8, key_dim=128, value_dim=128)
    storage = PagedKVStorage(plan_storage([layer]), num_blocks=9, dtype=dtype, device="meta", kv_layout=kv_layout)
    arrays = step(3, 2)
    new = torch.empty(3, 8, 128, dtype=torch.bfloat16)
    storage.write(0, new, new, torch.empty(3, dtype=torch.int64))
    storage.attend(0, arrays["q"], arrays["block_table"], arrays["cache_seqlens"])
    assert [name for name, _, _ in gpu][:2] == ["write_kernel", "decode_kernel"]


def test_writes_of_any_number_of_tokens_are_one_version(launches: list[tuple[str, Any, Any]]) -> None:
    cache = torch.empty(4, 16, 8, 128, dtype=torch.bfloat16)
    for tokens in (1, 2, 16, 33):
        new = torch.empty(tokens, 8, 128, dtype=torch.bfloat16)
        write_slots(new, new, cache, cache, torch.empty(tokens, dtype=torch.int64))
    assert len({key for _, key, _ in launches}) == 1
