"""What this machine's processor reaches: reading and copying memory, decode attention over paged keys, a matrix product.

All threads of numba take part. Each figure is taken several times, in turns, so that a busy machine disturbs all alike.
"""

import os
import platform
import time
from collections.abc import Callable
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import numba
import numpy as np

from pagedkv.jit import jit, parallel_jit
from pagedkv.kernels.contract import need
from pagedkv.kernels.machine_rates import MachineRates, Samples
from pagedkv.kernels.simd import LANES, fma, load, splat, store, sums

ROWS = 6
"""Rows of the product that stay in registers, with `WIDTH` columns each: twelve sums, enough to hide the latency of an addition."""
WIDTH = 2 * LANES
DEPTH = 256
"""Terms of a sum that are added before the next rows: a panel of so many rows of B stays in the first-level cache."""


@jit
def _total(data: Any, start: Any, stop: Any) -> Any:
    """Return the sum of `data` from `start` to `stop`, a multiple of four vectors: as fast as one thread can read."""
    one, a = splat(np.float32(1)), splat(np.float32(0))
    b, c, d = a, a, a
    for i in range(start, stop, 4 * LANES):
        a, b = fma(load(data, i), one, a), fma(load(data, i + LANES), one, b)
        c, d = fma(load(data, i + 2 * LANES), one, c), fma(load(data, i + 3 * LANES), one, d)
    w, x, y, z = sums(a, b, c, d)
    return w + x + y + z


@parallel_jit
def read_all(data: Any, threads: Any) -> Any:
    """Return the sum of `data`, one-dimensional float32, read by so many threads; a rest below a thread's share is not read."""
    totals, share = np.zeros(threads, np.float32), data.size // threads // (4 * LANES) * (4 * LANES)
    for thread in numba.prange(threads):
        totals[thread] = _total(data, thread * share, (thread + 1) * share)
    return totals.sum()


@parallel_jit
def copy_all(source: Any, target: Any, threads: Any) -> None:
    """Copy `source` to `target`, both one-dimensional float32, by so many threads; a rest below a thread's share is left out."""
    share = source.size // threads // LANES * LANES
    for thread in numba.prange(threads):
        for i in range(thread * share, (thread + 1) * share, LANES):
            store(target, i, load(source, i))


@jit
def _six_rows(a: Any, panel: Any, c: Any, row: Any, width: Any, depth: Any, first: Any, column: Any, terms: Any) -> None:
    """Add the product of `ROWS` rows of A with a panel of B to as many rows of C; all arrays are flat.

    Args:
        a: Rows of `depth` terms.
        panel: `terms` rows of `WIDTH` columns.
        c: Rows of `width` columns.
        row: First row of A and C.
        width: Columns of C.
        depth: Terms of a row of A.
        first: First term.
        column: First column of C.
        terms: Number of terms.
    """
    i0, o0 = row * depth + first, row * width + column
    i1, i2, i3, i4, i5 = i0 + depth, i0 + 2 * depth, i0 + 3 * depth, i0 + 4 * depth, i0 + 5 * depth
    o1, o2, o3, o4, o5 = o0 + width, o0 + 2 * width, o0 + 3 * width, o0 + 4 * width, o0 + 5 * width
    l0, l1, l2 = load(c, o0), load(c, o1), load(c, o2)
    l3, l4, l5 = load(c, o3), load(c, o4), load(c, o5)
    r0, r1, r2 = load(c, o0 + LANES), load(c, o1 + LANES), load(c, o2 + LANES)
    r3, r4, r5 = load(c, o3 + LANES), load(c, o4 + LANES), load(c, o5 + LANES)
    for k in range(terms):
        left, right = load(panel, k * WIDTH), load(panel, k * WIDTH + LANES)
        x = splat(a[i0 + k])
        l0, r0 = fma(x, left, l0), fma(x, right, r0)
        x = splat(a[i1 + k])
        l1, r1 = fma(x, left, l1), fma(x, right, r1)
        x = splat(a[i2 + k])
        l2, r2 = fma(x, left, l2), fma(x, right, r2)
        x = splat(a[i3 + k])
        l3, r3 = fma(x, left, l3), fma(x, right, r3)
        x = splat(a[i4 + k])
        l4, r4 = fma(x, left, l4), fma(x, right, r4)
        x = splat(a[i5 + k])
        l5, r5 = fma(x, left, l5), fma(x, right, r5)
    store(c, o0, l0)
    store(c, o1, l1)
    store(c, o2, l2)
    store(c, o3, l3)
    store(c, o4, l4)
    store(c, o5, l5)
    store(c, o0 + LANES, r0)
    store(c, o1 + LANES, r1)
    store(c, o2 + LANES, r2)
    store(c, o3 + LANES, r3)
    store(c, o4 + LANES, r4)
    store(c, o5 + LANES, r5)


@parallel_jit
def _product(a: Any, b: Any, c: Any, rows: Any, width: Any, depth: Any, threads: Any) -> None:
    blocks = rows // ROWS
    for thread in numba.prange(threads):
        panel = np.empty(DEPTH * WIDTH, np.float32)
        start, stop = blocks * thread // threads, blocks * (thread + 1) // threads
        for first in range(0, depth, DEPTH):
            terms = min(DEPTH, depth - first)
            for column in range(0, width, WIDTH):
                for k in range(terms):
                    at = (first + k) * width + column
                    store(panel, k * WIDTH, load(b, at))
                    store(panel, k * WIDTH + LANES, load(b, at + LANES))
                for block in range(start, stop):
                    _six_rows(a, panel, c, block * ROWS, width, depth, first, column, terms)


def matrix_product(a: Any, b: Any) -> Any:
    """Return a @ b of float32 arrays [rows, depth] and [depth, width], with rows in sixes and columns in whole pairs of vectors.

    Raises:
        KernelError: If the shapes are others.
    """
    need(a.ndim == b.ndim == 2 and a.shape[1] == b.shape[0], f"shapes {a.shape} and {b.shape} do not go together")
    need(a.shape[0] % ROWS == 0 and b.shape[1] % WIDTH == 0, f"{a.shape[0]} rows, {b.shape[1]} columns: need {ROWS}s and {WIDTH}s")
    c = np.zeros((a.shape[0], b.shape[1]), np.float32)
    left, right = (np.ascontiguousarray(each, np.float32).reshape(-1) for each in (a, b))
    _product(left, right, c.reshape(-1), a.shape[0], b.shape[1], a.shape[1], numba.get_num_threads())
    return c


def measure_cpu(
    *,
    num_bytes: int = 1 << 29,
    size: int = 1536,
    context: int = 4096,
    rounds: int = 7,
    clock: Callable[[], float] = time.perf_counter,
) -> MachineRates:
    """Measure and return what this processor reaches.

    Args:
        num_bytes: Memory that is read and copied, more than the caches hold.
        size: Rows and columns of the matrices, about.
        context: Keys of each of four sequences whose decode step is taken.
        rounds: How often each figure is taken.
        clock: What times are taken with, in seconds.
    """
    from pagedkv.kernels.bench_cpu import CpuBench  # noqa: PLC0415  # which takes its reading from here
    from pagedkv.kernels.dispatch import paged_attention_decode  # noqa: PLC0415

    threads = numba.get_num_threads()
    source = np.ones(max(num_bytes // 8, threads * 4 * LANES), np.float32)
    target = np.empty_like(source)
    rng = np.random.default_rng(0)
    rows, width = -(-size // ROWS) * ROWS, -(-size // WIDTH) * WIDTH
    a, b = rng.standard_normal((rows, size), np.float32), rng.standard_normal((size, width), np.float32)
    steps, kv_bytes = CpuBench(context=context).steps("float32", 4)
    turn = cycle(steps)
    flops = 2.0 * rows * width * size
    work: dict[str, tuple[Callable[[], Any], float]] = {
        "read": (partial(read_all, source, threads), float(source.nbytes)),
        "copy": (partial(copy_all, source, target, threads), 2.0 * source.nbytes),
        "kv_read": (lambda: paged_attention_decode(**next(turn), backend="cpu"), float(kv_bytes)),
        "own product": (partial(matrix_product, a, b), flops),
        "numpy's product": (partial(np.matmul, a, b), flops),
    }
    taken: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds + 1):
        for name, (run, amount) in work.items():
            start = clock()
            run()
            taken[name].append(amount / (clock() - start))
    samples = {name: Samples(values=tuple(values[1:])) for name, values in taken.items()}  # the first round compiles
    product = max(("own product", "numpy's product"), key=lambda name: samples[name].median)
    total, available = memory_bytes()
    return MachineRates(
        device=processor_name(),
        kind="cpu",
        threads=threads,
        memory_bytes=total,
        available_bytes=available,
        read=samples["read"],
        copy=samples["copy"],
        kv_read=samples["kv_read"],
        product=samples[product],
        product_by=f"{product} of float32, {rows} × {size} × {width}",
        others={name: samples[name] for name in ("own product", "numpy's product") if name != product},
    )


def processor_name() -> str:
    """Return what the system calls the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return named or platform.processor() or platform.machine()


def memory_bytes() -> tuple[int | None, int | None]:
    """Return (memory of the machine, or what a container may use of it; what is available of it now); None where nobody says."""
    names = getattr(os, "sysconf_names", {})
    if "SC_PHYS_PAGES" not in names:
        return None, None
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = _number(Path("/sys/fs/cgroup/memory.max"))
    total = min(total, limit) if limit else total
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return total, None
    return total, min(available, total)


def _number(path: Path) -> int | None:
    try:
        text = path.read_text(encoding="utf-8").strip()
    except OSError:
        return None
    return int(text) if text.isdecimal() else None
