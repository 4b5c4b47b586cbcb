"""Paged attention kernels that read the KV cache through block tables. What is named here is loaded when it is first used."""

if __name__ == "kernels":
    raise ImportError("import this package as 'pagedkv.kernels': a top-level 'kernels' would shadow other people's packages")

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pagedkv.kernels.adapters import (
        BatchDecodeWithPagedKVCacheWrapper,
        block_table_to_csr,
        csr_to_block_table,
        flash_attn_with_kvcache,
    )
    from pagedkv.kernels.cache_ops import copy_blocks, copy_slots, reshape_and_cache, slot_mapping_for
    from pagedkv.kernels.contract import KernelError
    from pagedkv.kernels.dispatch import available, paged_attention, paged_attention_decode, paged_attention_prefill
    from pagedkv.kernels.merge import cascade_attention, merge_state

__all__ = [
    "BatchDecodeWithPagedKVCacheWrapper",
    "KernelError",
    "available",
    "block_table_to_csr",
    "cascade_attention",
    "copy_blocks",
    "copy_slots",
    "csr_to_block_table",
    "flash_attn_with_kvcache",
    "merge_state",
    "paged_attention",
    "paged_attention_decode",
    "paged_attention_prefill",
    "reshape_and_cache",
    "slot_mapping_for",
]
_MODULES = {
    "adapters": ("BatchDecodeWithPagedKVCacheWrapper", "block_table_to_csr", "csr_to_block_table", "flash_attn_with_kvcache"),
    "cache_ops": ("copy_blocks", "copy_slots", "reshape_and_cache", "slot_mapping_for"),
    "contract": ("KernelError",),
    "dispatch": ("available", "paged_attention", "paged_attention_decode", "paged_attention_prefill"),
    "merge": ("cascade_attention", "merge_state"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
