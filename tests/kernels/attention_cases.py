"""Cases of paged attention, for every backend: everything unused is NaN, blocks lie anywhere, and some are shared."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from hypothesis import strategies as st

from pagedkv.kernels.contract import narrowed, nhd

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}
TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1e-2}
"""Of outputs that average values of a standard normal distribution."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call; `arrays` and `options` are what `paged_attention` takes."""

    lengths: tuple[int, ...]
    num_queries: tuple[int, ...] | None = None
    """By sequence; None: a decode step."""
    block_size: int = 16
    num_kv_heads: int = 2
    group_size: int = 4
    head_dim: int = 64
    dtype: str = "float32"
    kv_layout: str = "NHD"
    interleaved: bool = False
    """Keys and values are views of one pool [num_blocks, 2, ...]."""
    shared_blocks: int = 0
    """Leading blocks that all sequences share, as far as they are full in each."""
    options: dict[str, Any] = field(default_factory=dict)
    """More keywords."""
    seed: int = 0

    def arrays(self) -> dict[str, Any]:
        """Return q, caches, tables and lengths, numpy."""
        rng = np.random.default_rng(self.seed)
        counts = [-(-n // self.block_size) for n in self.lengths]
        shared = min([self.shared_blocks, *(n // self.block_size for n in self.lengths)])
        num_blocks = sum(counts) - shared * (len(counts) - 1) + 2
        free = iter(rng.permutation(num_blocks).tolist())
        prefix = [next(free) for _ in range(shared)]
        tables = [prefix + [next(free) for _ in range(count - shared)] for count in counts]
        padded = np.full((len(tables), max(counts) + 2), -1, np.int32)
        pool = np.full((num_blocks, 2, self.block_size, self.num_kv_heads, self.head_dim), np.nan, np.float32)
        for row, (length, table) in enumerate(zip(self.lengths, tables, strict=True)):
            padded[row, : len(table)] = table
            tokens = np.arange(length)
            slots = np.array(table, int)[tokens // self.block_size], tokens % self.block_size
            pool[slots[0], :, slots[1]] = rng.standard_normal((length, 2, self.num_kv_heads, self.head_dim))
        if left := self.options.get("window_size", (-1, -1))[0] + 1:  # what has left every window is given back
            for row, length in enumerate(self.lengths):
                gone = max(length - (self.num_queries or (1,) * len(self.lengths))[row] + 1 - left, 0) // self.block_size
                padded[row, :gone] = -1
        return self._call_arrays(rng, narrowed(pool, DTYPES[self.dtype]), padded)

    def _call_arrays(self, rng: np.random.Generator, pool: Any, tables: Any) -> dict[str, Any]:
        if self.kv_layout == "HND":
            pool = np.ascontiguousarray(pool.swapaxes(2, 3))
        k_cache, v_cache = (pool[:, 0], pool[:, 1]) if self.interleaved else (pool[:, 0].copy(), pool[:, 1].copy())
        num_queries = self.num_queries or (1,) * len(self.lengths)
        q = rng.standard_normal((sum(num_queries), self.num_kv_heads * self.group_size, self.head_dim))
        arrays = {"q": narrowed(q.astype(np.float32), DTYPES[self.dtype]), "k_cache": k_cache, "v_cache": v_cache}
        arrays |= {"block_table": tables, "cache_seqlens": np.array(self.lengths, np.int32)}
        if self.num_queries is not None:
            arrays["cu_seqlens_q"] = np.concatenate([[0], np.cumsum(self.num_queries)]).astype(np.int32)
        return arrays

    def keywords(self) -> dict[str, Any]:
        """Return the options, sinks drawn by head if they are asked for."""
        options = {**self.options, "kv_layout": self.kv_layout}
        if options.pop("with_sinks", False):
            options["sinks"] = (
                np.random.default_rng(self.seed).standard_normal(self.num_kv_heads * self.group_size).astype(np.float32)
            )
        return options


def filled_slots(case: Case, arrays: dict[str, Any]) -> Any:
    """Return which slots [num_blocks, block_size] hold a token."""
    keys = np.asarray(nhd(arrays["k_cache"], case.kv_layout))
    values = (keys.astype(np.uint32) << 16).view(np.float32) if keys.dtype == np.uint16 else keys
    return ~np.isnan(values).any(axis=(2, 3))


def lengths(block_size: int, longest: int = 300) -> st.SearchStrategy[int]:
    """Lengths, the edges of blocks among them."""
    edges = [0, 1, block_size - 1, block_size, block_size + 1, 3 * block_size]
    return st.one_of(st.sampled_from(edges), st.integers(0, longest))


@st.composite
def cases(
    draw: st.DrawFn,
    *,
    prefill: bool = False,
    dtypes: tuple[str, ...] = ("float32",),
    head_dims: tuple[int, ...] = (64, 128, 256),
    longest: int = 300,
) -> Case:
    """Any case: a decode step, or a chunk of queries for each sequence."""
    block_size = draw(st.sampled_from([1, 2, 7, 8, 16, 32, 64]))
    rows = tuple(draw(st.lists(lengths(block_size, longest), min_size=1, max_size=4)))
    options: dict[str, Any] = {}
    if draw(st.booleans()):
        options["num_splits"] = draw(st.integers(1, 7))
    if draw(st.booleans()):
        options["window_size"] = (draw(st.integers(0, 100)), draw(st.sampled_from([-1, 0])))
    if draw(st.booleans()):
        options["softcap"] = draw(st.sampled_from([0.5, 3.0, 50.0]))
    if draw(st.booleans()):
        options["with_sinks"] = True
    if draw(st.booleans()):
        options |= {"softmax_scale": draw(st.floats(0.01, 0.5)), "k_scale": 0.5, "v_scale": 2.0}
    return Case(
        lengths=rows,
        num_queries=tuple(draw(st.integers(0, min(length, 90))) for length in rows) if prefill else None,
        block_size=block_size,
        num_kv_heads=draw(st.integers(1, 3)),
        group_size=draw(st.integers(1, 8)),
        head_dim=draw(st.sampled_from(head_dims)),
        dtype=draw(st.sampled_from(dtypes)),
        kv_layout=draw(st.sampled_from(["NHD", "HND"])),
        interleaved=draw(st.booleans()),
        shared_blocks=0 if "window_size" in options else draw(st.integers(0, 4)),
        options=options,
        seed=draw(st.integers(0, 99)),
    )
