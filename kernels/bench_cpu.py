"""Measure the CPU kernel: against the memory's bandwidth, on one thread and on all, and against gathering with torch.

`python -m pagedkv.kernels.bench_cpu` prints one line per figure. Ratios are of what ran in turns within one run, medians of their
rounds: machines are shared and noisy.
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import cycle
from typing import Any

import numba
import numpy as np

from pagedkv.kernels.block_size_study import DTYPES, BlockSizeStudy
from pagedkv.kernels.cpu_rates import read_all
from pagedkv.kernels.dispatch import paged_attention_decode
from pagedkv.kernels.simd import LANES

POOL_BYTES = 256 * 2**20
"""Keys and values that decode steps take turns in, more than a cache holds."""


_FIGURES = tuple(f"{kind}_{threads}" for kind in ("read", "decode", "cached") for threads in ("1", "all"))


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuBench:
    """What is measured."""

    batch: int = 4
    """Sequences."""
    context: int = 4096
    """Keys of each."""
    num_q_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    block_size: int = 16
    rounds: int = 9
    """How often each figure is taken, in turns; the median counts."""

    def steps(self, dtype: str, batch: int) -> tuple[list[dict[str, Any]], int]:
        """Return decode steps of sequences of their own, so that no cache holds what comes next, and the bytes of keys of one."""
        sizes: dict[str, Any] = {"num_q_heads": self.num_q_heads, "num_kv_heads": self.num_kv_heads, "head_dim": self.head_dim}
        row_bytes = 2 * self.context * self.num_kv_heads * self.head_dim * np.dtype(DTYPES[dtype]).itemsize
        num_steps = max(2, -(-POOL_BYTES // (row_bytes * batch)))
        arrays = BlockSizeStudy(lengths=(self.context,) * (batch * num_steps), dtype=dtype, **sizes).arrays(self.block_size)
        by_row = ("q", "block_table", "cache_seqlens")
        rows = [slice(i * batch, (i + 1) * batch) for i in range(num_steps)]
        return [
            {name: array[row] if name in by_row else array for name, array in arrays.items()} for row in rows
        ], row_bytes * batch

    def bandwidth_row(self, dtype: str, batch: int) -> dict[str, float]:
        """Return decode, and plain reading of the same memory, on one thread and on all, in bytes per second and as ratios."""
        steps, kv_bytes = self.steps(dtype, batch)
        turn = cycle(steps)
        one_block = {**steps[0], "block_table": np.zeros_like(steps[0]["block_table"])}  # in the cache: what computing takes
        pools = [steps[0][name].reshape(-1).view(np.float32) for name in ("k_cache", "v_cache")]
        pool_bytes = sum(pool.nbytes for pool in pools)
        all_threads = numba.get_num_threads()
        taken: dict[str, list[float]] = {name: [] for name in _FIGURES}
        try:
            for _ in range(self.rounds + 1):
                for name, threads in (("1", 1), ("all", all_threads)):
                    numba.set_num_threads(threads)
                    read_s = sum(_seconds(partial(read_all, pool, threads)) for pool in pools)
                    taken[f"read_{name}"].append(pool_bytes / read_s)
                    taken[f"decode_{name}"].append(kv_bytes / _seconds(lambda: paged_attention_decode(**next(turn), backend="cpu")))
                    taken[f"cached_{name}"].append(kv_bytes / _seconds(lambda: paged_attention_decode(**one_block, backend="cpu")))
        finally:
            numba.set_num_threads(all_threads)
        rates = {name: numbers[1:] for name, numbers in taken.items()}  # the first round compiles
        row = {f"{name}_bytes_per_s": statistics.median(numbers) for name, numbers in rates.items()}
        pairs = {"decode_of_read": ("decode_1", "read_1"), "decode_of_read_all": ("decode_all", "read_all")}
        pairs |= {f"{kind}_threads": (f"{kind}_all", f"{kind}_1") for kind in ("decode", "read", "cached")}
        for name, (above, below) in pairs.items():
            row[name] = statistics.median(x / y for x, y in zip(rates[above], rates[below], strict=True))
        return row

    def torch_row(self, dtype: str, batch: int) -> dict[str, float]:
        """Return seconds of this kernel, and of gathering the blocks with torch and its own attention, on all threads.

        Raises:
            ImportError: Without torch.
        """
        import torch  # noqa: PLC0415  # heavy, and needed only here

        kind = getattr(torch, dtype)
        torch.set_num_threads(numba.get_num_threads())
        steps: list[dict[str, Any]] = [
            {name: torch.from_numpy(array) for name, array in step.items()} for step in self.steps(dtype, batch)[0]
        ]
        for step in steps:
            step |= {name: step[name].view(kind) for name in ("q", "k_cache", "v_cache")}

        def gathered(q: Any, k_cache: Any, v_cache: Any, block_table: Any, cache_seqlens: Any) -> Any:
            k, v = (cache[block_table.long()].flatten(1, 2).transpose(1, 2) for cache in (k_cache, v_cache))
            return torch.nn.functional.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)[:, :, 0]

        def paged(**step: Any) -> Any:
            return paged_attention_decode(**step, backend="cpu")

        error = (gathered(**steps[0]).float() - paged(**steps[0]).float()).abs().max().item()
        turn = cycle(steps)
        ours, theirs = [], []
        for _ in range(self.rounds):
            ours.append(_seconds(lambda: paged(**next(turn))))
            theirs.append(_seconds(lambda: gathered(**next(turn))))
        ratio = statistics.median(y / x for x, y in zip(ours, theirs, strict=True))
        return {
            "decode_s": statistics.median(ours),
            "torch_s": statistics.median(theirs),
            "ratio": ratio,
            "largest_difference": error,
        }


def _seconds(call: Callable[[], Any]) -> float:
    """Return the seconds of the fastest of three calls: another process may have interrupted the others."""
    taken = []
    for _ in range(3):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return min(taken)


def main() -> None:
    """Measure and print."""
    bench = CpuBench()

    def say(line: str) -> None:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

    say(f"{numba.get_num_threads()} threads, vectors of {LANES} float32, {bench}")
    for batch in (1, bench.batch):
        for dtype in DTYPES:
            row = bench.bandwidth_row(dtype, batch)
            one, every = row["decode_1_bytes_per_s"] / 1e9, row["decode_all_bytes_per_s"] / 1e9
            read_one, read_every = row["read_1_bytes_per_s"] / 1e9, row["read_all_bytes_per_s"] / 1e9
            say(
                f"decode {dtype:8} batch {batch}: {one:5.1f} GB/s on one thread, {row['decode_of_read']:.2f} of the {read_one:.1f} "
                f"it reads; "
                f"on all {every:5.1f}, {row['decode_of_read_all']:.2f} of {read_every:.1f}: x {row['decode_threads']:.2f}, "
                f"reading x {row['read_threads']:.2f}, keys in the cache x {row['cached_threads']:.2f}"
            )
    if find_spec("torch"):
        for batch in (1, bench.batch):
            for dtype in ("float32", "bfloat16"):
                row = bench.torch_row(dtype, batch)
                say(
                    f"torch {dtype:8} batch {batch}: gather and attention {row['torch_s'] * 1e3:.1f} ms, this kernel "
                    f"{row['decode_s'] * 1e3:.2f} ms, x {row['ratio']:.1f}; largest difference {row['largest_difference']:.1e}"
                )
    rng = np.random.default_rng(0)
    study = BlockSizeStudy(lengths=tuple(rng.integers(100, 2000, 16).tolist()))
    for row in study.rows():
        say(
            f"block size {row['block_size']:3.0f}: {row['kernel_s'] * 1e3:.2f} ms, {row['kv_bytes_per_s'] / 1e9:.1f} GB/s, "
            f"{row['internal_waste']:.1%} internal waste"
        )


if __name__ == "__main__":
    main()
