"""The allocator at work: keys and values in torch tensors, read through block tables by a running model.

Needs torch, and for models transformers: `pip install 'pagedkv[runtime]'`. What is named here is loaded when it is first used.
"""

import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from pagedkv.runtime.attention import use_paged_attention
    from pagedkv.runtime.beam_search import BeamParams
    from pagedkv.runtime.engine import LLMEngine
    from pagedkv.runtime.memory_study import study_memory
    from pagedkv.runtime.paged_cache import PagedCache
    from pagedkv.runtime.sampling import SamplingParams
    from pagedkv.runtime.storage import PagedKVStorage
    from pagedkv.runtime.storage_layout import StorageLayout, plan_storage

__all__ = [
    "BeamParams",
    "LLMEngine",
    "PagedCache",
    "PagedKVStorage",
    "SamplingParams",
    "StorageLayout",
    "plan_storage",
    "study_memory",
    "use_paged_attention",
]
_HOME = {
    "BeamParams": "beam_search",
    "LLMEngine": "engine",
    "SamplingParams": "sampling",
    "PagedCache": "paged_cache",
    "PagedKVStorage": "storage",
    "StorageLayout": "storage_layout",
    "plan_storage": "storage_layout",
    "study_memory": "memory_study",
    "use_paged_attention": "attention",
}

# transformers asks whether there is a package `kernels`. In a checkout, with its root on the path, it would find the folder of
# `pagedkv.kernels` and import it, which that refuses: so the answer is no.
_bare = None if "kernels" in sys.modules else find_spec("kernels")
if _bare is not None and Path(_bare.origin or "").parent == Path(__file__).parents[2] / "kernels":
    cast("dict[str, Any]", sys.modules)["kernels"] = None


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
