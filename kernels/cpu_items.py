"""What a thread does with an item of work: its queries, tile by tile over its keys; and the merging of split sequences."""

import math
from functools import cache
from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from pagedkv.arrays import Int32Array, Int64Array
from pagedkv.jit import jit, native
from pagedkv.kernels.cpu_plan import ITEM
from pagedkv.kernels.cpu_tiles import STEP, TILE_KERNEL, cap, hide, soften
from pagedkv.kernels.simd import LANES, fetch_add

Float32Array = npt.NDArray[np.float32]

_LN2 = np.float32(math.log(2))
_NEVER = np.float32(-np.inf)
_ZERO, _ONE = np.float32(0), np.float32(1)


class Operands(NamedTuple):
    """What every thread reads and writes."""

    q: Float32Array
    """Queries times the scale [total_q, num_q_heads, head_dim]."""
    keys: npt.NDArray[Any]
    """The key cache, flat."""
    values: npt.NDArray[Any]
    strides: Int64Array
    """From one block, slot, KV head to the next, in elements: of the keys, then of the values."""
    block_table: Int32Array
    first: Int32Array
    """By query: the first key it sees."""
    last: Int32Array
    """By query: the one past the last."""
    sinks: Float32Array
    """By query head, in base 2; -inf without sinks."""
    out: Float32Array
    """[total_q, num_q_heads, head_dim]"""
    lse: Float32Array
    """[total_q, num_q_heads], natural log."""
    parts: Float32Array
    """What pieces of a split sequence give, as `out`, a row per piece and query."""
    part_lse: Float32Array


class Settings(NamedTuple):
    """Plain numbers."""

    num_kv_heads: int
    block_size: int
    tile_tokens: int
    v_scale: float
    softcap: float


class Workspace(NamedTuple):
    """One thread's memory."""

    q: Float32Array
    """Padded query rows, flat."""
    acc: Float32Array
    """Padded sums of weighted values, flat."""
    scores: Float32Array
    rows: Float32Array
    """Maximum, sum and factor of each row, one after the other, flat."""
    limits: Int32Array
    """The first key that each row sees, and the one past the last [2, rows]."""
    places: Int64Array
    """Where tokens of this tile and the next begin, in the keys and in the values [2, 2 * tile tokens]."""


@jit
def _locate(places: Any, operands: Any, settings: Any, sequence: Any, position: Any, end: Any) -> None:
    """Fill `places` with the tokens from `position` on; the last token before `end` stands for those beyond."""
    table, s = operands.block_table[sequence], operands.strides
    block, slot = position // settings.block_size, position % settings.block_size
    for i in range(places.shape[1]):
        entry = np.int64(table[block])
        places[0, i] = entry * s[0] + slot * s[1]
        places[1, i] = entry * s[3] + slot * s[4]
        if position + i + 1 < end:
            slot += 1
            if slot == settings.block_size:
                block, slot = block + 1, 0


@jit
def _begin(item: Any, operands: Any, space: Any, group: Any) -> None:
    """Copy the item's query rows, and start their softmax: with the sink, in the first piece of a sequence."""
    head_dim = operands.q.shape[2]
    width = -(-head_dim // LANES) * LANES
    tail = width - LANES
    num_rows = (item.head_stop - item.head_start) * (item.q_stop - item.q_start) * group
    r = 0
    for head in range(item.head_start, item.head_stop):
        for query in range(item.q_start, item.q_stop):
            for member in range(head * group, (head + 1) * group):
                row, source = space.q[r * width : (r + 1) * width], operands.q[query, member]
                total = space.acc[r * width : (r + 1) * width]
                for d in range(width):
                    e = d if d < tail else d - width + head_dim
                    row[d] = source[e] if d < tail or e >= tail else _ZERO  # not what the vector before has counted
                    total[d] = _ZERO
                space.rows[r] = operands.sinks[member] if item.piece == 0 else _NEVER
                space.rows[num_rows + r] = _ONE  # counts for nothing beside a maximum of -inf
                space.limits[0, r], space.limits[1, r] = operands.first[query], operands.last[query]
                r += 1


@jit
def _attend(item: Any, operands: Any, settings: Any, space: Any, head_rows: Any, score: Any, weigh: Any) -> None:
    """Run the item's rows over its keys, tile by tile."""
    head_dim = operands.q.shape[2]
    width = -(-head_dim // LANES) * LANES
    num_heads = item.head_stop - item.head_start
    num_rows = num_heads * head_rows
    row_max, row_sum, rescale = space.rows[:num_rows], space.rows[num_rows : 2 * num_rows], space.rows[2 * num_rows : 3 * num_rows]
    first, last = space.limits[0, :num_rows], space.limits[1, :num_rows]
    latest, earliest = first[0], last[0]
    for r in range(1, num_rows):
        latest, earliest = max(latest, first[r]), min(earliest, last[r])
    key_stride, value_stride = operands.strides[2], operands.strides[5]
    key_start, value_start = item.head_start * key_stride, item.head_start * value_stride
    tile = settings.tile_tokens
    for position in range(item.kv_start, item.kv_stop, tile):
        _locate(space.places, operands, settings, item.sequence, position, item.kv_stop)
        present = min(tile, item.kv_stop - position)
        size = -(-present // STEP) * STEP
        scores = space.scores[: size * num_rows].reshape(size, num_rows)
        keys_at, values_at = space.places[0], space.places[1]
        score(
            space.q,
            operands.keys,
            key_start,
            keys_at[:size],
            keys_at[tile:],
            key_stride,
            num_heads,
            head_rows,
            head_dim,
            space.scores,
        )
        if settings.softcap > 0:
            cap(scores, settings.softcap)
        if size > present or position < latest or position + size > earliest:
            hide(scores, position, position + present, first, last)
        if soften(scores, row_max, row_sum, rescale):
            for r in range(num_rows):
                if rescale[r] != _ONE:
                    row, factor = space.acc[r * width : (r + 1) * width], rescale[r]
                    for d in range(width):
                        row[d] *= factor
        weigh(
            space.acc,
            operands.values,
            value_start,
            values_at[:size],
            values_at[tile:],
            value_stride,
            num_heads,
            head_rows,
            head_dim,
            space.scores,
        )


@jit
def _finish(item: Any, operands: Any, settings: Any, space: Any, group: Any) -> None:
    """Write the item's rows: to the result, or to the partial results if the sequence is split."""
    head_dim = operands.q.shape[2]
    width = -(-head_dim // LANES) * LANES
    tail = width - LANES
    whole = item.num_pieces == 1
    out, lse = (operands.out, operands.lse) if whole else (operands.parts, operands.part_lse)
    num_queries = item.q_stop - item.q_start
    start = item.q_start if whole else item.part + item.piece * num_queries
    num_rows = (item.head_stop - item.head_start) * num_queries * group
    r = 0
    for head in range(item.head_start, item.head_stop):
        for i in range(start, start + num_queries):
            for member in range(head * group, (head + 1) * group):
                total = space.rows[num_rows + r]
                factor = np.float32(settings.v_scale) / total
                row, target = space.acc[r * width : (r + 1) * width], out[i, member]
                for d in range(tail):
                    target[d] = row[d] * factor
                for d in range(LANES):
                    target[head_dim - LANES + d] = row[tail + d] * factor
                lse[i, member] = (space.rows[r] + math.log2(total)) * _LN2
                r += 1


@jit
def _merge(item: Any, operands: Any, group: Any) -> None:
    """Merge the pieces of the item's queries and heads."""
    num_queries = item.q_stop - item.q_start
    for i in range(num_queries):
        for member in range(item.head_start * group, item.head_stop * group):
            highest = _NEVER
            for piece in range(item.num_pieces):
                highest = max(highest, operands.part_lse[item.part + piece * num_queries + i, member])
            target = operands.out[item.q_start + i, member]
            target[:] = _ZERO
            total = _ZERO
            for piece in range(item.num_pieces):
                part = item.part + piece * num_queries + i
                if operands.part_lse[part, member] != _NEVER:
                    weight = np.float32(math.exp(operands.part_lse[part, member] - highest))
                    total += weight
                    source = operands.parts[part, member]
                    for d in range(target.size):
                        target[d] += weight * source[d]
            operands.lse[item.q_start + i, member] = highest
            if total != _ZERO:
                operands.lse[item.q_start + i, member] = highest + math.log(total)
                for d in range(target.size):
                    target[d] /= total


def _work(items: Any, progress: Any, operands: Any, settings: Any, space: Any, score: Any, weigh: Any) -> None:
    """Take items until none is left. `progress`: items taken, then pieces left by ticket."""
    group = operands.q.shape[1] // settings.num_kv_heads
    while True:
        i = fetch_add(progress, 0, 1)
        if i >= items.size:
            break
        item = items[i]
        _begin(item, operands, space, group)
        _attend(item, operands, settings, space, group * (item.q_stop - item.q_start), score, weigh)
        _finish(item, operands, settings, space, group)
        if item.num_pieces > 1 and fetch_add(progress, 1 + item.ticket, -1) == 1:
            _merge(item, operands, group)


@cache
def worker() -> Any:
    """Return `_work` as an argument for compiled code: what a parallel loop calls outright, numba compiles several times over."""
    f32, i32, i64, f64, u8 = numba.float32, numba.int32, numba.int64, numba.float64, numba.uint8
    arrays = f32[:, :, ::1], u8[::1], u8[::1], i64[::1], i32[:, ::1], i32[::1], i32[::1], f32[::1]
    results = f32[:, :, ::1], f32[:, ::1], f32[:, :, ::1], f32[:, ::1]
    operands = numba.types.NamedTuple([*arrays, *results], Operands)
    settings = numba.types.NamedTuple([i64, i64, i64, f64, f64], Settings)
    space = numba.types.NamedTuple([f32[::1], f32[::1], f32[::1], f32[::1], i32[:, ::1], i64[:, ::1]], Workspace)
    return native(_work, numba.void(numba.from_dtype(ITEM)[::1], i64[::1], operands, settings, space, TILE_KERNEL, TILE_KERNEL))
