"""What numba finds out of calls is remembered while a function is compiled, and means what it meant."""

import operator
from typing import Any

import numba
import pytest
from numba.core import types
from numba.core.compiler import Flags
from numba.core.registry import cpu_target
from numba.core.types.functions import BaseFunction

from pagedkv.call_types import SameFlags, remembered_calls

CALLS = [
    (function, arguments)
    for function in (operator.add, operator.truediv, operator.lt, max)
    for arguments in (
        (types.int64, types.int64),
        (types.int64, types.float64),
        (types.boolean, types.int32),
        (types.int64, types.none),
    )
]


def signature(function: Any, arguments: Any) -> Any:
    context = cpu_target.typing_context
    context.refresh()
    try:
        return context.resolve_function_type(context.resolve_value_type(function), arguments, {})
    except numba.TypingError:
        return None


def test_calls_are_what_numba_says_and_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [signature(*call) for call in CALLS]
    assert expected.count(None) not in (0, len(CALLS))
    asked: list[Any] = []
    look_up = BaseFunction.get_call_type

    def counted(*given: Any) -> Any:
        asked.append(given)
        return look_up(*given)

    monkeypatch.setattr(BaseFunction, "get_call_type", counted)
    with remembered_calls():
        assert [signature(*call) for call in CALLS] == expected
        first = len(asked)
        assert [signature(*call) for call in CALLS] == expected
    assert first == len(CALLS)
    assert len(asked) == first + expected.count(None)  # a refusal is no answer


def test_whatever_happens_numba_looks_up_as_before() -> None:
    look_up = BaseFunction.get_call_type
    with remembered_calls():
        assert BaseFunction.get_call_type is not look_up

    def fails() -> None:
        with remembered_calls():
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert BaseFunction.get_call_type is look_up


def test_options_that_differ_are_told_apart() -> None:
    plain = Flags()
    plain.nrt = True
    one, other = SameFlags(plain), SameFlags(plain)
    assert (one, hash(one), one.copy()) == (other, hash(other), one)
    other.nrt = False
    assert one != other
    assert type(one.copy()) is SameFlags
    assert one.nrt
