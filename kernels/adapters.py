"""Paged attention under the names that other libraries use: FlashAttention's function, FlashInfer's plan and run, and CSR tables.

FlashInfer says page where this project says block; its names stay as they are, so that code written for it runs.
"""

import math
from typing import Any

import numpy as np

from pagedkv.arrays import Int32Array
from pagedkv.kernels.cache_ops import reshape_and_cache, slot_mapping_for
from pagedkv.kernels.contract import AttentionOptions, counting, device_type, fetched, host_array, integers, is_torch, need
from pagedkv.kernels.dispatch import paged_attention

_IDLE_INIT = ("use_tensor_cores",)
_IDLE_PLAN = tuple(
    "q_data_type kv_data_type data_type rope_scale rope_theta non_blocking fixed_split_size disable_split_kv".split()
)
_IDLE_RUN = ("enable_pdl",)
"""Keywords of FlashInfer that change no result here: how it computes, the types that the arrays have anyway, the RoPE that
`pos_encoding_mode` turns off."""


def block_table_to_csr(block_table: Any, cache_seqlens: Any, block_size: int) -> tuple[Int32Array, Int32Array, Int32Array]:
    """Return (indptr [batch + 1], indices [blocks], last_page_len [batch]) of a table [batch, max_blocks]. O(entries).

    A sequence without keys has no blocks and a last_page_len of 0. What lies on a GPU is fetched from there.

    Raises:
        KernelError: If a sequence is longer than its table.
    """
    table, seqlens = (np.asarray(host_array(fetched(array)), np.int32) for array in (block_table, cache_seqlens))
    fits = block_size > 0 and table.ndim == 2 and seqlens.shape == table.shape[:1]
    need(fits, f"shapes {table.shape} and {seqlens.shape}: need block_table [batch, max_blocks], cache_seqlens [batch]")
    counts = -(-seqlens // block_size)
    room = table.shape[1] * block_size
    within = seqlens.min(initial=0) >= 0 and seqlens.max(initial=0) <= room
    need(within, f"cache_seqlens {seqlens.tolist()}: the table holds 0 to {room}")
    indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    used = np.arange(table.shape[1]) < counts[:, None]
    return indptr, table[used], (seqlens - np.maximum(counts - 1, 0) * block_size).astype(np.int32)


def csr_to_block_table(indptr: Any, indices: Any, last_page_len: Any, block_size: int) -> tuple[Int32Array, Int32Array]:
    """Return (block_table [batch, max_blocks] padded with -1, cache_seqlens [batch]): back from `block_table_to_csr`. O(entries).

    What lies on a GPU is fetched from there.

    Raises:
        KernelError: If the arrays do not fit together.
    """
    starts, blocks, last = (np.asarray(host_array(fetched(array)), np.int32) for array in (indptr, indices, last_page_len))
    need(starts.size == last.size + 1, f"indptr has {starts.size} entries: {last.size} sequences need {last.size + 1}")
    counts = np.diff(starts)
    rises = starts[0] == 0 and starts[-1] == blocks.size and counts.min(initial=0) >= 0
    need(rises, f"indptr {starts.tolist()}: needs to rise from 0 to the number of indices, {blocks.size}")
    ends = (last <= block_size) & (last >= (counts > 0))
    need(ends.all(), f"last_page_len {last.tolist()}: needs 1 to {block_size}, 0 where there are no blocks")
    used = np.arange(counts.max(initial=0)) < counts[:, None]
    table = np.full(used.shape, -1, np.int32)
    table[used] = blocks
    return table, np.where(counts > 0, (counts - 1) * block_size + last, 0).astype(np.int32)


def flash_attn_with_kvcache(
    q: Any,
    k_cache: Any,
    v_cache: Any,
    k: Any = None,
    v: Any = None,
    rotary_cos: Any = None,
    rotary_sin: Any = None,
    cache_seqlens: Any = None,
    cache_batch_idx: Any = None,
    cache_leftpad: Any = None,
    block_table: Any = None,
    softmax_scale: float | None = None,
    causal: bool = False,  # noqa: FBT001, FBT002  # FlashAttention's signature
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,  # noqa: FBT001, FBT002
    alibi_slopes: Any = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,  # noqa: FBT001, FBT002
    *,
    backend: str = "auto",
) -> Any:
    """Attend to a cache, after appending `k` and `v` to it if given. FlashAttention's function of this name.

    Source: flash_attn/flash_attn_interface.py.

    Args:
        q: Queries [batch, seqlen_q, num_q_heads, head_dim]: the newest tokens, those of `k` if that is given.
        k_cache: Keys [num_blocks, block_size, num_kv_heads, head_dim]; without a block table [cache rows, max seqlen, ...].
        v_cache: Values, as `k_cache`.
        k: New keys [batch, seqlen_new, num_kv_heads, head_dim], written to the cache at `cache_seqlens`.
        v: New values.
        rotary_cos: Not supported; embed positions before.
        rotary_sin: Not supported.
        cache_seqlens: Keys in the cache before `k`, [batch] or one number; None: without a block table the cache is full.
        cache_batch_idx: Without a block table: the cache row of each sequence [batch]; None: row i.
        cache_leftpad: Not supported.
        block_table: [batch, max_blocks]; None: row i of the cache is sequence i.
        softmax_scale: Factor of the scores; None is head_dim ** -0.5.
        causal: Query j of n sees keys up to seqlen - n + j; else all.
        window_size: (left, right); -1 is all.
        softcap: As `paged_attention`.
        rotary_interleaved: Without effect.
        alibi_slopes: Not supported.
        num_splits: As `paged_attention`.
        return_softmax_lse: Whether to return the log-sum-exp too.
        backend: As `paged_attention`.

    Returns:
        out like `q`, or (out, lse [batch, num_q_heads, seqlen_q]).

    Raises:
        KernelError: For what is not supported, or does not fit together.
    """
    asked = {"rotary_cos": rotary_cos, "rotary_sin": rotary_sin, "cache_leftpad": cache_leftpad, "alibi_slopes": alibi_slopes}
    unsupported = [name for name, value in asked.items() if value is not None]
    need(not unsupported, f"{', '.join(unsupported)}: not supported; embed positions in q and k first, and leave these out")
    need(len(q.shape) == 4, f"q has shape {tuple(q.shape)}: needs [batch, seqlen_q, num_q_heads, head_dim]")
    batch, seqlen_q, num_heads, head_dim = (int(size) for size in q.shape)
    block_size = int(k_cache.shape[1])
    if block_table is None:
        rows = counting(batch, q) if cache_batch_idx is None else cache_batch_idx
        block_table = integers(rows, q).reshape(-1, 1)
        cache_seqlens = block_size if cache_seqlens is None else cache_seqlens
    else:
        need(cache_batch_idx is None, "cache_batch_idx and block_table both say where a sequence lies: leave one out")
        need(cache_seqlens is not None, "cache_seqlens is None: a block table needs the lengths")
    seqlens = integers(cache_seqlens if np.ndim(cache_seqlens) else 0 * counting(batch, q) + cache_seqlens, q)
    if k is not None:
        seqlens = _append(k, v, k_cache, v_cache, seqlens, block_table)
    options: dict[str, Any] = {"softmax_scale": softmax_scale, "softcap": softcap, "num_splits": num_splits, "backend": backend}
    if seqlen_q > 1:
        options |= {"cu_seqlens_q": counting(batch + 1, q) * seqlen_q, "causal": causal}
    packed = q.reshape(batch * seqlen_q, num_heads, head_dim)
    out, lse = paged_attention(packed, k_cache, v_cache, block_table, seqlens, window_size=window_size, return_lse=True, **options)
    out = out.reshape(q.shape)
    return (out, lse.reshape(batch, seqlen_q, num_heads).swapaxes(1, 2)) if return_softmax_lse else out


def _append(k: Any, v: Any, k_cache: Any, v_cache: Any, seqlens: Any, block_table: Any) -> Any:
    """Write new keys and values behind `seqlens` and return the lengths with them."""
    alike = v is not None and len(k.shape) == 4 and tuple(k.shape) == tuple(v.shape)
    need(alike, "k and v: need [batch, seqlen_new, num_kv_heads, head_dim] each")
    batch, num_new, block_size = int(k.shape[0]), int(k.shape[1]), int(k_cache.shape[1])
    if batch and device_type(seqlens) == "cpu":  # on a GPU the host would wait for it
        longest, room = int(seqlens.max()) + num_new, int(block_table.shape[1]) * block_size
        need(longest <= room, f"{num_new} new tokens make {longest}: the cache has room for {room} per sequence")
    sequences = counting(batch * num_new, seqlens) // max(num_new, 1)
    positions = seqlens.reshape(-1, 1) + counting(num_new, seqlens)
    slots = slot_mapping_for(block_table, sequences, positions.reshape(-1), block_size)
    reshape_and_cache(k.reshape(-1, *k.shape[2:]), v.reshape(-1, *v.shape[2:]), k_cache, v_cache, slots)
    return seqlens + num_new


class BatchDecodeWithPagedKVCacheWrapper:
    """FlashInfer's class of this name: `plan` once per step, `run` once per layer.

    Source: flashinfer/decode.py.
    """

    def __init__(self, float_workspace_buffer: Any = None, kv_layout: str = "NHD", *, backend: str = "auto", **more: Any) -> None:
        """Make a wrapper. The workspace is not needed, nor is `use_tensor_cores`.

        Raises:
            KernelError: For other keywords. (A CUDA graph would go on reading the tables of the plan that it was captured with.)
        """
        _refuse("the wrapper", more, _IDLE_INIT, "kv_layout and backend")
        self._kv_layout, self._backend = kv_layout, backend
        self._shape: tuple[int, int, int, int] | None = None

    def plan(
        self,
        indptr: Any,
        indices: Any,
        last_page_len: Any,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        pos_encoding_mode: str = "NONE",
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        sm_scale: float | None = None,
        **more: Any,
    ) -> None:
        """Take the tables of a step. Types are those of the arrays that `run` gets; `q_data_type` and the like are not needed.

        Raises:
            KernelError: If the tables do not fit together, or something is asked that this does not do.
        """
        _refuse("plan", more, _IDLE_PLAN, "window_left, logits_soft_cap and sm_scale")
        need(pos_encoding_mode == "NONE", f"pos_encoding_mode is {pos_encoding_mode!r}: needs 'NONE'; encode q and k first")
        self._shape = num_qo_heads, num_kv_heads, head_dim, page_size
        self._tables = csr_to_block_table(indptr, indices, last_page_len, page_size)
        self._options: AttentionOptions = {"window_size": (window_left, -1), "softcap": logits_soft_cap or 0.0}
        self._scale = head_dim**-0.5 if sm_scale is None else sm_scale
        self._on_device: dict[str, tuple[Any, Any]] = {}

    begin_forward = plan

    def run(
        self,
        q: Any,
        paged_kv_cache: Any,
        *,
        q_scale: float | None = None,
        k_scale: float | None = None,
        v_scale: float | None = None,
        out: Any = None,
        return_lse: bool = False,
        window_left: int | None = None,
        sinks: Any = None,
        **more: Any,
    ) -> Any:
        """Attend from `q` [batch, num_qo_heads, head_dim].

        Args:
            q: Queries.
            paged_kv_cache: (keys, values), or both in one [num_pages, 2, page_size, num_kv_heads, head_dim] (HND accordingly).
            q_scale: Factor of the queries.
            k_scale: Factor of the keys.
            v_scale: Factor of the values.
            out: Where the result goes.
            return_lse: Whether to return the log-sum-exp too.
            window_left: In place of the planned one.
            sinks: As `paged_attention`.
            **more: `enable_pdl` has no effect.

        Returns:
            out, or (out, lse [batch, num_qo_heads]): the log-sum-exp to base 2, as FlashInfer's.

        Raises:
            KernelError: If nothing was planned, or for something else; for keywords that would change the result.
        """
        _refuse("run", more, _IDLE_RUN, "q_scale, k_scale, v_scale, out, return_lse, window_left and sinks")
        need(self._shape is not None, "run before plan: needs the tables of the step first")
        separate = isinstance(paged_kv_cache, tuple | list)
        k_cache, v_cache = paged_kv_cache if separate else (paged_kv_cache[:, 0], paged_kv_cache[:, 1])
        head, place = (2, 1) if self._kv_layout == "NHD" else (1, 2)
        shape = (int(q.shape[1]), int(k_cache.shape[head]), int(k_cache.shape[3]), int(k_cache.shape[place]))
        need(shape == self._shape, f"heads, KV heads, head_dim, page_size are {shape}: planned for {self._shape}")
        options: AttentionOptions = {
            **self._options,
            "softmax_scale": self._scale * (1.0 if q_scale is None else q_scale),
            "k_scale": 1.0 if k_scale is None else k_scale,
            "v_scale": 1.0 if v_scale is None else v_scale,
            "sinks": sinks,
            "kv_layout": self._kv_layout,
        }
        if window_left is not None:
            options["window_size"] = (window_left, -1)
        tables = self._tables_for(q)
        result, lse = paged_attention(q, k_cache, v_cache, *tables, out=out, return_lse=True, backend=self._backend, **options)
        return (result, lse / math.log(2)) if return_lse else result

    def _tables_for(self, q: Any) -> tuple[Any, Any]:
        """Return the tables where `q` is, moved there once per plan."""
        if not is_torch(q) or q.device.type == "cpu":
            return self._tables
        if str(q.device) not in self._on_device:
            table, seqlens = (integers(numbers, q) for numbers in self._tables)
            self._on_device[str(q.device)] = table, seqlens
        return self._on_device[str(q.device)]


def _refuse(call: str, more: dict[str, Any], idle: tuple[str, ...], supported: str) -> None:
    """Raise KernelError for keywords that would change the result and are not served; None and False ask for nothing."""
    refused = [name for name, value in more.items() if name not in idle and value is not None and value is not False]
    taken = f"{call} supports {supported}; without effect it takes {', '.join(idle)}"
    need(not refused, f"{', '.join(refused)}: not supported. {taken}")
