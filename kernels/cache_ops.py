"""Writing to the cache: new keys and values into their slots, copies of blocks and slots. For numpy and torch on any device."""

import sys
from importlib import import_module
from typing import Any

import numpy as np

from pagedkv.kernels.contract import (
    KernelError,
    check_cache_pair,
    device_type,
    dtype_name,
    host_array,
    integers,
    is_torch,
    need,
    nhd,
)
from pagedkv.kernels.dispatch import why_not
from pagedkv.kernels.gpu_arguments import check_devices, on_device_of


def reshape_and_cache(key: Any, value: Any, k_cache: Any, v_cache: Any, slot_mapping: Any, *, kv_layout: str = "NHD") -> None:
    """Write key and value of each token to its slot, block * block_size + offset. O(tokens).

    On a GPU with Triton this is one launch, which the host does not wait for, and which a CUDA graph can hold.

    Args:
        key: Keys [tokens, num_kv_heads, head_dim], of the cache's type.
        value: Values, as `key`.
        k_cache: Keys' cache, changed in place.
        v_cache: Values' cache, changed in place.
        slot_mapping: By token: its slot; -1 skips the token (padding).
        kv_layout: "NHD" or "HND".

    Raises:
        KernelError: If shapes or types do not fit, or, on the CPU, a slot is outside or given twice. Nothing has changed then.
    """
    check_cache_pair(k_cache, v_cache, kv_layout)
    check_devices(k_cache, {}, {"key": key, "value": value, "v_cache": v_cache}, name_of_q="k_cache")
    caches = [nhd(_bits(cache), kv_layout) for cache in (k_cache, v_cache)]
    num_blocks, block_size, *head = caches[0].shape
    for name, new in (("key", key), ("value", value)):
        shape = tuple(new.shape)
        need(shape == (len(new), *head), f"{name} has shape {shape}: the cache needs [tokens, {head[0]}, {head[1]}]")
        kinds = dtype_name(new), dtype_name(k_cache)
        need(kinds[0] == kinds[1], f"{name} is {kinds[0]}, the cache {kinds[1]}: needs the cache's type; convert it first")
    slots = integers(slot_mapping, k_cache, bits=64)
    same = tuple(slots.shape) == (len(key),) == (len(value),)
    need(same, f"{len(key)} keys, {len(value)} values, slots of shape {tuple(slots.shape)}: need one each")
    key, value = _bits(key), _bits(value)
    on_gpu = device_type(slots) != "cpu"
    if on_gpu and why_not("triton") is None and caches[0].stride(-1) == caches[1].stride(-1) == 1:
        with on_device_of(k_cache):
            import_module("pagedkv.kernels.triton_cache").write_slots(key, value, *caches, slots)
        return
    given = slots >= 0
    if not on_gpu:
        _check_places(host_array(slots)[host_array(given)], num_blocks * block_size, "slot_mapping")
        lowest = int(slots.min()) if len(slots) else -1
        need(lowest >= -1, f"slot_mapping holds {lowest}: needs slots, or -1 to skip a token")
    slots = slots[given]
    for cache, new in zip(caches, (key, value), strict=True):
        cache[slots // block_size, slots % block_size] = new[given]


def copy_blocks(k_cache: Any, v_cache: Any, pairs: Any, *, kv_layout: str = "NHD") -> None:
    """Copy whole blocks, `pairs` [n, 2] of source and destination: a fork that is written to. All are read before any is written.

    Raises:
        KernelError: On the CPU, if a pair is outside the cache or a destination given twice. Nothing has changed then.
    """
    check_cache_pair(k_cache, v_cache, kv_layout)
    moves = _pairs(pairs, k_cache, int(k_cache.shape[0]))
    for cache in (_bits(k_cache), _bits(v_cache)):
        cache[moves[:, 1]] = cache[moves[:, 0]]


def copy_slots(k_cache: Any, v_cache: Any, pairs: Any, *, kv_layout: str = "NHD") -> None:
    """Copy single slots, `pairs` [n, 2] of source and destination, as in an allocator's grant. All are read before any is written.

    Raises:
        KernelError: As `copy_blocks`.
    """
    check_cache_pair(k_cache, v_cache, kv_layout)
    caches = [nhd(_bits(cache), kv_layout) for cache in (k_cache, v_cache)]
    num_blocks, block_size = (int(size) for size in caches[0].shape[:2])
    moves = _pairs(pairs, k_cache, num_blocks * block_size)
    blocks, offsets = moves // block_size, moves % block_size
    for cache in caches:
        cache[blocks[:, 1], offsets[:, 1]] = cache[blocks[:, 0], offsets[:, 0]]


def slot_mapping_for(block_table: Any, sequences: Any, positions: Any, block_size: int) -> Any:
    """Return the slots of tokens, numpy or torch as `block_table`: token i is at positions[i] of sequence sequences[i].

    Raises:
        KernelError: On the CPU, if the table has no block there.
    """
    sequences, positions = (integers(numbers, block_table, bits=64) for numbers in (sequences, positions))
    blocks = integers(block_table, block_table, bits=64)[sequences, positions // block_size]
    if device_type(blocks) == "cpu":
        for i in np.flatnonzero(host_array(blocks) < 0)[:1]:
            where = f"position {int(positions[i])} of sequence {int(sequences[i])}"
            raise KernelError(f"the block table holds {int(blocks[i])} for {where}: needs a block there first")
    return blocks * block_size + positions % block_size


def _bits(array: Any) -> Any:
    """Return `array`, one of fp8 as bytes: not every operation of torch takes fp8, on every device."""
    return array.view(sys.modules["torch"].uint8) if is_torch(array) and dtype_name(array).startswith("float8") else array


def _pairs(pairs: Any, cache: Any, size: int) -> Any:
    moves = integers(pairs, cache, bits=64).reshape(-1, 2)
    if device_type(moves) == "cpu":
        places = host_array(moves)
        need(not places.size or (places.min() >= 0 and places.max() < size), f"pairs {places.tolist()}: need 0 to {size - 1}")
        _check_places(places[:, 1], size, "destinations")
    return moves


def _check_places(places: Any, size: int, name: str) -> None:
    if places.size:
        need(places.max() < size, f"{name} holds {places.max()}: the cache has 0 to {size - 1}")
        values, counts = np.unique(places, return_counts=True)
        twice = values[counts > 1].tolist()
        need(not twice, f"{name} holds {twice[:5]} more than once: needs each place once")
