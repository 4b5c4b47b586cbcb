"""What a block size costs: the kernel's time against the slots that are never filled, on the same sequences."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pagedkv.kernels.contract import narrowed, need
from pagedkv.kernels.dispatch import paged_attention_decode

BLOCK_SIZES = (8, 16, 32, 64, 128)
DTYPES: dict[str, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockSizeStudy:
    """A decode step to measure."""

    lengths: tuple[int, ...]
    """Keys of each sequence."""
    block_sizes: tuple[int, ...] = BLOCK_SIZES
    """Tokens per block, each measured."""
    num_q_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    dtype: str = "float32"
    """Type of queries and cache: "float32", "float16" or "bfloat16"."""
    rounds: int = 5
    """How often each block size is timed, in turns, so that a busy machine disturbs all alike; the median counts."""
    seed: int = 0

    def rows(self, decode: Callable[..., Any] = paged_attention_decode) -> list[dict[str, float]]:
        """Measure `decode` and return one row per block size, ready for JSON.

        Each row has block_size; kernel_s, the median time of a call; kv_bytes_per_s, keys and values per second; internal_waste,
        the share of the slots in taken blocks that hold no token; table_entries, the blocks taken.

        Raises:
            KernelError: If there is nothing to measure.
        """
        need(self.dtype in DTYPES, f"dtype is {self.dtype!r}: needs one of {', '.join(DTYPES)}")
        need(self.lengths and min(self.lengths) > 0, f"lengths are {list(self.lengths)}: needs at least one, each 1 or more")
        need(self.block_sizes and min(self.block_sizes) > 0, f"block sizes {self.block_sizes}: need at least one, each 1 or more")
        steps = [self.arrays(block_size) for block_size in self.block_sizes]
        times: list[list[float]] = [[] for _ in steps]
        for _ in range(self.rounds + 1):
            for arrays, taken in zip(steps, times, strict=True):
                start = time.perf_counter()
                decode(**arrays)
                taken.append(time.perf_counter() - start)
        tokens = sum(self.lengths)
        kv_bytes = 2 * tokens * self.num_kv_heads * self.head_dim * np.dtype(DTYPES[self.dtype]).itemsize
        return [
            self._row(size, statistics.median(taken[1:]), tokens, kv_bytes)
            for size, taken in zip(self.block_sizes, times, strict=True)
        ]

    def _row(self, block_size: int, kernel_s: float, tokens: int, kv_bytes: int) -> dict[str, float]:
        blocks = _blocks(self.lengths, block_size)
        waste = 1 - tokens / (blocks * block_size)
        return {
            "block_size": block_size,
            "kernel_s": kernel_s,
            "kv_bytes_per_s": kv_bytes / kernel_s,
            "internal_waste": waste,
            "table_entries": blocks,
        }

    def arrays(self, block_size: int) -> dict[str, Any]:
        """Return what a decode step takes: random keys in blocks in random order."""
        rng, kind = np.random.default_rng(self.seed), DTYPES[self.dtype]
        num_blocks = _blocks(self.lengths, block_size)
        counts = np.array([-(-length // block_size) for length in self.lengths])
        table = np.full((len(counts), counts.max()), -1, np.int32)
        table[np.arange(counts.max()) < counts[:, None]] = rng.permutation(num_blocks)
        shape = (num_blocks, block_size, self.num_kv_heads, self.head_dim)
        k_cache, v_cache = (narrowed(rng.standard_normal(shape, np.float32), kind) for _ in range(2))
        q = narrowed(rng.standard_normal((len(counts), self.num_q_heads, self.head_dim), np.float32), kind)
        return {
            "q": q,
            "k_cache": k_cache,
            "v_cache": v_cache,
            "block_table": table,
            "cache_seqlens": np.array(self.lengths, np.int32),
        }


def _blocks(lengths: Sequence[int], block_size: int) -> int:
    return sum(-(-length // block_size) for length in lengths)
