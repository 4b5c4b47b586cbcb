"""Vectors of float32 for numba: what the compiler's own vectoriser does not find in an attention kernel, said outright.

`load` widens what is stored: float32 as it is, uint16 as bit patterns of bfloat16, int16 as those of float16. Indices count
elements of a one-dimensional contiguous array; nothing is checked. The functions work in compiled code only.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

from numba import types
from numba.core.cgutils import get_or_insert_function, ir  # type: ignore[attr-defined]
from numba.core.registry import cpu_target
from numba.extending import intrinsic, models, register_model

_TRIPLE, _, _FEATURES = cpu_target.target_context.codegen().magic_tuple()

LANES: int = 16 if "+avx512f" in _FEATURES else 8 if "+avx2" in _FEATURES else 4
"""Elements of a vector: as many as fill a register of the machine that compiles."""

HALF_IN_HARDWARE: bool = "+f16c" in _FEATURES or _TRIPLE.startswith(("aarch64", "arm64"))

_F32, _I16, _I32 = ir.FloatType(), ir.IntType(16), ir.IntType(32)
_VECTOR = ir.VectorType(_F32, LANES)
_INTEGERS = ir.VectorType(_I32, LANES)


class _Vector(types.Type):
    def __init__(self) -> None:
        super().__init__(name=f"float32x{LANES}")


@register_model(_Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _VECTOR)


_vector = _Vector()
_Emit = Callable[[Any, Any, Any, Any], Any]


def _primitive(function: Callable[..., tuple[Any, _Emit]]) -> Callable[..., Any]:
    """Let compiled code call what `function(typing context, argument types)` gives: a signature, and what emits the code."""
    return cast("Callable[..., Any]", intrinsic(function))


def _address(context: Any, builder: Any, kind: Any, array: Any, index: Any, element: Any) -> Any:
    """Return the address of `array[index]` as a pointer to `element`."""
    start = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(start, [index]), element.as_pointer())


def _constant(value: int) -> Any:
    return ir.Constant(_INTEGERS, [value] * LANES)


def _shuffled(builder: Any, left: Any, right: Any, places: Sequence[int]) -> Any:
    return builder.shuffle_vector(left, right, ir.Constant(ir.VectorType(_I32, len(places)), list(places)))


def _from_half(builder: Any, bits: Any) -> Any:
    """Widen bit patterns of float16 with integer operations, for machines that have no instruction for it."""
    signed = builder.sext(bits, _INTEGERS)
    magnitude = builder.shl(builder.and_(signed, _constant(0x7FFF)), _constant(13))
    rebased = builder.fmul(builder.bitcast(magnitude, _VECTOR), ir.Constant(_VECTOR, [2.0**112] * LANES))
    special = builder.icmp_signed(">=", magnitude, _constant(0x0F800000))  # infinity and NaN keep the largest exponent
    exponent = builder.select(special, _constant(0x7F800000), _constant(0))
    sign = builder.and_(signed, _constant(-(2**31)))
    return builder.bitcast(builder.or_(builder.or_(builder.bitcast(rebased, _INTEGERS), exponent), sign), _VECTOR)


@_primitive
def load(typing: Any, array: Any, index: Any) -> tuple[Any, _Emit]:
    """Load LANES elements from `array[index]` on, as float32."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if array.dtype == types.float32:
            return builder.load(_address(context, builder, array, arguments[0], arguments[1], _VECTOR), align=4)
        if array.dtype == types.int16 and HALF_IN_HARDWARE:
            half = ir.VectorType(ir.HalfType(), LANES)
            return builder.fpext(
                builder.load(_address(context, builder, array, arguments[0], arguments[1], half), align=2), _VECTOR
            )
        bits = builder.load(_address(context, builder, array, arguments[0], arguments[1], ir.VectorType(_I16, LANES)), align=2)
        if array.dtype == types.int16:
            return _from_half(builder, bits)
        return builder.bitcast(builder.shl(builder.zext(bits, _INTEGERS), _constant(16)), _VECTOR)

    return _vector(array, index), emit


@_primitive
def store(typing: Any, array: Any, index: Any, vector: Any) -> tuple[Any, _Emit]:
    """Write the vector from `array[index]` on, an array of float32."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.store(arguments[2], _address(context, builder, array, arguments[0], arguments[1], _VECTOR), align=4)
        return context.get_dummy_value()

    return types.void(array, index, vector), emit


@_primitive
def splat(typing: Any, number: Any) -> tuple[Any, _Emit]:
    """Return a vector of LANES times the same float32."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        one = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), arguments[0], ir.Constant(_I32, 0))
        return _shuffled(builder, one, one, [0] * LANES)

    return _vector(types.float32), emit


@_primitive
def fma(typing: Any, left: Any, right: Any, more: Any) -> tuple[Any, _Emit]:
    """Return left * right + more of three vectors, lane by lane, or of three float32."""
    element, name = (_VECTOR, f"v{LANES}f32") if left == _vector else (_F32, "f32")

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(element, [element] * 3)
        return builder.call(get_or_insert_function(builder.module, kind, f"llvm.fmuladd.{name}"), arguments)

    return left(left, left, left), emit


@_primitive
def sums(typing: Any, a: Any, b: Any, c: Any, d: Any) -> tuple[Any, _Emit]:
    """Return the sums over the lanes of four vectors, four float32. Cheaper together than one by one."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        def folded(left: Any, right: Any, low: Sequence[int], high: Sequence[int]) -> Any:
            """Add pairs of lanes of two vectors: within every four lanes, left's first and then right's."""
            places = [
                [four + (lane % 4) + (LANES if lane > 3 else 0) for four in range(0, LANES, 4) for lane in part]
                for part in (low, high)
            ]
            return builder.fadd(*(_shuffled(builder, left, right, part) for part in places))

        ab, cd = (folded(left, right, (0, 2, 4, 6), (1, 3, 5, 7)) for left, right in (arguments[:2], arguments[2:]))
        total, width = folded(ab, cd, (0, 2, 4, 6), (1, 3, 5, 7)), LANES
        while width > 4:
            width //= 2
            total = builder.fadd(*(_shuffled(builder, total, total, range(start, start + width)) for start in (0, width)))
        return context.make_tuple(
            builder, signature.return_type, [builder.extract_element(total, ir.Constant(_I32, i)) for i in range(4)]
        )

    return types.UniTuple(types.float32, 4)(a, b, c, d), emit


@_primitive
def prefetch(typing: Any, array: Any, index: Any) -> tuple[Any, _Emit]:
    """Ask for the cache line of `array[index]` in the second-level cache, without waiting."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = _address(context, builder, array, arguments[0], arguments[1], ir.IntType(8))
        kind = ir.FunctionType(ir.VoidType(), [place.type, _I32, _I32, _I32])
        read, second_level, data = (ir.Constant(_I32, value) for value in (0, 2, 1))
        builder.call(get_or_insert_function(builder.module, kind, "llvm.prefetch.p0"), [place, read, second_level, data])
        return context.get_dummy_value()

    return types.void(array, index), emit


@_primitive
def fetch_add(typing: Any, array: Any, index: Any, step: Any) -> tuple[Any, _Emit]:
    """Add to an int64 in `array` and return what it was, as one step that all threads see in one order."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        place = _address(context, builder, array, arguments[0], arguments[1], ir.IntType(64))
        return builder.atomic_rmw("add", place, arguments[2], "seq_cst")

    return types.int64(array, index, types.int64), emit
