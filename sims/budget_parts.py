"""The eight parts of the memory budget, in the order of the waterfall, and what a reader calls them."""

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
