"""The eight parts of the memory budget, in the order of the waterfall, what a reader calls them, and what a program reads."""

from typing import Any

from pagedkv.memory_budget import MemoryBudget

PARTS = {
    "weights": "weights",
    "engine_overhead": "engine overhead",
    "activations": "activations",
    "cuda_graphs": "CUDA graphs",
    "kv_cache": "KV cache",
    "os_reserve": "operating system",
    "other_programs": "other programs",
    "unassigned": "unassigned",
}


def budget_document(budget: MemoryBudget) -> dict[str, Any]:
    """Return the memory ledger in bytes; the eight parts sum to `visible`."""
    return {
        "visible": budget.visible,
        **{part: getattr(budget, part) for part in PARTS},
        "num_blocks": budget.num_blocks,
        "block_size": budget.block_size,
        "kv_bytes_per_token": budget.kv_bytes_per_token,
        "window_cells": budget.window_cells,
        "window_bytes": budget.window_bytes,
        "gpu_memory_utilization": budget.utilization,
        "requested": budget.requested,
        "free_at_start": budget.free_at_start,
    }
