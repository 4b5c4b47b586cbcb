"""Tuples of arrays that compiled functions hand on by their address.

numba passes a tuple field by field, an array in seven parts: a call that hands on eighty arrays has five hundred arguments, and a
hundred such functions take most of the time that their engine takes to compile. Here whoever calls from Python lays the fields out
in memory once, and compiled functions hand on where that is.
"""

import hashlib
from functools import cache
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.datamodel import models
from numba.core.imputils import lower_getattr_generic
from numba.core.typing.templates import AttributeTemplate, infer_getattr
from numba.extending import NativeValue, register_model, unbox

_SLOT = 8
"""Bytes. Every field starts at a multiple: integers, floats and addresses fill one."""
_TUPLES = types.NamedTuple, types.NamedUniTuple
_INT64 = ir.IntType(64)


class TupleReference(types.Type):
    """Where the fields of a NamedTuple lie. They do not change as long as the call lasts; what is in their arrays may."""

    def __init__(self, fields: Any) -> None:
        self.fields = fields
        self.instance_class = fields.instance_class
        short = hashlib.sha256(fields.name.encode()).hexdigest()[:16]  # names of types are part of every name of a function
        super().__init__(name=f"TupleReference({self.instance_class.__qualname__}, {short})")


@cache
def passed_as(kind: Any) -> Any:
    """Return what inner code gets for an argument of type `kind`: of a NamedTuple its address."""
    return TupleReference(kind) if isinstance(kind, _TUPLES) else kind


@register_model(TupleReference)
class _AddressModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: TupleReference) -> None:
        super().__init__(manager, kind, cgutils.voidptr_t)


@infer_getattr
class _Fields(AttributeTemplate):
    key = TupleReference

    def generic_resolve(self, kind: TupleReference, name: str) -> Any:  # type: ignore[override]
        names = kind.fields.fields
        return passed_as(kind.fields[names.index(name)]) if name in names else None


@lower_getattr_generic(TupleReference)  # type: ignore[untyped-decorator]
def _field(context: Any, builder: Any, kind: TupleReference, address: Any, name: str) -> Any:
    field, offset = _layout(context, kind.fields)[name]
    place = _place(builder, address, offset)
    if isinstance(field, _TUPLES):
        return place
    if not _is_flat(field):
        return _load(builder, place, context.get_value_type(field))
    positions, value, item_bytes = _flat_array(context, field)
    length = _load(builder, _place(builder, place, _SLOT), _INT64)
    value = builder.insert_value(value, _load(builder, place, value.type.elements[positions["data"]]), positions["data"])
    value = builder.insert_value(value, length, positions["nitems"])
    value = builder.insert_value(value, item_bytes, positions["itemsize"])
    value = builder.insert_value(value, length, [positions["shape"], 0])
    return builder.insert_value(value, item_bytes, [positions["strides"], 0])


@cache
def _flat_array(context: Any, kind: Any) -> tuple[dict[str, int], Any, Any]:
    """Return where the parts of numba's arrays are, an array of type `kind` that is all zeros, and the bytes of an item."""
    model = context.data_model_manager[kind]
    positions = {name: model.get_field_position(name) for name in ("data", "nitems", "itemsize", "shape", "strides")}
    item_bytes = context.get_abi_sizeof(context.get_data_type(kind.dtype))
    return positions, ir.Constant(context.get_value_type(kind), None), ir.Constant(_INT64, item_bytes)


@unbox(TupleReference)  # type: ignore[untyped-decorator]
def _lay_out(kind: TupleReference, obj: Any, c: Any) -> Any:
    native = c.unbox(kind.fields, obj)
    room = cgutils.alloca_once(c.builder, _INT64, _size(c.context, kind.fields) // _SLOT)
    address = c.builder.bitcast(room, cgutils.voidptr_t)
    _store(c.context, c.builder, kind.fields, native.value, address)
    return NativeValue(address, is_error=native.is_error, cleanup=native.cleanup)


def _store(context: Any, builder: Any, kind: Any, value: Any, address: Any) -> None:
    for i, (field, offset) in enumerate(_layout(context, kind).values()):
        item, place = builder.extract_value(value, i), _place(builder, address, offset)
        if isinstance(field, _TUPLES):
            _store(context, builder, field, item, place)
        elif _is_flat(field):
            positions, _, _ = _flat_array(context, field)
            _put(builder, builder.extract_value(item, positions["data"]), place)
            _put(builder, builder.extract_value(item, [positions["shape"], 0]), _place(builder, place, _SLOT))
        else:
            _put(builder, item, place)


def _is_flat(kind: Any) -> bool:
    """Whether it is an array of which the place of its items and their number say everything."""
    return isinstance(kind, types.Array) and kind.ndim == 1 and kind.layout == "C"


@cache
def _layout(context: Any, kind: Any) -> dict[str, tuple[Any, int]]:
    """Return for each field of `kind` its type and where it starts: bytes from the start of the whole."""
    places, size = {}, 0
    for name, field in zip(kind.fields, kind.types, strict=True):
        places[name] = field, size
        size += _size(context, field)
    return places


def _size(context: Any, kind: Any) -> int:
    """Bytes of `kind`, a multiple of `_SLOT`."""
    if isinstance(kind, _TUPLES):
        return sum(_size(context, field) for field in kind.types)
    if _is_flat(kind):
        return 2 * _SLOT
    num_bytes: int = context.get_abi_sizeof(context.get_value_type(kind))
    return -(-num_bytes // _SLOT) * _SLOT


def _place(builder: Any, address: Any, offset: int) -> Any:
    return builder.gep(address, [ir.Constant(_INT64, offset)], inbounds=True)


def _load(builder: Any, place: Any, kind: Any) -> Any:
    load = builder.load(builder.bitcast(place, kind.as_pointer()))
    load.set_metadata("invariant.load", builder.module.add_metadata([]))
    return load


def _put(builder: Any, value: Any, place: Any) -> None:
    builder.store(value, builder.bitcast(place, value.type.as_pointer()))
