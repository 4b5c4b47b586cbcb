"""Compiled functions that compiled functions call: typed and lowered once, and optimised where they are called.

numba compiles a callee by itself first: a wrapper for Python, all optimisations, machine code; then its caller with the code of
the callee inlined, all optimisations again, and so on up. Where functions of many arrays call each other six deep, that costs
several times what optimising the outermost costs, and all but the last is thrown away.
"""

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, update_wrapper
from typing import Any, TypeVar

from numba.core import types
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler
from numba.core.registry import CPUDispatcher

from pagedkv.call_types import SameFlags, remembered_calls
from pagedkv.tuple_reference import passed_as

F = TypeVar("F", bound=Callable[..., Any])


class _InnerLibrary(JITCodeLibrary):
    """A function as it was lowered, and which others it calls. It is never run by itself."""

    def _optimize_functions(self, ll_module: Any) -> None:
        ll_module.data_layout = self._codegen._data_layout

    def finalize(self) -> None:
        self._raise_if_finalized()
        for function in self._final_module.functions:
            if not function.is_declaration and function.linkage.name == "external":
                function.linkage = "linkonce_odr"  # defined again wherever it is linked in
        self._finalize_dynamic_globals()
        self._finalized = True

    def parts(self) -> list[Any]:
        """Return its own code and that of all that it calls, however deep: callers before what they call."""
        return list(_callees_first(self, {}).values())[::-1]

    def _get_module_for_linking(self) -> Any:
        """Return all parts as one, for a caller that is no inner code."""
        if self._shared_module is None:
            own, *others = self.parts()
            self._shared_module = own.clone()
            for module in others:
                self._shared_module.link_in(module, preserve=True)
        return self._shared_module


def _callees_first(library: Any, modules: dict[Any, Any]) -> dict[Any, Any]:
    if library not in modules:
        is_inner = isinstance(library, _InnerLibrary)
        for callee in library._linking_libraries if is_inner else ():
            _callees_first(callee, modules)
        modules[library] = library._final_module if is_inner else library._get_module_for_linking()
    return modules


class _OuterLibrary(JITCodeLibrary):
    """Code for Python, which nobody links: what it calls is its own, so that LLVM may inline it, or leave out arguments."""

    def finalize(self) -> None:
        for module in (module for library in self._linking_libraries for module in library.parts()):
            self._final_module.link_in(module, preserve=True)  # LLVM takes what is called in what it has
        self._linking_libraries = []
        super().finalize()

    def _optimize_final_module(self) -> None:
        for function in self._final_module.functions:
            if function.linkage.name == "linkonce_odr":
                function.linkage = "internal"
        super()._optimize_final_module()


class _InnerCompiler(Compiler):
    """Compiles up to what callers link: no wrappers, no machine code."""

    def __init__(self, typing: Any, target: Any, library: Any, args: Any, return_type: Any, flags: Any, local_types: Any) -> None:
        flags.no_compile = flags.no_cpython_wrapper = flags.no_cfunc_wrapper = True
        library = _InnerLibrary(target.codegen(), "inner")
        super().__init__(typing, target, library, args, return_type, SameFlags(flags), local_types)

    def compile_extra(self, func: Any) -> Any:
        result = super().compile_extra(func)
        key = object()  # what a call is looked up by, where others have the address of the machine code
        self.state.targetctx.insert_user_function(key, result.fndesc, [result.library])
        return result._replace(entry_point=key)


class _InnerDispatcher(CPUDispatcher):
    """What compiled callers see of a function: one version for all kinds of signed integers, not one for each."""

    def add_overload(self, cres: Any) -> None:
        self.overloads[tuple(cres.signature.args)] = cres

    def get_call_template(self, args: Any, kws: Any) -> Any:
        widened = {name: _widened(kind) for name, kind in kws.items()}
        return super().get_call_template(tuple(_widened(kind) for kind in args), widened)


def _widened(kind: Any) -> Any:
    kind = types.unliteral(kind)
    return types.int64 if kind in types.signed_domain else kind


@contextmanager
def _no_collection() -> Iterator[None]:
    """Let nobody look for garbage: numba makes millions of objects that stay as long as it compiles. A tenth of the time."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class _OuterCompiler(Compiler):
    """Puts a wrapper for Python around the inner code of a function, and compiles both to machine code."""

    def __init__(self, inner: _InnerDispatcher, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._inner = inner

    def compile_extra(self, func: Any) -> Any:
        context, args = self.state.targetctx, self.state.args
        handed_on = tuple(passed_as(_widened(kind)) for kind in args)
        with _no_collection(), remembered_calls():
            self._inner.get_call_template(handed_on, {})
        result: Any = self._inner.overloads[handed_on]
        library = _OuterLibrary(context.codegen(), result.fndesc.qualname)
        library.enable_object_caching()
        library.add_linking_library(result.library)
        context.create_cpython_wrapper(library, result.fndesc, result.environment, result.call_helper)
        entry = context.get_executable(library, result.fndesc, result.environment)
        signature = result.signature.replace(args=args)
        return result._replace(library=library, entry_point=entry, signature=signature, metadata={})


class LeanDispatcher(CPUDispatcher):
    """A function compiled as by `numba.njit` for Python, and as inner code for compiled callers."""

    def __init__(self, py_func: Any, local_types: Any, options: dict[str, Any]) -> None:
        self._inner = _InnerDispatcher(py_func, local_types, options, pipeline_class=_InnerCompiler)
        compiler: Any = partial(_OuterCompiler, self._inner)
        super().__init__(py_func, local_types, options, pipeline_class=compiler)
        self._inner_type = types.Dispatcher(self._inner)

    @property
    def _numba_type_(self) -> Any:
        return self._inner_type


class ByKind:
    """A function of which there is a version for each type that its first argument, a NamedTuple of arrays, may have.

    As `functools.singledispatch`, for compiled callers too: which version they call is decided when they are compiled.
    """

    is_compiling = False
    """numba asks for it: a version that calls itself would have to say so."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._versions: dict[type, Any] = {}
        self._numba_type_: Any = types.Dispatcher(self)
        update_wrapper(self, function)

    def register(self, kind: type) -> Callable[[F], F]:
        """Return a decorator for the version, by `lean_jit`, for first arguments of type `kind`; of `object`: for all others."""

        def add(version: F) -> F:
            self._versions[kind] = version
            return version

        return add

    def of(self, first: Any) -> Any:
        """Return the version for first arguments of the type of `first`."""
        return self._version(type(first))

    def __call__(self, first: Any, *others: Any) -> Any:
        """Call the version for `first` from Python."""
        return self.of(first)(first, *others)

    def get_call_template(self, args: Any, kws: Any) -> Any:
        """Tell a compiled caller what a call with arguments of these types is."""
        return self._inner(args).get_call_template(args, kws)

    def get_overload(self, args: Any) -> Any:
        """Tell a compiled caller what it was compiled to."""
        return self._inner(args).get_overload(args)

    def _inner(self, args: Any) -> Any:
        return self._version(args[0].instance_class)._inner

    def _version(self, kind: type) -> Any:
        return self._versions[kind if kind in self._versions else object]
