"""How hot functions are compiled."""

import hashlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, cast

import numba

import pagedkv

F = TypeVar("F", bound=Callable[..., Any])


def jit(function: F) -> F:
    """Compile `function` with numba on first use and keep the machine code on disk.

    numba renews a cached function when the file that holds it changes, but not when a function that it calls in another file does:
    after an upgrade, old code could go on running. So the key here covers every source file of the package.
    """
    try:
        compiled = numba.njit(cache=True, error_model="numpy")(function)
    except RuntimeError:  # no folder to keep it in: compile anew in every process
        compiled = numba.njit(error_model="numpy")(function)
    cache_file = getattr(getattr(compiled, "_cache", None), "_cache_file", None)
    if cache_file is not None:  # no writable cache folder, or NUMBA_DISABLE_JIT
        cache_file._source_stamp = (cache_file._source_stamp, _package_digest())
        cache_file._load_index = _forgiving(cache_file._load_index)
    return cast("F", compiled)


def _forgiving(load_index: Callable[[], dict[Any, Any]]) -> Callable[[], dict[Any, Any]]:
    """Let an index count as empty that names a class of an earlier version which is gone: numba reads names before stamps."""

    def load() -> dict[Any, Any]:
        try:
            return load_index()
        except (AttributeError, ImportError):
            return {}

    return load


@cache
def _package_digest() -> str:
    package, *checkout = (Path(folder) for folder in pagedkv.__path__)
    digest = hashlib.sha256()
    for folder in (package, *(root / part for root in checkout for part in ("sims", "kernels"))):
        for file in sorted(folder.rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()
