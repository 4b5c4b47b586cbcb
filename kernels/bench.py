"""The kernel benchmark: how close to the memory's bandwidth decoding comes, and who is faster.

`python -m pagedkv.kernels.bench [--quick] [--time-limit-s S] [--dry-run] [--json FILE]` measures on the GPU, or on the CPU where
there is none. It needs torch. Bandwidth is measured first, in the same run; every backend is checked against float64 before and
after it is timed; wins and losses are both in the result. Times under 20 µs are reported as they are, without a share: they are
overhead.

A backend that fails costs its own figures only, and the file holds what is known from the first row on.
"""

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pagedkv.kernels.contract import KernelError

try:
    import torch
except ImportError as absent:
    raise KernelError("the kernel benchmark measures with torch, which is not installed: pip install torch") from absent

from pagedkv.kernels.bench_backends import BACKENDS, COMPILES_FOR_MINUTES, OURS
from pagedkv.kernels.bench_problem import CPU_SHAPES, GPU_SHAPES, QUICK_SHAPES, TOLERANCE, Problem, Shape, tiny
from pagedkv.kernels.bench_report import against_others, among_shapes, found_wrong, render
from pagedkv.kernels.bench_timing import cache_bytes, measure_bandwidth, time_s, told, wake

SHARE_FROM_S = 20e-6
"""Shorter times are given without a share of the bandwidth."""

OWN = ("triton", "cuda", "cpu")
"""Backends of this project."""

QUICK_REPEATS = 5
"""Samples of a quick run."""

SOFTWARE = ("torch", "triton", "numba", "numba-cuda", "flashinfer-python")
"""Packages whose versions are in the result."""


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
    quick: bool = False
    """A first look: three shapes, few samples, and nothing that compiles for minutes."""
    time_limit_s: float | None = None
    """Begin no further row after so many seconds; None: measure all."""
    seed: int = 0


class EndedEarlyError(Exception):
    """Nothing more can be measured, or may be: says why."""


def run_bench(
    options: BenchOptions,
    *,
    keep: Callable[[dict[str, Any]], object] = lambda _: None,
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, Any]:
    """Measure and return what `json.dumps` takes: the machine, its bandwidth, a row per shape and backend, and comparisons.

    Args:
        options: What to measure.
        keep: Is given the result so far after each row: what it makes of that is left if this process is ended.
        clock: What the time limit is measured by, in seconds.

    Raises:
        KernelError: For a backend that is not known, a GPU that is not there, or a time limit that is none.
    """
    started = clock()
    unknown = sorted(set(options.backends) - set(BACKENDS))
    if unknown:
        raise KernelError(f"unknown backend {unknown[0]!r}: needs {', '.join(BACKENDS)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise KernelError("device is 'cuda': torch finds no GPU; 'cpu' works")
    limit_s = math.inf if options.time_limit_s is None else options.time_limit_s
    if not limit_s > 0:
        raise KernelError(f"the time limit is {limit_s} s: needs more than 0, or leave it out")
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device
    device, (options, shapes) = torch.device(kind), _chosen(options, kind)
    enough = cache_bytes(device)
    if not options.dry_run:
        wake(device)
    result: dict[str, Any] = {
        **_machine(device),
        "dry_run": options.dry_run,
        "seed": options.seed,
        "ended_early": None,
        **measure_bandwidth(device, num_bytes=1 << 16 if options.dry_run else 4 * enough, repeats=options.repeats),
        "rows": [],
        "comparisons": [],
    }

    def still_time() -> None:
        if clock() - started > limit_s:
            raise EndedEarlyError(f"the time limit of {limit_s:g} s is over")

    try:
        for row in _rows(shapes, device, options, result, enough=0 if options.dry_run else enough, before_each=still_time):
            result["rows"].append(row)
            result["comparisons"] = against_others(result["rows"], OURS[kind])
            result["comparisons"] += [] if options.dry_run else among_shapes(result["rows"])
            keep(result)
    except EndedEarlyError as why:
        result["ended_early"] = f"{why}; what is not here was not measured"
        keep(result)
    return result


def _chosen(options: BenchOptions, kind: str) -> tuple[BenchOptions, tuple[Shape, ...]]:
    """Return the options as they are meant, and the shapes."""
    shapes = options.shapes or (GPU_SHAPES if kind == "cuda" or options.dry_run else CPU_SHAPES)
    if options.quick:
        shapes = options.shapes or (QUICK_SHAPES if kind == "cuda" else shapes)
        backends = tuple(name for name in options.backends if name not in COMPILES_FOR_MINUTES)
        options = replace(options, repeats=min(options.repeats, QUICK_REPEATS), backends=backends)
    if options.dry_run:
        options, shapes = replace(options, repeats=1), tuple(dict.fromkeys(tiny(shape) for shape in shapes))
    return options, shapes


def _machine(device: torch.device) -> dict[str, Any]:
    """Return what the figures depend on besides the code."""
    found: dict[str, Any] = {"device": platform.processor() or platform.machine(), "torch": torch.__version__, "software": {}}
    for name in SOFTWARE:
        try:
            found["software"][name] = version(name)
        except PackageNotFoundError:
            found["software"][name] = None
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "device": properties.name,
            "cuda": torch.version.cuda,
            "capability": [properties.major, properties.minor],
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
        }
    return found


def _rows(
    shapes: Sequence[Shape],
    device: torch.device,
    options: BenchOptions,
    bandwidth: dict[str, float],
    *,
    enough: int,
    before_each: Callable[[], object],
) -> Iterator[dict[str, Any]]:
    """Yield the row of every shape and backend, those of backends that compile for minutes last.

    Raises:
        EndedEarlyError: If a backend has left the GPU unusable, or by `before_each`.
    """
    patient = [name for name in options.backends if name in COMPILES_FOR_MINUTES and find_spec("flashinfer") is not None]
    for backends in ([name for name in options.backends if name not in patient], patient):
        for number, shape in enumerate(shapes if backends else ()):
            before_each()
            try:
                problem = Problem(shape, device, cache_bytes=enough, seed=options.seed + number)
            except Exception as failure:  # too little memory, or a type that torch does not make here
                yield from ({**_row(shape, backend), "reason": told(failure)} for backend in backends)
                continue
            for backend in backends:
                before_each()
                yield (row := _measure(problem, backend, options, bandwidth))
                if "us" not in row:
                    _check_gpu(device, f"{backend} on {shape.name}")
            del problem  # before the next one is made


def _row(shape: Shape, backend: str) -> dict[str, Any]:
    return {"shape": asdict(shape), "name": shape.name, "backend": backend}


def _measure(problem: Problem, backend: str, options: BenchOptions, bandwidth: dict[str, float]) -> dict[str, Any]:
    """Return the row of one backend: its error and time, or the reason why there is none.

    A refusal is such a reason, and too little memory, and how a foreign backend fails; if one of this project's does, it "failed".
    """
    row = _row(problem.shape, backend) | {"floor_bytes": problem.floor_bytes}
    try:
        run = BACKENDS[backend](problem)
        errors = [problem.error(run(0))]
        seconds, no_graph = time_s(run, problem.copies, problem.device, repeats=options.repeats)
        errors.append(problem.error(run(0)))  # nothing that ran at the same time has spoiled it
        row["error"] = max(errors) if all(map(math.isfinite, errors)) else None
        row["correct"] = row["error"] is not None and row["error"] <= TOLERANCE[problem.q_dtype]
        row |= {} if no_graph is None else {"no_graph": no_graph}
        row |= {"us": seconds * 1e6, "tokens_per_s": problem.shape.batch / seconds}
        if seconds >= SHARE_FROM_S and not options.dry_run:
            row["share_of_copy"] = problem.floor_bytes / seconds / bandwidth["copy_bytes_per_s"]
            row["share_of_read"] = problem.floor_bytes / seconds / bandwidth["read_bytes_per_s"]
    except Exception as failure:  # each in its own way: say how and go on
        expected = backend not in OWN or isinstance(failure, KernelError | torch.OutOfMemoryError)
        row["reason" if expected else "failed"] = told(failure)
    return row


def _check_gpu(device: torch.device, after: str) -> None:
    """Raise EndedEarlyError if the GPU takes no more work from this process, as after a wild pointer."""
    if device.type == "cuda":
        try:
            torch.cuda.synchronize(device)
        except Exception as lost:
            raise EndedEarlyError(f"the GPU takes no more work from this process after {after}: {told(lost)}") from lost


def bench_kernels(options: BenchOptions, json_file: Path | str | None = None) -> tuple[str, bool]:
    """Run the benchmark and return (its report, whether something is wrong or failed).

    Args:
        options: What to measure.
        json_file: Where the result of `run_bench` goes, from the first row on.
    """

    def keep(result: dict[str, Any]) -> None:
        if json_file is not None:
            part = Path(f"{json_file}.part")
            part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            part.replace(json_file)

    result = run_bench(options, keep=keep)
    return render(result), found_wrong(result["rows"])


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print. Exit status 1 if a result is wrong or a backend of this project failed."""
    parser = argparse.ArgumentParser(prog="python -m pagedkv.kernels.bench", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, to see that everything runs; times mean nothing")
    parser.add_argument("--quick", action="store_true", help="a first look: three shapes, nothing that compiles for minutes")
    parser.add_argument("--time-limit-s", type=float, metavar="S", help="begin no further row after so many seconds")
    parser.add_argument("--json", metavar="FILE", help="write the whole result there, from the first row on")
    given = parser.parse_args(arguments)
    options = BenchOptions(dry_run=given.dry_run, quick=given.quick, time_limit_s=given.time_limit_s)
    report, wrong = bench_kernels(options, given.json)
    sys.stdout.write(report + "\n")
    sys.exit(int(wrong))


if __name__ == "__main__":
    main()
