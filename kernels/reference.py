"""The definition of correct: gather the keys and values, then softmax attention in float64. Slow and short."""

import numpy as np

from pagedkv.arrays import Float64Array
from pagedkv.kernels.contract import AttentionCall, widened


def attend(call: AttentionCall) -> tuple[Float64Array, Float64Array]:
    """Attend and return (out [total_q, num_q_heads, head_dim], lse [total_q, num_q_heads]), natural log.

    A query that sees no key has output 0, and an LSE of -inf or of its sink.
    """
    total_q, num_heads, _ = call.q.shape
    queries = widened(call.q).astype(np.float64)
    out, lse = np.zeros(call.q.shape), np.full((total_q, num_heads), -np.inf)
    if call.sinks is not None:
        lse[:] = call.sinks
    for sequence, seqlen in enumerate(call.cache_seqlens):
        start, stop = call.cu_seqlens_q[sequence : sequence + 2]
        seen = _visible(call, int(seqlen), int(stop - start))
        first = int(np.flatnonzero(seen.any(0))[0]) if seen.any() else int(seqlen)
        tokens = np.arange(first, seqlen)  # a sliding window may have given the blocks before it back
        blocks, offsets = call.block_table[sequence, tokens // call.block_size], tokens % call.block_size
        keys, values = (widened(cache[blocks, offsets]).astype(np.float64) for cache in (call.k_cache, call.v_cache))
        for head in range(num_heads):
            kv_head = head // call.group_size
            scores = queries[start:stop, head] @ keys[:, kv_head].T * call.softmax_scale
            if call.softcap:
                scores = call.softcap * np.tanh(scores / call.softcap)
            scores = np.where(seen[:, first:], scores, -np.inf)
            logits = scores if call.sinks is None else np.column_stack([scores, np.full(len(scores), call.sinks[head], np.float64)])
            lse[start:stop, head] = np.logaddexp.reduce(logits, axis=1, initial=-np.inf)
            rows = np.flatnonzero(seen.any(1))
            weights = np.exp(scores[rows] - lse[start:stop, head][rows, None])
            out[start:stop, head][rows] = weights @ values[:, kv_head] * call.v_scale
    return out, lse


def _visible(call: AttentionCall, seqlen: int, num_queries: int) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    """Return which query sees which key [num_queries, seqlen]."""
    position = np.arange(seqlen - num_queries, seqlen)[:, None]
    key = np.arange(seqlen)[None, :]
    left, right = call.window_size
    seen = (key <= position) if call.causal else np.full((num_queries, seqlen), fill_value=True)
    if left >= 0:
        seen &= key >= position - left
    if right >= 0:
        seen &= key <= position + right
    return seen
