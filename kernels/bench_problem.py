"""What the kernel benchmark runs: shapes, and memory filled so that no cache can help."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

KV_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "fp8": torch.float8_e4m3fn,
}
"""Types of the cache; queries of an fp8 cache are bf16."""

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Root mean square of the error by that of the exact output: rounding of weights and output, with room."""

CHECKED_ROWS = 4
"""Rows that are computed in float64 for comparison."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """One decode step."""

    batch: int
    """Rows."""
    context: int
    """Keys of a row, of the longest if ragged."""
    num_q_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    block_size: int = 16
    """Tokens."""
    dtype: str = "bfloat16"
    """Of the cache, a key of KV_DTYPES."""
    ragged: bool = False
    """Lengths are uniform between a quarter of the context and all of it."""

    @property
    def name(self) -> str:
        """Say what is special about the shape."""
        heads = f"{self.num_q_heads}/{self.num_kv_heads} heads D{self.head_dim}"
        return f"B{self.batch} ctx {self.context} {heads} {self.dtype} block {self.block_size}{' ragged' if self.ragged else ''}"

    def lengths(self, rng: np.random.Generator) -> list[int]:
        """Return the keys of each row."""
        low = self.context // 4 if self.ragged else self.context
        return [int(n) for n in rng.integers(low, self.context + 1, self.batch)]


LARGE = Shape(batch=64, context=4096)
GPU_SHAPES = (
    LARGE,
    Shape(batch=16, context=4096),
    Shape(batch=1, context=32768),
    Shape(batch=128, context=1024),
    replace(LARGE, dtype="fp8"),
    replace(LARGE, ragged=True),
    replace(LARGE, block_size=128),
    replace(LARGE, num_q_heads=8),
    Shape(batch=1, context=512),
)
"""The shapes that the project's goals name, one without shared heads, and one so small that its time is overhead."""

QUICK_SHAPES = (LARGE, replace(LARGE, dtype="fp8"), Shape(batch=1, context=32768))
"""The shapes of a first look: the goal, fp8, and one that is split."""

CPU_SHAPES = tuple(Shape(batch=4, context=4096, dtype=dtype) for dtype in ("float32", "bfloat16"))


def tiny(shape: Shape) -> Shape:
    """Return a shape like `shape` that an interpreter finishes in a moment."""
    kv_heads = 4 if shape.num_q_heads == shape.num_kv_heads else 2
    return replace(shape, batch=2, context=24, num_q_heads=4, num_kv_heads=kv_heads, head_dim=16)


class Problem:
    """Inputs on a device: `copies` times the same step on different memory, together larger than `cache_bytes`.

    The blocks of all copies are one shuffled sequence without repetition; what is read once is not read again until the cache has
    forgotten it.
    """

    def __init__(self, shape: Shape, device: torch.device, *, cache_bytes: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        torch.manual_seed(seed)
        self.shape, self.device = shape, device
        self.lengths = shape.lengths(rng)
        stored = KV_DTYPES[shape.dtype]
        self.q_dtype = torch.bfloat16 if shape.dtype == "fp8" else stored
        self.copies = max(2, -(-cache_bytes // self.kv_bytes))
        counts = [-(-n // shape.block_size) for n in self.lengths]
        num_blocks = self.copies * sum(counts)
        self.block_tables = self._tables(counts, rng.permutation(num_blocks))
        self.cache_seqlens = torch.tensor(self.lengths, dtype=torch.int32, device=device)
        size = (num_blocks, shape.block_size, shape.num_kv_heads, shape.head_dim)
        fresh = torch.bfloat16 if shape.dtype == "fp8" else stored
        self.k_cache, self.v_cache = (torch.randn(size, dtype=fresh, device=device).to(stored) for _ in range(2))
        self.queries = torch.randn(self.copies, shape.batch, shape.num_q_heads, shape.head_dim, dtype=self.q_dtype, device=device)

    def _tables(self, counts: list[int], blocks: Any) -> torch.Tensor:
        tables = np.full((self.copies, len(counts), max(counts)), -1, np.int32)
        taken = 0
        for copy in range(self.copies):
            for row, count in enumerate(counts):
                tables[copy, row, :count] = blocks[taken : taken + count]
                taken += count
        return torch.from_numpy(tables).to(self.device)

    @property
    def kv_bytes(self) -> int:
        """Keys and values of one copy."""
        row_bytes = 2 * self.shape.num_kv_heads * self.shape.head_dim * KV_DTYPES[self.shape.dtype].itemsize
        return int(sum(self.lengths) * row_bytes)

    @property
    def floor_bytes(self) -> int:
        """What must move: keys and values read once, queries read, the output written."""
        query_bytes = self.shape.batch * self.shape.num_q_heads * self.shape.head_dim * self.q_dtype.itemsize
        return int(self.kv_bytes + 2 * query_bytes)

    @cached_property
    def expected(self) -> dict[int, torch.Tensor]:
        """By row: the exact output of the first copy [num_q_heads, head_dim], float64."""
        rows = np.linspace(0, self.shape.batch - 1, min(CHECKED_ROWS, self.shape.batch)).astype(int)
        extremes = {int(np.argmin(self.lengths)), int(np.argmax(self.lengths))}
        return {row: self._exact(row) for row in sorted({*rows.tolist(), *extremes})}

    def _exact(self, row: int) -> torch.Tensor:
        tokens = torch.arange(self.lengths[row], device=self.device)
        blocks = self.block_tables[0, row, tokens // self.shape.block_size].long()
        group = self.shape.num_q_heads // self.shape.num_kv_heads
        stored = (cache.view(torch.uint8) if self.shape.dtype == "fp8" else cache for cache in (self.k_cache, self.v_cache))
        keys, values = (
            cache[blocks, tokens % self.shape.block_size].view(self.k_cache.dtype).double().repeat_interleave(group, dim=1)
            for cache in stored  # bytes of fp8, which torch does not index everywhere
        )
        scores = torch.einsum("hd,nhd->hn", self.queries[0, row].double(), keys) * self.shape.head_dim**-0.5
        return torch.einsum("hn,nhd->hd", scores.softmax(dim=1), values)

    def error(self, out: torch.Tensor) -> float:
        """Return the root mean square of `out`'s error by that of the exact output, on the rows compared."""
        want = torch.stack([self.expected[row] for row in self.expected])
        got = torch.stack([out[row].double() for row in self.expected])
        return float(((got - want).square().mean() / want.square().mean()).sqrt())
