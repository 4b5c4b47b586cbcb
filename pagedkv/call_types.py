"""What numba finds out of the calls in a function, found out once.

At every `a + b` numba goes through all that `+` may mean, lists, texts and times included, and looks each up by the options of
the compiler, which it compares one by one, in Python. A compiled step has thousands of such calls, over a few types: this was a
fifth of the time that it took to compile one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from numba.core.compiler import Flags
from numba.core.targetconfig import ConfigStack
from numba.core.types.functions import BaseFunction


class SameFlags(Flags):
    """The options of a compiler, compared all at once."""

    __slots__ = ()

    def __hash__(self) -> int:
        return hash(SameFlags)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Flags):
            return NotImplemented
        return bool(self._values == other._values)


@contextmanager
def remembered_calls() -> Iterator[None]:
    """Let numba look up once what a call of a built-in function with arguments of given types is, as long as this lasts.

    For whoever holds numba's lock of the compiler. What it looks up depends on the function, the types and the options alone.
    """
    functions: Any = BaseFunction
    look_up = functions.get_call_type
    known: dict[Any, Any] = {}

    def get_call_type(function: Any, context: Any, args: Any, kws: Any) -> Any:
        key = function, context, tuple(args), tuple(kws.items()), ConfigStack.top_or_none()
        if (signature := known.get(key)) is None:
            signature = look_up(function, context, args, kws)
            if signature is not None:
                known[key] = signature
        return signature

    functions.get_call_type = get_call_type
    try:
        yield
    finally:
        functions.get_call_type = look_up
