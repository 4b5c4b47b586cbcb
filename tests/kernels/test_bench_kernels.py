"""The benchmark runs as a whole without a GPU, and says what is wrong, slow or absent."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the kernel benchmark compares with torch")

from pagedkv.kernels import bench, bench_backends, bench_timing  # noqa: E402  after the skip
from pagedkv.kernels.bench_problem import LARGE, Problem, tiny  # noqa: E402
from pagedkv.kernels.contract import KernelError  # noqa: E402

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A dry run on the CPU, with the GPU kernels in their interpreter and simulator."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "NUMBA_ENABLE_CUDASIM": "1", "CUDA_VISIBLE_DEVICES": ""}
    file = tmp_path_factory.mktemp("bench") / "result.json"
    command = [sys.executable, "-m", "pagedkv.kernels.bench", "--dry-run", "--json", str(file)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    assert done.stdout == bench.render(result) + "\n"
    return result


def test_every_backend_that_can_run_here_is_correct_on_every_shape(dry: dict[str, Any]) -> None:
    runs = {"triton", "cuda", "cpu", "torch gather + SDPA", "torch SDPA, not paged"}
    assert {row["backend"] for row in dry["rows"]} == set(bench_backends.BACKENDS)
    for row in dry["rows"]:
        reads_fp8 = row["backend"] not in ("cuda", "cpu")
        if row["backend"] in runs and (row["shape"]["dtype"] != "fp8" or reads_fp8):
            assert row.get("correct"), row
            assert row["us"] > 0
        else:
            assert row["reason"].startswith("KernelError: "), row


def test_a_dry_run_gives_no_shares(dry: dict[str, Any]) -> None:
    assert dry["dry_run"]
    assert not any(key.startswith("share") for row in dry["rows"] for key in row)
    assert "times mean nothing" in bench.render(dry)


def test_wins_and_losses_are_both_told(dry: dict[str, Any]) -> None:
    assert {c["result"] for c in dry["comparisons"]} == {"win", "loss", "no figure"}
    assert {c["ours"] for c in dry["comparisons"]} == {"cpu"}
    for c in dry["comparisons"]:
        assert (c["result"] == "no figure") == (" fp8 " in c["name"])  # which the CPU kernel does not read
        if c["ratio"] is None:
            assert f"against {c['against']}: no figure" in bench.render(dry)
            continue
        times = {row["backend"]: row["us"] for row in dry["rows"] if row["name"] == c["name"] and "us" in row}
        assert c["ratio"] == pytest.approx(times[c["against"]] / times[c["ours"]])
        assert (c["ratio"] > 1) == (c["result"] == "win")


def test_copies_never_share_or_repeat_a_block_and_outgrow_the_cache() -> None:
    problem = Problem(tiny(LARGE), CPU, cache_bytes=100_000, seed=3)
    used = problem.block_tables[problem.block_tables >= 0]
    assert len(used.unique()) == len(used) == len(problem.k_cache)
    assert problem.copies * problem.kv_bytes >= 100_000
    assert (used.diff() != 1).any()  # shuffled


def test_the_floor_is_keys_values_queries_and_output() -> None:
    shape = tiny(LARGE)
    problem = Problem(shape, CPU, cache_bytes=0, seed=0)
    assert problem.kv_bytes == 2 * 24 * 2 * 2 * 16 * 2  # rows, tokens, K and V, heads, head_dim, bytes
    assert problem.floor_bytes == problem.kv_bytes + 2 * 2 * 4 * 16 * 2


def broken(problem: Problem) -> Any:
    raise RuntimeError("no kernel image")


def test_a_crash_of_an_own_backend_is_told_apart_from_a_refusal_and_costs_no_other_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(problem: Problem) -> Any:
        raise KernelError("not today")

    options = bench.BenchOptions(device="cpu", dry_run=True, shapes=(LARGE,), backends=("cpu", "torch gather + SDPA"))
    monkeypatch.setitem(bench_backends.BACKENDS, "cpu", refusing)
    result = bench.run_bench(options)
    assert [row.get("reason") for row in result["rows"]] == ["KernelError: not today", None]
    assert [(c["ratio"], c["result"]) for c in result["comparisons"]] == [(None, "no figure")]
    assert "cpu against torch gather + SDPA: no figure" in bench.render(result)
    assert not bench.found_wrong(result["rows"])
    monkeypatch.setitem(bench_backends.BACKENDS, "cpu", broken)
    crashed, measured = bench.run_bench(options)["rows"]
    assert crashed["failed"] == "RuntimeError: no kernel image"
    assert measured["correct"]
    assert bench.found_wrong([crashed, measured])
    assert not bench.found_wrong([measured])
    assert "cpu                        FAILED: RuntimeError: no kernel image" in bench.render(bench.run_bench(options))
    monkeypatch.setattr(bench, "BenchOptions", lambda **_: options)
    with pytest.raises(SystemExit) as ended:
        bench.main([])
    assert ended.value.code == 1


def test_a_launch_without_a_graph_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "time_s", lambda *_, **__: (30e-6, "RuntimeError: not permitted"))
    monkeypatch.setattr(bench, "measure_bandwidth", lambda *_, **__: {"copy_bytes_per_s": 1e9, "read_bytes_per_s": 1e9})
    monkeypatch.setattr(bench, "cache_bytes", lambda _: 1 << 16)
    result = bench.run_bench(bench.BenchOptions(device="cpu", shapes=(tiny(LARGE),), backends=("cpu",)))
    assert "launched one by one, no graph: RuntimeError: not permitted" in bench.render(result)


def test_a_failed_capture_is_told_and_the_calls_are_timed_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(_: Any) -> Any:
        raise RuntimeError("stream is capturing\nand more")

    for name in ("CUDAGraph", "synchronize", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda _: None)
    monkeypatch.setattr(torch.cuda, "graph", refuses)
    assert bench_timing.captured(lambda _: None, [0]) == (None, "RuntimeError: stream is capturing")


def test_a_wrong_backend_is_called_wrong_and_takes_no_part_in_comparisons(monkeypatch: pytest.MonkeyPatch) -> None:
    def off_by_a_little(problem: Problem) -> Any:
        right = bench_backends.cpu(problem)
        return lambda copy: right(copy) * 1.03

    monkeypatch.setitem(bench_backends.BACKENDS, "triton", off_by_a_little)
    monkeypatch.setitem(bench_backends.BACKENDS, "FlashInfer", broken)
    names = ("triton", "FlashInfer", "cpu", "torch gather + SDPA")
    result = bench.run_bench(bench.BenchOptions(device="cpu", dry_run=True, shapes=(LARGE,), backends=names))
    rows = {row["backend"]: row for row in result["rows"]}
    assert not rows["triton"]["correct"]
    assert rows["triton"]["error"] == pytest.approx(0.03, rel=0.2)
    assert rows["FlashInfer"]["reason"] == "RuntimeError: no kernel image"
    assert [(c["ours"], c["against"]) for c in result["comparisons"]] == [("cpu", "torch gather + SDPA")]
    assert "WRONG" in bench.render(result)
    assert "no kernel image" in bench.render(result)


def test_shares_follow_from_bytes_time_and_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "time_s", lambda *_, **__: (30e-6, None))
    monkeypatch.setattr(bench_timing, "time_s", lambda *_, **__: (30e-6, None))
    monkeypatch.setattr(bench, "cache_bytes", lambda _: 1 << 16)
    options = bench.BenchOptions(device="cpu", shapes=(tiny(LARGE),), backends=("cpu",))
    row = bench.run_bench(options)["rows"][0]
    bandwidth = 4 * (1 << 16) / 30e-6
    assert row["share_of_copy"] == pytest.approx(row["floor_bytes"] / 30e-6 / bandwidth)
    monkeypatch.setattr(bench, "time_s", lambda *_, **__: (19e-6, None))
    assert "share_of_copy" not in bench.run_bench(options)["rows"][0]


def test_bandwidth_is_plausible() -> None:
    found = bench_timing.measure_bandwidth(CPU, num_bytes=64 << 20, repeats=3)
    assert all(1e8 < value < 1e13 and math.isfinite(value) for value in found.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backends": ("tritn",)}, "unknown backend 'tritn': needs triton"),
        ({"device": "cuda"}, "torch finds no GPU; 'cpu' works"),
        ({"time_limit_s": 0}, "the time limit is 0 s"),
    ],
)
def test_what_cannot_be_measured(options: dict[str, Any], message: str) -> None:
    if "device" in options and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(KernelError, match=message):
        bench.run_bench(bench.BenchOptions(**options))
