"""The readable GPU kernel: paged decode attention in numba.cuda, to learn from and to check the fast one against.

One thread block's journey, for one sequence (row), one KV head and one piece of the keys:

1.  The query heads that share the KV head are copied to shared memory, times the softmax scale.
2.  For a tile of tokens, the first threads look up where each lives: token t is in block `block_table[row, t // block_size]`, at
    slot t % block_size. This is all that paging adds to attention.
3.  All threads copy the tile's K and V into shared memory; neighbouring threads read neighbouring 8 bytes, so that the memory
    system sees whole cache lines. Each byte of the cache is read once, whatever the number of query heads.
4.  A score is a dot product of a query head and a token; every thread computes a few whole ones.
5.  The online softmax: with a new largest score m', everything summed so far is scaled by exp(m - m').
6.  Every thread owns a few output elements and adds the tile's values to them, weighted.
7.  After the last tile the sums are divided, and written with the log of the denominator; `merge_kernel` joins the pieces.

No warp shuffles and no atomics: numba's simulator (NUMBA_ENABLE_CUDASIM=1) runs this on any machine. No asynchronous copies either:
the loads of the next tile wait for the arithmetic of this one, and other thread blocks on the multiprocessor fill the gap.
"""
# ruff: noqa: PLR0915  the journey is told in one piece
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

import math
from functools import cache
from typing import Any

import numpy as np
from numba import cuda as numba_cuda

from pagedkv.kernels.contract import need

cuda: Any = numba_cuda  # which has no types

THREADS = 128
"""Threads of a block."""

TILE_BYTES = 16384
"""Of K, and of V, in shared memory, at most."""

SHARED_BYTES = 48 * 1024 - 256
"""Shared memory that needs no opt-in, less what gaps between arrays may take."""

FASTMATH = False
"""Infinities are meant: they mark what is not there yet."""

ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}


def tile_tokens(head_dim: int, group: int, itemsize: int) -> int:
    """Return the tokens of a tile: as many as shared memory holds beside the queries and the scores.

    Raises:
        KernelError: If it holds none.
    """
    words = head_dim * itemsize // 8
    left = SHARED_BYTES - group * (4 * head_dim + 8)  # queries; row_max and shrink
    tile = min(64, max(8, TILE_BYTES // (8 * words)), left // (16 * (words + 1) + 4 * group + 12))
    need(
        tile > 0,
        f"{group} query heads of {head_dim} per KV head: the readable kernel keeps them in 48 KiB of shared memory",
    )
    return tile


@cache
def decode_kernel(head_dim: int, group: int, kind: str, threads: int = THREADS) -> Any:
    """Return the kernel for a shape: array sizes in shared memory and in registers must be constants.

    Args:
        head_dim: Elements of a head, a multiple of those in 8 bytes.
        group: Query heads per KV head.
        kind: Type of the cache: "bfloat16", "float16" or "float32".
        threads: Threads of a block.

    Raises:
        KernelError: If that does not fit.
    """
    per_word = 8 // ITEMSIZE[kind]
    words = head_dim // per_word
    tile = tile_tokens(head_dim, group, ITEMSIZE[kind])
    padded = words + 1  # an odd stride spreads a column of the tile over all banks of shared memory
    owned = -(-group * words // threads)  # output words of a thread
    k_shape, q_shape, score_shape, acc_shape = (tile, padded), (group, head_dim), (group, tile), (owned, per_word)

    if kind == "bfloat16":  # the upper half of a float32

        @cuda.jit(device=True)
        def element(word, i):
            return np.uint32(((word >> (16 * i)) & 0xFFFF) << 16).view(np.float32)
    elif kind == "float16":  # sign, exponent and fraction moved to where float32 has them; the exponent's bias differs by 112

        @cuda.jit(device=True)
        def element(word, i):
            half = (word >> (16 * i)) & 0xFFFF
            return np.uint32((half & 0x8000) << 16 | (half & 0x7FFF) << 13).view(np.float32) * np.float32(2.0**112)
    else:

        @cuda.jit(device=True)
        def element(word, i):
            return np.uint32((word >> (32 * i)) & 0xFFFFFFFF).view(np.float32)

    @cuda.jit(fastmath=FASTMATH)
    def decode(q, k_words, v_words, block_table, cache_seqlens, sinks, has_sinks, out, lse, scale, v_scale, softcap, window_left):
        """Grid: (batch * num_kv_heads, num_splits). k_words and v_words [num_blocks, block_size, num_kv_heads, words] are int64."""
        block_size, num_kv_heads = k_words.shape[1], k_words.shape[2]
        row, kv_head, split = cuda.blockIdx.x // num_kv_heads, cuda.blockIdx.x % num_kv_heads, cuda.blockIdx.y
        me = cuda.threadIdx.x

        q_shared = cuda.shared.array(q_shape, np.float32)
        k_tile = cuda.shared.array(k_shape, np.int64)
        v_tile = cuda.shared.array(k_shape, np.int64)
        scores = cuda.shared.array(score_shape, np.float32)
        blocks = cuda.shared.array(tile, np.int64)  # int64: block times block size times heads times words passes 2**31
        slots = cuda.shared.array(tile, np.int32)
        row_max = cuda.shared.array(group, np.float32)
        shrink = cuda.shared.array(group, np.float32)
        acc = cuda.local.array(acc_shape, np.float32)
        row_sum = cuda.local.array(owned, np.float32)

        # 1. Queries, and nothing summed yet. A sink is a key without a value, counted by the first piece.
        for i in range(me, group * head_dim, threads):
            q_shared[i // head_dim, i % head_dim] = np.float32(q[row, kv_head * group + i // head_dim, i % head_dim]) * scale
        sink_here = has_sinks and split == 0
        for head in range(me, group, threads):
            row_max[head] = sinks[kv_head * group + head] if sink_here else np.float32(-math.inf)
        for j in range(owned):
            row_sum[j] = np.float32(1.0 if sink_here else 0.0)
            for i in range(per_word):
                acc[j, i] = np.float32(0.0)

        # The keys of this piece: positions begin to end.
        seqlen = cache_seqlens[row]
        first = max(seqlen - 1 - window_left, 0) if window_left >= 0 else 0
        piece = (seqlen - first + cuda.gridDim.y - 1) // cuda.gridDim.y
        begin = first + split * piece
        end = min(begin + piece, seqlen)

        for start in range(begin, end, tile):
            present = min(tile, end - start)

            # 2. From position to place. Only tokens that are there: padding in the table is never looked at.
            for t in range(me, present, threads):
                blocks[t] = block_table[row, (start + t) // block_size]
                slots[t] = (start + t) % block_size
            cuda.syncthreads()  # everyone is done with the tile before, too

            # 3. The tile, 8 bytes at a time.
            for i in range(me, present * words, threads):
                t, w = i // words, i % words
                k_tile[t, w] = k_words[blocks[t], slots[t], kv_head, w]
                v_tile[t, w] = v_words[blocks[t], slots[t], kv_head, w]
            cuda.syncthreads()

            # 4. Scores. Neighbouring threads take neighbouring tokens and read the same query element.
            for i in range(me, group * tile, threads):
                head, t = i // tile, i % tile
                if t < present:
                    score = np.float32(0.0)
                    for w in range(words):
                        word = k_tile[t, w]
                        for j in range(per_word):
                            score += q_shared[head, w * per_word + j] * element(word, j)
                    if softcap > 0.0:
                        score = softcap * math.tanh(score / softcap)
                    scores[head, t] = score
            cuda.syncthreads()

            # 5. The largest score so far, and how much the sums so far shrink.
            for head in range(me, group, threads):
                highest = row_max[head]
                for t in range(present):
                    highest = max(highest, scores[head, t])
                shrink[head] = math.exp(row_max[head] - highest)  # from -inf, at first: 0
                row_max[head] = highest
            cuda.syncthreads()
            for i in range(me, group * tile, threads):
                head, t = i // tile, i % tile
                if t < present:
                    scores[head, t] = math.exp(scores[head, t] - row_max[head])
            cuda.syncthreads()

            # 6. Values. Every owner of an output word sums the weights of its head too, which saves one more pass.
            for j in range(owned):
                mine = me + j * threads
                if mine < group * words:
                    head, w = mine // words, mine % words
                    row_sum[j] *= shrink[head]
                    for i in range(per_word):
                        acc[j, i] *= shrink[head]
                    for t in range(present):
                        weight, word = scores[head, t], v_tile[t, w]
                        row_sum[j] += weight
                        for i in range(per_word):
                            acc[j, i] += weight * element(word, i)

        # 7. Divide and write. Without a single key: 0, and -inf (or the sink).
        cuda.syncthreads()
        for j in range(owned):
            mine = me + j * threads
            if mine < group * words:
                head, w = mine // words, mine % words
                q_head = kv_head * group + head
                factor = v_scale / row_sum[j] if row_sum[j] > 0.0 else np.float32(0.0)
                for i in range(per_word):
                    out[row, q_head, split, w * per_word + i] = acc[j, i] * factor
                if w == 0:
                    lse[row, q_head, split] = row_max[head] + math.log(row_sum[j]) if row_sum[j] > 0.0 else np.float32(-math.inf)

    return decode


@cache
def merge_kernel() -> Any:
    """Return the kernel that merges pieces by their log-sum-exp; grid (batch * num_heads,), a thread per element."""

    @cuda.jit
    def merge(partial, partial_lse, out, lse):
        num_heads, num_splits = partial.shape[1], partial.shape[2]
        row, head = cuda.blockIdx.x // num_heads, cuda.blockIdx.x % num_heads
        highest = np.float32(-math.inf)
        for s in range(num_splits):
            highest = max(highest, partial_lse[row, head, s])
        total = np.float32(0.0)
        if highest > -math.inf:
            for s in range(num_splits):
                total += math.exp(partial_lse[row, head, s] - highest)
        for i in range(cuda.threadIdx.x, partial.shape[3], cuda.blockDim.x):
            summed = np.float32(0.0)
            if total > 0.0:
                for s in range(num_splits):
                    summed += math.exp(partial_lse[row, head, s] - highest) / total * partial[row, head, s, i]
            out[row, head, i] = summed
        if cuda.threadIdx.x == 0:
            lse[row, head] = highest + math.log(total) if total > 0.0 else np.float32(-math.inf)

    return merge
