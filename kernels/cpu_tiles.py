"""One tile of keys on the CPU: scores, one step of the online softmax, weighted values.

A tile is some tokens of every KV head of a work item. A row is one query of one query head; the rows of a KV head lie together, and
four of them share every load of a key or a value. Scores are in base 2, [tokens, rows], so that the softmax works on rows side by
side. The next tile is asked for while this one is computed: the blocks of a sequence lie anywhere, which hardware cannot guess.
"""

import math
from functools import cache
from typing import Any

import numba
import numpy as np

from pagedkv.jit import jit, native
from pagedkv.kernels.simd import LANES, fma, load, prefetch, splat, store, sums

STEP = 4
"""Tokens, and rows, that share loads: 16 accumulators. Tiles are padded to a multiple of it."""
_CACHE_LINE_BYTES = 64

_ZERO, _ONE, _HALF, _TWO = (np.float32(x) for x in (0, 1, 0.5, 2))
_NEVER = np.float32(-np.inf)
_SMALLEST_EXPONENT = np.float32(-126)
_EXP2 = tuple(np.float32(x) for x in (1.0, 0.69314721, 0.24022651, 0.055503243, 0.0096180567, 0.0013400428, 0.00015461445))
"""2**x for |x| <= 0.5, interpolated at Chebyshev's points: within 3e-9 before rounding."""
_LOG2E = np.float32(math.log2(math.e))
_TANH = tuple(np.float32(x) for x in (-3.33332819422e-1, 1.33314422036e-1, -5.37397155531e-2, 2.06390887954e-2, -5.70498872745e-3))
_TANH_SMALL = np.float32(0.625)
"""tanh(x) = x + x**3 P(x**2) up to here. Source: Cephes, tanhf.c."""


@jit
def exp2(x: Any) -> Any:
    """Return 2**x for a float32 x <= 0, in a form that vectorises; 0 below the smallest normal number, NaN for NaN."""
    whole = np.int32(x - _HALF)  # rounds to nearest: x is not positive
    f = x - np.float32(whole)
    series = _EXP2[6]
    for k in range(5, -1, -1):
        series = fma(series, f, _EXP2[k])
    power = np.int32((whole + np.int32(127)) << np.int32(23)).view(np.float32)
    return _ZERO if x < _SMALLEST_EXPONENT else series * power


@jit
def tanh(x: Any) -> Any:
    """Return the hyperbolic tangent of a float32, in a form that vectorises."""
    z = x * x
    series = _TANH[4]
    for k in range(3, -1, -1):
        series = fma(series, z, _TANH[k])
    size = abs(x)
    decay = exp2(-_TWO * _LOG2E * size)
    large = (_ONE - decay) / (_ONE + decay)
    return x + x * z * series if size < _TANH_SMALL else (large if x > _ZERO else -large)


@jit
def _ask(
    stored: Any, start: Any, ahead: Any, head_stride: Any, num_heads: Any, head_dim: Any, token: Any, head: Any
) -> tuple[Any, Any]:
    """Ask for STEP rows of the next tile from `head` of `token` on, in the order in which they lie; return where the next begin."""
    for _ in range(STEP):
        for d in range(0, head_dim, _CACHE_LINE_BYTES // stored.itemsize):
            prefetch(stored, ahead[token] + start + head * head_stride + d)
        head += 1
        if head == num_heads:
            token, head = token + 1, 0
    return token, head


@jit
def score(
    q: Any,
    keys: Any,
    start: Any,
    now: Any,
    ahead: Any,
    head_stride: Any,
    num_heads: Any,
    head_rows: Any,
    head_dim: Any,
    scores: Any,
) -> None:
    """Multiply every query row with the keys of one tile: scores[token * rows + row] = q[row] . key[token].

    Args:
        q: Rows of padded queries, flat: [num_heads * head_rows, head_dim rounded up to LANES].
        keys: The cache, flat.
        start: Where the first KV head lies in a token, in elements.
        now: Where the tokens of this tile begin in `keys`, a multiple of STEP of them.
        ahead: Where those of the next tile begin.
        head_stride: From one KV head of a token to the next, in elements.
        num_heads: KV heads.
        head_rows: Rows per KV head.
        head_dim: Elements of a head, at least LANES.
        scores: Goes here, flat.
    """
    width = -(-head_dim // LANES) * LANES
    ragged = width > head_dim
    num_rows = num_heads * head_rows
    next_t = next_head = 0
    for t in range(0, now.size, STEP):
        for head in range(num_heads):
            skip = start + head * head_stride
            next_t, next_head = _ask(keys, start, ahead, head_stride, num_heads, head_dim, next_t, next_head)
            k0, k1, k2, k3 = now[t] + skip, now[t + 1] + skip, now[t + 2] + skip, now[t + 3] + skip
            row, stop = head * head_rows, (head + 1) * head_rows
            while row + STEP <= stop:
                a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = c0 = c1 = c2 = c3 = d0 = d1 = d2 = d3 = splat(_ZERO)
                for d in range(0, width, LANES):
                    e = min(d, head_dim - LANES) if ragged else d  # queries are 0 where the last two vectors overlap
                    i = row * width + d
                    q0, q1, q2, q3 = load(q, i), load(q, i + width), load(q, i + 2 * width), load(q, i + 3 * width)
                    x = load(keys, k0 + e)
                    a0, a1, a2, a3 = fma(q0, x, a0), fma(q1, x, a1), fma(q2, x, a2), fma(q3, x, a3)
                    x = load(keys, k1 + e)
                    b0, b1, b2, b3 = fma(q0, x, b0), fma(q1, x, b1), fma(q2, x, b2), fma(q3, x, b3)
                    x = load(keys, k2 + e)
                    c0, c1, c2, c3 = fma(q0, x, c0), fma(q1, x, c1), fma(q2, x, c2), fma(q3, x, c3)
                    x = load(keys, k3 + e)
                    d0, d1, d2, d3 = fma(q0, x, d0), fma(q1, x, d1), fma(q2, x, d2), fma(q3, x, d3)
                i = t * num_rows + row
                scores[i], scores[i + 1], scores[i + 2], scores[i + 3] = sums(a0, a1, a2, a3)
                i += num_rows
                scores[i], scores[i + 1], scores[i + 2], scores[i + 3] = sums(b0, b1, b2, b3)
                i += num_rows
                scores[i], scores[i + 1], scores[i + 2], scores[i + 3] = sums(c0, c1, c2, c3)
                i += num_rows
                scores[i], scores[i + 1], scores[i + 2], scores[i + 3] = sums(d0, d1, d2, d3)
                row += STEP
            while row < stop:
                a0 = b0 = c0 = d0 = splat(_ZERO)
                for d in range(0, width, LANES):
                    e = min(d, head_dim - LANES) if ragged else d
                    q0 = load(q, row * width + d)
                    a0, b0 = fma(q0, load(keys, k0 + e), a0), fma(q0, load(keys, k1 + e), b0)
                    c0, d0 = fma(q0, load(keys, k2 + e), c0), fma(q0, load(keys, k3 + e), d0)
                i = t * num_rows + row
                scores[i], scores[i + num_rows], scores[i + 2 * num_rows], scores[i + 3 * num_rows] = sums(a0, b0, c0, d0)
                row += 1


@jit
def weigh(
    acc: Any, values: Any, start: Any, now: Any, ahead: Any, head_stride: Any, num_heads: Any, head_rows: Any, head_dim: Any, p: Any
) -> None:
    """Add the weighted values of one tile: acc[row] += sum of p[token * rows + row] * value[token]. Arguments as `score`.

    `acc` is padded as queries are: its last vector holds the last LANES elements of the head.
    """
    width = -(-head_dim // LANES) * LANES
    ragged = width > head_dim
    num_rows = num_heads * head_rows
    next_t = next_head = 0
    for t in range(0, now.size, STEP):
        for head in range(num_heads):
            skip = start + head * head_stride
            next_t, next_head = _ask(values, start, ahead, head_stride, num_heads, head_dim, next_t, next_head)
            v0, v1, v2, v3 = now[t] + skip, now[t + 1] + skip, now[t + 2] + skip, now[t + 3] + skip
            row, stop = head * head_rows, (head + 1) * head_rows
            while row + STEP <= stop:
                i = t * num_rows + row
                a0, a1, a2, a3 = splat(p[i]), splat(p[i + 1]), splat(p[i + 2]), splat(p[i + 3])
                i += num_rows
                b0, b1, b2, b3 = splat(p[i]), splat(p[i + 1]), splat(p[i + 2]), splat(p[i + 3])
                i += num_rows
                c0, c1, c2, c3 = splat(p[i]), splat(p[i + 1]), splat(p[i + 2]), splat(p[i + 3])
                i += num_rows
                d0, d1, d2, d3 = splat(p[i]), splat(p[i + 1]), splat(p[i + 2]), splat(p[i + 3])
                for d in range(0, width, LANES):
                    e = min(d, head_dim - LANES) if ragged else d
                    i = row * width + d
                    s0, s1, s2, s3 = load(acc, i), load(acc, i + width), load(acc, i + 2 * width), load(acc, i + 3 * width)
                    x = load(values, v0 + e)
                    s0, s1, s2, s3 = fma(a0, x, s0), fma(a1, x, s1), fma(a2, x, s2), fma(a3, x, s3)
                    x = load(values, v1 + e)
                    s0, s1, s2, s3 = fma(b0, x, s0), fma(b1, x, s1), fma(b2, x, s2), fma(b3, x, s3)
                    x = load(values, v2 + e)
                    s0, s1, s2, s3 = fma(c0, x, s0), fma(c1, x, s1), fma(c2, x, s2), fma(c3, x, s3)
                    x = load(values, v3 + e)
                    s0, s1, s2, s3 = fma(d0, x, s0), fma(d1, x, s1), fma(d2, x, s2), fma(d3, x, s3)
                    store(acc, i, s0)
                    store(acc, i + width, s1)
                    store(acc, i + 2 * width, s2)
                    store(acc, i + 3 * width, s3)
                row += STEP
            while row < stop:
                i = t * num_rows + row
                a0, b0 = splat(p[i]), splat(p[i + num_rows])
                c0, d0 = splat(p[i + 2 * num_rows]), splat(p[i + 3 * num_rows])
                for d in range(0, width, LANES):
                    e = min(d, head_dim - LANES) if ragged else d
                    s0 = fma(a0, load(values, v0 + e), load(acc, row * width + d))
                    s0 = fma(b0, load(values, v1 + e), s0)
                    s0 = fma(c0, load(values, v2 + e), s0)
                    store(acc, row * width + d, fma(d0, load(values, v3 + e), s0))
                row += 1


@jit
def hide(scores: Any, position: Any, end: Any, first: Any, last: Any) -> None:
    """Set to -inf what a row may not see: keys before `first` or from `last` on. The tile's tokens start at `position`.

    Args:
        scores: [tokens, rows].
        position: Of the tile's first token.
        end: Tokens from here on are padding.
        first: By row: the first key it sees, int32.
        last: By row: the one past the last, int32.
    """
    for t in range(scores.shape[0]):
        line, here = scores[t], np.int32(position + t)
        if here >= end:
            line[:] = _NEVER
        else:
            for r in range(line.size):
                line[r] = line[r] if (first[r] <= here) & (here < last[r]) else _NEVER


@jit
def soften(scores: Any, row_max: Any, row_sum: Any, rescale: Any) -> bool:
    """Turn `scores` [tokens, rows] into weights relative to the new maximum, and count them in.

    Args:
        scores: In base 2; weights when it returns.
        row_max: By row: the largest score so far, -inf at first.
        row_sum: By row: sum of the weights so far.
        rescale: By row, goes out: the factor for what was summed before.

    Returns:
        Whether a factor is not 1.
    """
    for r in range(row_max.size):
        rescale[r] = row_max[r]
    for t in range(scores.shape[0]):
        line = scores[t]
        for r in range(line.size):
            row_max[r] = max(row_max[r], line[r])
    changed = False
    for r in range(row_max.size):
        grown = row_max[r] != rescale[r]
        changed |= grown
        rescale[r] = exp2(rescale[r] - row_max[r]) if grown else _ONE
        row_sum[r] *= rescale[r]
    for t in range(scores.shape[0]):
        line = scores[t]
        for r in range(line.size):
            base = _ZERO if row_max[r] == _NEVER else row_max[r]
            line[r] = exp2(line[r] - base)
            row_sum[r] += line[r]
    return changed


@jit
def cap(scores: Any, softcap: Any) -> None:
    """Turn x = score / softcap into softcap * tanh(x), in base 2."""
    factor = np.float32(softcap) * _LOG2E
    for t in range(scores.shape[0]):
        line = scores[t]
        for r in range(line.size):
            line[r] = factor * tanh(line[r])


_FLAT, _PLACES, _COUNT = numba.float32[::1], numba.int64[::1], numba.int64
_STORED = numba.uint8[::1]
_SIGNATURE = numba.void(_FLAT, _STORED, _COUNT, _PLACES, _PLACES, _COUNT, _COUNT, _COUNT, _COUNT, _FLAT)
TILE_KERNEL = numba.types.FunctionType(_SIGNATURE)
"""The type of `score` and of `weigh`, whatever the cache stores."""


@cache
def tile_kernels(storage: np.dtype[Any]) -> tuple[Any, Any]:
    """Return `score` and `weigh` for a cache of `storage` given as bytes, as functions that compiled code takes as arguments."""
    kind = np.int16 if storage == np.float16 else storage.type

    def score_stored(q, keys, start, now, ahead, head_stride, num_heads, head_rows, head_dim, scores):  # type: ignore[no-untyped-def]
        score(q, keys.view(kind), start, now, ahead, head_stride, num_heads, head_rows, head_dim, scores)

    def weigh_stored(acc, values, start, now, ahead, head_stride, num_heads, head_rows, head_dim, p):  # type: ignore[no-untyped-def]
        weigh(acc, values.view(kind), start, now, ahead, head_stride, num_heads, head_rows, head_dim, p)

    return native(score_stored, _SIGNATURE), native(weigh_stored, _SIGNATURE)
