"""What the benchmark does on a GPU, with one that is not there: nothing that fails costs the figures of others."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the kernel benchmark compares with torch")

from fake_gpu import Gpu, fake_gpu  # noqa: E402  after the skip

from pagedkv.kernels import bench, bench_backends, bench_timing  # noqa: E402
from pagedkv.kernels.adapters import BatchDecodeWithPagedKVCacheWrapper  # noqa: E402
from pagedkv.kernels.bench_problem import LARGE, QUICK_SHAPES, Shape, tiny  # noqa: E402
from pagedkv.kernels.gpu_rates import measure_gpu  # noqa: E402
from pagedkv.kernels.linear_rates import measure_rows  # noqa: E402

SMALL = Shape(batch=3, context=40, num_q_heads=4, num_kv_heads=2, head_dim=64)
OTHER = Shape(batch=2, context=40, num_q_heads=4, num_kv_heads=2, head_dim=64, dtype="fp8", ragged=True)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    """A GPU whose kernels are torch's, on the CPU."""
    monkeypatch.setattr(bench_timing, "WAKING_S", 0.0)
    monkeypatch.setattr(bench, "QUICK_SHAPES", (SMALL,))
    for name in ("triton", "cuda"):
        monkeypatch.setitem(bench_backends.BACKENDS, name, bench_backends.sdpa)
    with fake_gpu(monkeypatch) as there:
        yield there


@pytest.fixture
def flashinfer(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """In place of FlashInfer, this project's wrapper of its names: the workspaces that it is given."""
    workspaces = []

    def wrapper(workspace: Any, kv_layout: str, **options: Any) -> Any:
        workspaces.append(workspace)
        return BatchDecodeWithPagedKVCacheWrapper(workspace, kv_layout, backend="reference", **options)

    monkeypatch.setitem(sys.modules, "flashinfer", SimpleNamespace(BatchDecodeWithPagedKVCacheWrapper=wrapper, __spec__=object()))
    return workspaces


def run(*, keep: Any = lambda _: None, clock: Any = lambda: 0.0, **options: Any) -> dict[str, Any]:
    return bench.run_bench(bench.BenchOptions(**{"shapes": (SMALL, OTHER), "repeats": 2, **options}), keep=keep, clock=clock)


def test_every_backend_that_is_there_is_measured(gpu: Gpu, flashinfer: list[Any]) -> None:
    result = run()
    rows = {(row["name"], row["backend"]): row for row in result["rows"]}
    assert len(rows) == 2 * len(bench_backends.BACKENDS)
    measured = {backend for (_, backend), row in rows.items() if row.get("correct")}
    paged = {"FlashInfer", "FlashInfer, tensor cores"}
    assert measured >= {"triton", "cuda", "torch gather + SDPA", "torch SDPA, not paged"} | paged
    assert rows[SMALL.name, "cpu"]["reason"] == "KernelError: the data is on the GPU"
    for row in rows.values():
        if "us" in row:
            assert 0 < row["us"] <= 1000 / bench_timing.CALLS  # of the calls that a millisecond went to
            assert row["share_of_copy"] > 0
    assert (result["device"], result["l2_bytes"], result["multiprocessors"]) == ("Fake GPU", 1 << 14, 4)
    assert result["software"]["torch"].startswith(torch.__version__.partition("+")[0])
    json.dumps(result, allow_nan=False)


def test_what_compiles_for_minutes_comes_last_and_shares_a_workspace(gpu: Gpu, flashinfer: list[Any]) -> None:
    backends = [row["backend"] for row in run(backends=("FlashInfer", "triton"))["rows"]]
    assert backends == ["triton", "triton", "FlashInfer", "FlashInfer"]
    assert len(flashinfer) > len({id(workspace) for workspace in flashinfer}) == 2


def test_a_quick_run_is_three_shapes_and_nothing_that_compiles_for_minutes(gpu: Gpu) -> None:
    assert len(QUICK_SHAPES) == 3
    result = run(quick=True, shapes=())
    assert {row["name"] for row in result["rows"]} == {SMALL.name}
    assert not {row["backend"] for row in result["rows"]} & set(bench_backends.COMPILES_FOR_MINUTES)


def test_what_was_measured_is_kept_when_the_process_is_ended(gpu: Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ended(problem: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setitem(bench_backends.BACKENDS, "cuda", ended)
    file = tmp_path / "result.json"
    with pytest.raises(KeyboardInterrupt):
        bench.bench_kernels(bench.BenchOptions(shapes=(SMALL,), repeats=1, backends=("triton", "cuda")), file)
    assert [row["backend"] for row in json.loads(file.read_text())["rows"]] == ["triton"]
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_nothing_begins_after_the_time_limit(gpu: Gpu) -> None:
    now = iter(range(0, 10_000, 10))
    result = run(time_limit_s=45, backends=("triton", "cuda"), clock=lambda: next(now))
    assert [row["backend"] for row in result["rows"]] == ["triton", "cuda"]
    assert result["ended_early"] == "the time limit of 45 s is over; what is not here was not measured"
    assert "ENDED EARLY: the time limit of 45 s" in bench.render(result)
    assert run(backends=("triton",), time_limit_s=45)["ended_early"] is None


def test_a_gpu_that_a_kernel_has_lost_ends_the_run_with_what_is_known(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    def astray(problem: Any) -> Any:
        gpu.lost = True
        gpu.synchronize()

    monkeypatch.setitem(bench_backends.BACKENDS, "cuda", astray)
    result = run(backends=("triton", "cuda", "torch gather + SDPA"))
    assert [(row["backend"], "us" in row) for row in result["rows"]] == [("triton", True), ("cuda", False)]
    assert result["rows"][1]["failed"] == "RuntimeError: CUDA error: an illegal memory access was encountered"
    assert result["ended_early"].startswith(f"the GPU takes no more work from this process after cuda on {SMALL.name}")


def test_a_shape_without_room_costs_no_other(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    make = bench.Problem

    def making(shape: Shape, *arguments: Any, **options: Any) -> Any:
        if shape is SMALL:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return make(shape, *arguments, **options)

    monkeypatch.setattr(bench, "Problem", making)
    first, second = run(backends=("triton",))["rows"]
    assert first["reason"] == "OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB"
    assert second["correct"]


def test_too_little_memory_for_an_own_backend_is_no_bug(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    def large(problem: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setitem(bench_backends.BACKENDS, "triton", large)
    assert not bench.found_wrong(run(backends=("triton",))["rows"])


def test_a_capture_that_fails_leaves_no_other_stream_behind(gpu: Gpu) -> None:
    """Events on a stream where nothing runs would give times of nothing."""
    gpu.forbids_graphs = True
    result = run(backends=("triton",))
    assert gpu.stream == "main"
    assert all("previous error during capture" in row["no_graph"] for row in result["rows"])
    assert all(row["correct"] for row in result["rows"])


@pytest.mark.parametrize("when", ["always", "later"])
def test_results_that_are_not_numbers_or_go_wrong_later_are_wrong(gpu: Gpu, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    def spoiled(problem: Any) -> Any:
        right, calls = bench_backends.sdpa(problem), []

        def call(copy: int) -> Any:
            calls.append(copy)
            wrong = when == "always" or len(calls) > 3
            return right(copy) * (torch.nan if wrong else 1.0)

        return call

    monkeypatch.setitem(bench_backends.BACKENDS, "triton", spoiled)
    result = run(backends=("triton",))
    assert [(row["error"], row["correct"]) for row in result["rows"]] == [(None, False)] * 2
    assert "WRONG: error not finite" in bench.render(result)
    json.dumps(result, allow_nan=False)


def test_rates_of_a_gpu_are_measured(gpu: Gpu) -> None:
    found = measure_gpu(num_bytes=1 << 16, size=32, shape=SMALL, rounds=2)
    assert (found.device, found.memory_bytes) == ("Fake GPU", 1 << 30)
    assert [len(samples.values) for samples in (found.read, found.copy, found.kv_read, found.product)] == [2] * 4
    rows = measure_rows("cuda", "bf16", rows=(1, 2, 40), num_bytes=1 << 14, size=32, rounds=2)
    assert [len(samples.values) for samples in rows.flops] == [2] * 3
    assert gpu.stream == "main"


def test_the_faster_way_to_copy_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([(4e-6, None), (2e-6, None), (1e-6, None)])
    monkeypatch.setattr(bench_timing, "time_s", lambda *_, **__: next(times))
    found = bench_timing.measure_bandwidth(torch.device("cpu"), num_bytes=1 << 10, repeats=1)
    assert found == {"copy_bytes_per_s": 1024 / 2e-6, "read_bytes_per_s": 512 / 1e-6}


def test_a_head_that_flashinfer_compiles_in_vain_is_refused_at_once(gpu: Gpu, flashinfer: list[Any]) -> None:
    row = run(shapes=(tiny(LARGE),), backends=("FlashInfer",))["rows"][0]
    assert row["reason"] == "KernelError: compiles no heads of 16"
    assert not flashinfer
