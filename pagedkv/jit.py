"""How hot functions are compiled."""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, cached_property
from pathlib import Path
from typing import Any, TypeVar, cast

import numba
from numba.core import event
from numba.core.ccallback import CFunc
from numba.core.sigutils import normalize_signature
from numba.core.types import FunctionType
from numba.extending import typeof_impl

import pagedkv
from pagedkv.compilation import COMPILATION
from pagedkv.inner_code import ByKind, LeanDispatcher

F = TypeVar("F", bound=Callable[..., Any])


def jit(function: F) -> F:
    """Compile `function` with numba on first use and keep the machine code on disk.

    numba renews a cached function when the file that holds it changes, but not when a function that it calls in another file does:
    after an upgrade, old code could go on running. So the key here covers every source file of the package.
    """
    return _compiled(function, parallel=False)


def lean_jit(function: F) -> F:
    """Compile as `jit` does a function that makes no array, without counting the references to those that it is given.

    They outlive the call. Where a function passes many arrays on to others, counting costs several times what the work does. What
    compiled code calls of it is `pagedkv.inner_code`, and what it gets of a NamedTuple is `pagedkv.tuple_reference`: such functions
    may call each other many deep, with many arrays, and still compile in seconds.
    """
    if numba.config.DISABLE_JIT:  # type: ignore[attr-defined]
        return function
    compiled = LeanDispatcher(function, {}, {"nopython": True, "boundscheck": None, "error_model": "numpy", "_nrt": False})
    with _noticing_that_nothing_is_kept():
        compiled.enable_caching()
    _watch_package(compiled)
    return cast("F", compiled)


def by_kind(function: Callable[..., Any]) -> ByKind:
    """Return a function with a version by `lean_jit` for each kind of memory, or rules, that it may get as its first argument.

    The body of `function` is never run: its docstring says what each version does.
    """
    return ByKind(function)


def parallel_jit(function: F) -> F:
    """Compile as `jit` does, with the iterations of each `numba.prange` spread over numba's threads."""
    return _compiled(function, parallel=True)


def fixed_types(function: F) -> F:
    """Return `function`, by `jit` or `lean_jit`, for callers that always give it the same types: those of the first call.

    Nobody looks at types later, or checks them. For a step that takes six tuples of thirty arrays, finding out what these are is
    4 of 4.5 µs.
    """
    if numba.config.DISABLE_JIT:  # type: ignore[attr-defined]
        return function
    compiled = cast("Any", function)
    code: Callable[..., Any] | None = None

    def call(*arguments: Any) -> Any:
        nonlocal code
        if code is None:
            code = compiled.compile(tuple(numba.typeof(argument) for argument in arguments))
        return code(*arguments)

    return cast("F", call)


def _compiled(function: F, *, parallel: bool) -> F:
    options: dict[str, Any] = {"error_model": "numpy", "parallel": parallel}
    try:
        compiled = numba.njit(cache=True, **options)(function)
    except RuntimeError:  # no folder to keep it in: compile anew in every process
        COMPILATION.kept = False
        compiled = numba.njit(**options)(function)
    _watch_package(compiled)
    return cast("F", compiled)


def native(function: F, signature: Any) -> F:
    """Compile `function` now, for one signature of numba types, to what compiled code can take as an argument.

    Whatever takes it is compiled once, not anew for every function that is passed. Kept on disk as by `jit`.
    """
    types = normalize_signature(signature)
    compiled = _NativeFunction(function, types, {}, {"error_model": "numpy"})
    with _noticing_that_nothing_is_kept():
        compiled.enable_caching()
    _watch_package(compiled)
    compiled.compile()
    return cast("F", compiled)


@contextmanager
def _noticing_that_nothing_is_kept() -> Iterator[None]:
    """Go on if there is no folder to keep code in: it is compiled anew in every process."""
    try:
        yield
    except RuntimeError:
        COMPILATION.kept = False


class _Watch(event.Listener):
    """Counts compilations; what is read from disk begins none."""

    def on_start(self, event: Any) -> None:
        COMPILATION.begin()

    def on_end(self, event: Any) -> None:
        COMPILATION.end()


for _kind in ("numba:compile", "numba:run_pass"):  # a C function has passes only
    event.register(_kind, _Watch())


class _NativeFunction(CFunc):
    """A C function whose type is made once: numba makes that of a CFunc, in 25 µs, for every call that it is passed to."""

    @cached_property
    def kind(self) -> Any:
        return FunctionType(self._sig)  # type: ignore[attr-defined]


@typeof_impl.register(_NativeFunction)
def _kind_of(function: _NativeFunction, context: Any) -> Any:
    return function.kind


def _watch_package(compiled: Any) -> None:
    cache_file = getattr(getattr(compiled, "_cache", None), "_cache_file", None)
    if cache_file is not None:  # no writable cache folder, or NUMBA_DISABLE_JIT
        cache_file._source_stamp = (cache_file._source_stamp, _package_digest())
        cache_file._load_index = _forgiving(cache_file._load_index)


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
    folders = {package: package, **{root / part: root for root in checkout for part in ("sims", "kernels")}}
    files = {file.relative_to(root).as_posix(): file for folder, root in folders.items() for file in folder.rglob("*.py")}
    digest = hashlib.sha256()
    for name in sorted(files):  # the same in a checkout and installed: what one has compiled may be copied to the other
        digest.update(files[name].read_bytes())
    return digest.hexdigest()
