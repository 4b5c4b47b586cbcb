"""The kernel benchmark: how close to the memory's bandwidth decoding comes, and who is faster.

`python -m pagedkv.kernels.bench [--dry-run] [--json FILE]` measures on the GPU, or on the CPU where there is none. It needs torch.
Bandwidth is measured first, in the same run; every backend is checked against float64 before it is timed; wins and losses are both
in the result. Times under 20 µs are reported as they are, without a share: they are overhead.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from pagedkv.kernels.contract import KernelError

try:
    import torch
except ImportError as absent:
    raise KernelError("the kernel benchmark measures with torch, which is not installed: pip install torch") from absent

from pagedkv.kernels.bench_backends import BACKENDS, OURS
from pagedkv.kernels.bench_problem import CPU_SHAPES, GPU_SHAPES, LARGE, TOLERANCE, Problem, Shape, tiny

SHARE_FROM_S = 20e-6
"""Shorter times are given without a share of the bandwidth."""

OWN = ("triton", "cuda", "cpu")
"""Backends of this project."""

CALLS = 8
"""Of a sample, at least: it is as many passes over all copies as this takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """What to measure."""

    device: str = "auto"
    """"cuda", "cpu", or "auto" for a GPU if there is one."""
    shapes: tuple[Shape, ...] = ()
    """None: those of the project's goals for the device."""
    backends: tuple[str, ...] = tuple(BACKENDS)
    """Names from BACKENDS."""
    repeats: int = 15
    """Samples; the median counts."""
    dry_run: bool = False
    """Run everything on tiny shapes: times mean nothing then, and no share is given."""
    seed: int = 0


def run_bench(options: BenchOptions) -> dict[str, Any]:
    """Measure and return what `json.dumps` takes: the machine, its bandwidth, a row per shape and backend, and comparisons.

    Raises:
        KernelError: For a backend that is not known, or a GPU that is not there.
    """
    unknown = sorted(set(options.backends) - set(BACKENDS))
    if unknown:
        raise KernelError(f"unknown backend {unknown[0]!r}: needs {', '.join(BACKENDS)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise KernelError("device is 'cuda': torch finds no GPU; 'cpu' works")
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device
    device = torch.device(kind)
    shapes = options.shapes or (GPU_SHAPES if kind == "cuda" or options.dry_run else CPU_SHAPES)
    if options.dry_run:
        options, shapes = replace(options, repeats=1), tuple(dict.fromkeys(tiny(shape) for shape in shapes))
    cache_bytes = _cache_bytes(device)
    bandwidth = measure_bandwidth(device, num_bytes=1 << 16 if options.dry_run else 4 * cache_bytes, repeats=options.repeats)
    rows = []
    for number, shape in enumerate(shapes):
        problem = Problem(shape, device, cache_bytes=0 if options.dry_run else cache_bytes, seed=options.seed + number)
        rows += [_measure(problem, backend, options, bandwidth) for backend in options.backends]
    return {
        "device": torch.cuda.get_device_name(device) if kind == "cuda" else platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "dry_run": options.dry_run,
        "seed": options.seed,
        **bandwidth,
        "rows": rows,
        "comparisons": [*_against_others(rows, OURS[kind]), *([] if options.dry_run else _among_shapes(rows))],
    }


def _cache_bytes(device: torch.device) -> int:
    """Return twice the size of the GPU's L2 cache; 256 MiB on the CPU, where torch does not know it."""
    return 2 * int(torch.cuda.get_device_properties(device).L2_cache_size) if device.type == "cuda" else 256 << 20


def measure_bandwidth(device: torch.device, *, num_bytes: int, repeats: int) -> dict[str, float]:
    """Return what torch moves: "copy_bytes_per_s" (read and written) and "read_bytes_per_s" (summed), of `num_bytes` at a time."""
    source, target = (torch.randn(num_bytes // 4, device=device) for _ in range(2))
    parts = source.view(2, -1), target.view(2, -1)
    copy_s, _ = time_s(lambda i: parts[1][i].copy_(parts[0][i]), 2, device, repeats=repeats)
    read_s, _ = time_s(lambda i: parts[0][i].sum(), 2, device, repeats=repeats)
    return {"copy_bytes_per_s": num_bytes / copy_s, "read_bytes_per_s": num_bytes / 2 / read_s}


def time_s(run: Callable[[int], Any], copies: int, device: torch.device, *, repeats: int) -> tuple[float, str | None]:
    """Return (median seconds of a call, why no CUDA graph launched it). Calls walk over all copies, once untimed.

    The reason is None on the CPU, where there are no graphs.
    """
    order = list(range(copies)) * (-(-CALLS // copies) if repeats > 1 else 1)
    for copy in range(copies):
        run(copy)
    if device.type != "cuda":
        samples = []
        for _ in range(repeats):
            start = time.perf_counter()
            for copy in order:
                run(copy)
            samples.append((time.perf_counter() - start) / len(order))
        return statistics.median(samples), None
    torch.cuda.synchronize()
    graph, no_graph = _captured(run, order)
    samples, event = [], partial(torch.cuda.Event, enable_timing=True)
    for _ in range(repeats):
        start_event, end_event = event(), event()
        start_event.record()
        if graph is None:
            for copy in order:
                run(copy)
        else:
            graph.replay()
        end_event.record()
        torch.cuda.synchronize()
        samples.append(start_event.elapsed_time(end_event) / 1e3 / len(order))
    return statistics.median(samples), no_graph


def _captured(run: Callable[[int], Any], order: list[int]) -> tuple[Any, str | None]:
    """Return (the calls as a CUDA graph, which launches without Python between, None), or (None, why they cannot be captured)."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for copy in order:
                run(copy)
        graph.replay()
        torch.cuda.synchronize()
    except Exception as failure:  # whatever a kernel does that a graph forbids: it is launched one by one then, and this is told
        torch.cuda.synchronize()
        return None, _told(failure)
    return graph, None


def _told(failure: Exception) -> str:
    return f"{type(failure).__name__}: {next(iter(str(failure).strip().splitlines()), '')}"


def _measure(problem: Problem, backend: str, options: BenchOptions, bandwidth: dict[str, float]) -> dict[str, Any]:
    """Return the row of one backend: its error and time, or the reason why there is none.

    Only a KernelError, a refusal, is such a reason for this project's backends: whatever else they raise is a bug, and is raised.
    """
    shape = problem.shape
    row: dict[str, Any] = {"shape": asdict(shape), "name": shape.name, "backend": backend, "floor_bytes": problem.floor_bytes}
    try:
        run = BACKENDS[backend](problem)
        row["error"] = problem.error(run(0))
        row["correct"] = row["error"] <= TOLERANCE[problem.q_dtype]
        seconds, no_graph = time_s(run, problem.copies, problem.device, repeats=options.repeats)
        row |= {} if no_graph is None else {"no_graph": no_graph}
        row |= {"us": seconds * 1e6, "tokens_per_s": shape.batch / seconds}
        if seconds >= SHARE_FROM_S and not options.dry_run:
            row["share_of_copy"] = problem.floor_bytes / seconds / bandwidth["copy_bytes_per_s"]
            row["share_of_read"] = problem.floor_bytes / seconds / bandwidth["read_bytes_per_s"]
    except Exception as failure:  # a foreign backend may fail in its own way: say how and go on
        if backend in OWN and not isinstance(failure, KernelError):
            raise
        row["reason"] = _told(failure)
    return row


def _timed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in rows if row.get("correct") and "us" in row]


def _against_others(rows: list[dict[str, Any]], ours: str) -> list[dict[str, Any]]:
    """Compare, by shape, the backend `ours` with every other: a ratio above 1 is a win; "no figure" if ours has no right one."""
    found = []
    for name in dict.fromkeys(row["name"] for row in rows if row["backend"] == ours):
        timed = {row["backend"]: row["us"] for row in _timed(rows) if row["name"] == name}
        mine = timed.pop(ours, None)
        for backend, us in timed.items():
            ratio = None if mine is None else us / mine
            verdict = "no figure" if ratio is None else "win" if ratio > 1 else "loss"
            found.append({"name": name, "ours": ours, "against": backend, "ratio": ratio, "result": verdict})
    return found


def _among_shapes(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compare the large shape's variants with it, by backend: fp8 in tokens per second, the others in shares."""
    found = []
    for row in _timed(rows):
        variants = {"dtype": "tokens_per_s", "ragged": "share_of_copy", "block_size": "share_of_copy"}
        for field, measure in variants.items():
            plain = replace(Shape(**row["shape"]), **{field: getattr(LARGE, field)})
            bases = [base for base in _timed(rows) if base["shape"] == asdict(plain) and base["backend"] == row["backend"]]
            if row["shape"][field] != getattr(LARGE, field) and bases and measure in row and measure in bases[0]:
                ratio = row[measure] / bases[0][measure]
                found.append(
                    {"name": row["name"], "ours": row["backend"], "against": bases[0]["name"], "ratio": ratio, "result": measure}
                )
    return found


def render(result: dict[str, Any]) -> str:
    """Return the result as text: bandwidth, a table by shape, comparisons."""
    copy, read = (result[key] / 1e9 for key in ("copy_bytes_per_s", "read_bytes_per_s"))
    lines = [f"{result['device']}, torch {result['torch']}: copy {copy:.1f} GB/s, read {read:.1f} GB/s"]
    if result["dry_run"]:
        lines[0] += "; dry run, times mean nothing"
    for name in dict.fromkeys(row["name"] for row in result["rows"]):
        lines += ["", name]
        for row in result["rows"]:
            if row["name"] != name:
                continue
            if "us" not in row:
                lines.append(f"  {row['backend']:26} {row.get('reason', '')}")
                continue
            share = f"{row['share_of_copy']:6.1%} of copy" if "share_of_copy" in row else ""
            wrong = "" if row["correct"] else f"  WRONG: error {row['error']:.1e}"
            singly = f"  launched one by one, no graph: {row['no_graph']}" if "no_graph" in row else ""
            lines.append(f"  {row['backend']:26} {row['us']:10.1f} µs  {share}{wrong}{singly}")
    lines += ["", "Comparisons (above 1: ours is faster)"]
    for c in result["comparisons"]:
        verdict = c["result"] if c["ratio"] is None else f"{c['ratio']:.2f} ({c['result']})"
        lines.append(f"  {c['name']}: {c['ours']} against {c['against']}: {verdict}")
    return "\n".join(lines)


def bench_kernels(*, dry_run: bool = False, json_file: Path | str | None = None) -> str:
    """Run the benchmark and return its report; write the whole result to `json_file` if given.

    Args:
        dry_run: Run everything on tiny shapes; times mean nothing then.
        json_file: Where the result of `run_bench` goes.
    """
    result = run_bench(BenchOptions(dry_run=dry_run))
    if json_file is not None:
        Path(json_file).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return render(result)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m pagedkv.kernels.bench", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, to see that everything runs; times mean nothing")
    parser.add_argument("--json", metavar="FILE", help="write the whole result there")
    given = parser.parse_args(arguments)
    sys.stdout.write(bench_kernels(dry_run=given.dry_run, json_file=given.json) + "\n")


if __name__ == "__main__":
    main()
