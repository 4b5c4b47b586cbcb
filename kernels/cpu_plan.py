"""How one attention call is cut into work for threads."""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pagedkv.arrays import Int32Array, Int64Array
from pagedkv.jit import jit
from pagedkv.kernels.contract import AttentionCall

ROWS = 64
"""Rows of queries that an item aims at: their sums stay in the first-level cache."""
TILE_BYTES = 64 * 1024
"""Keys of a tile. This tile and the next, keys and values, are a part of a second-level cache."""
FEWEST_TILE_TOKENS, MOST_TILE_TOKENS = 8, 64
ITEMS_PER_THREAD = 4
"""So that a thread which is held up leaves its share to others."""
PIECE_TOKENS = 256
"""Fewest tokens in a piece of a sequence unless the caller asks for more pieces: merging costs about as much as 4."""

_FIELDS = "sequence q_start q_stop head_start head_stop kv_start kv_stop piece num_pieces part ticket"
ITEM = np.dtype([(name, np.int64) for name in _FIELDS.split()])
"""An item: queries q_start to q_stop of a sequence, KV heads head_start to head_stop, keys kv_start to kv_stop, which are piece
`piece` of `num_pieces`. Pieces write rows part + piece * queries onwards of the partial results; `ticket` is where the pieces
that are left are counted."""


class Plan(NamedTuple):
    """The items, and the memory they need."""

    items: npt.NDArray[Any]
    """ITEM, the largest first."""
    pieces_left: Int64Array
    """By ticket: pieces that are not done."""
    first: Int32Array
    """By query: the first key it sees."""
    last: Int32Array
    """By query: the one past the last; not above `first` if it sees none."""
    num_part_rows: int
    """Rows of partial results."""
    num_rows: int
    """Rows of queries in the largest item."""
    tile_tokens: int
    """Tokens of a tile, a multiple of 4."""


def plan(call: AttentionCall, num_threads: int) -> Plan:
    """Cut `call` for `num_threads` threads. O(queries + items)."""
    kv_heads, right = int(call.k_cache.shape[2]), 0 if call.causal else call.window_size[1]
    first, last = _visible(call.cu_seqlens_q, call.cache_seqlens, call.window_size[0], right)
    tiles, longest = _query_tiles(call.cu_seqlens_q, first, last, max(1, ROWS // call.group_size))
    most_heads = min(kv_heads, max(1, ROWS // (call.group_size * longest)))
    heads, num_part_rows = _cut_keys(tiles, kv_heads, most_heads, call.num_splits, num_threads)
    items, pieces_left = _items(tiles, kv_heads, heads)
    if num_threads > 1:
        size = (items["kv_stop"] - items["kv_start"]) * (items["q_stop"] - items["q_start"])
        items = items[np.argsort(-size, kind="stable")]
    token_bytes = heads * int(call.k_cache.shape[3]) * call.k_cache.itemsize
    tile_tokens = min(max(TILE_BYTES // token_bytes // 4 * 4, FEWEST_TILE_TOKENS), MOST_TILE_TOKENS)
    return Plan(items, pieces_left, first, last, num_part_rows, heads * call.group_size * longest, tile_tokens)


@jit
def _visible(cu_seqlens_q: Int32Array, cache_seqlens: Int32Array, left: int, right: int) -> tuple[Int32Array, Int32Array]:
    """Return, by query, the first key it sees and the one past the last."""
    first, last = np.empty(cu_seqlens_q[-1], np.int32), np.empty(cu_seqlens_q[-1], np.int32)
    for sequence in range(cache_seqlens.size):
        seqlen, stop = cache_seqlens[sequence], cu_seqlens_q[sequence + 1]
        for query in range(cu_seqlens_q[sequence], stop):
            position = seqlen - stop + query
            first[query] = max(position - left, 0) if left >= 0 else 0
            last[query] = min(max(position + right + 1, 0), seqlen) if right >= 0 else seqlen
    return first, last


@jit
def _query_tiles(cu_seqlens_q: Int32Array, first: Int32Array, last: Int32Array, most: int) -> tuple[npt.NDArray[Any], int]:
    """Return items of at most `most` queries of one sequence, all heads and visible keys, and the most queries in one."""
    num_tiles, longest = 0, 1
    for sequence in range(cu_seqlens_q.size - 1):
        num_queries = cu_seqlens_q[sequence + 1] - cu_seqlens_q[sequence]
        num_tiles += -(-num_queries // most)
        longest = max(longest, min(most, num_queries))
    tiles = np.zeros(num_tiles, ITEM)
    i = 0
    for sequence in range(cu_seqlens_q.size - 1):
        for q_start in range(cu_seqlens_q[sequence], cu_seqlens_q[sequence + 1], most):
            tile = tiles[i]
            tile.sequence, tile.q_start, tile.q_stop = sequence, q_start, min(q_start + most, cu_seqlens_q[sequence + 1])
            for query in range(tile.q_start, tile.q_stop):
                if first[query] < last[query]:
                    tile.kv_start = min(tile.kv_start, first[query]) if tile.kv_stop else first[query]
                    tile.kv_stop = max(tile.kv_stop, last[query])
            i += 1
    return tiles, longest


@jit
def _cut_keys(tiles: npt.NDArray[Any], kv_heads: int, heads: int, num_splits: int, num_threads: int) -> tuple[int, int]:
    """Set into how many pieces the keys of each tile are split. Returns the KV heads of an item and num_part_rows."""
    share = 0
    for i in range(tiles.size):
        share += tiles[i].kv_stop - tiles[i].kv_start
    share = max(share * -(-kv_heads // heads) // (ITEMS_PER_THREAD * num_threads), PIECE_TOKENS)
    num_pieces = num_rows = 0
    for i in range(tiles.size):
        tile = tiles[i]
        tokens = tile.kv_stop - tile.kv_start
        if num_splits > 0:
            tile.num_pieces = min(max(tokens, 1), num_splits)
        else:
            tile.num_pieces = max(-(-tokens // share), 1) if num_threads > 1 else 1
        tile.part = num_rows
        num_pieces += tile.num_pieces
        num_rows += tile.num_pieces * (tile.q_stop - tile.q_start) if tile.num_pieces > 1 else 0
    while heads > 1 and num_pieces * -(-kv_heads // heads) < num_threads:
        heads = (heads + 1) // 2
    return heads, num_rows


@jit
def _items(tiles: npt.NDArray[Any], kv_heads: int, heads: int) -> tuple[npt.NDArray[Any], Int64Array]:
    """Return an item for each piece of each tile and group of `heads` KV heads, and how many pieces have the same ticket."""
    head_groups, num_items = -(-kv_heads // heads), 0
    for i in range(tiles.size):
        num_items += tiles[i].num_pieces * head_groups
    items, pieces_left = np.empty(num_items, ITEM), np.empty(tiles.size * head_groups, np.int64)
    n = 0
    for ticket in range(pieces_left.size):
        tile, head = tiles[ticket // head_groups], ticket % head_groups * heads
        pieces_left[ticket] = tile.num_pieces
        tokens = tile.kv_stop - tile.kv_start
        for piece in range(tile.num_pieces):
            items[n] = tile
            item = items[n]
            item.head_start, item.head_stop = head, min(head + heads, kv_heads)
            item.kv_start = tile.kv_start + tokens * piece // tile.num_pieces
            item.kv_stop = tile.kv_start + tokens * (piece + 1) // tile.num_pieces
            item.piece, item.ticket = piece, ticket
            n += 1
    return items, pieces_left
