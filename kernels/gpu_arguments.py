"""What a kernel on a GPU is given, and where it is launched. A GPU follows pointers wherever they lead: so this is looked at."""

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from pagedkv.kernels.contract import KernelError, dtype_name, is_torch, need


def on_device_of(array: Any) -> AbstractContextManager[Any]:
    """Return a context in which the GPU of `array` is the current one, where kernels are launched; on the CPU nothing changes."""
    return sys.modules["torch"].cuda.device_of(array) if is_torch(array) else nullcontext()


def check_devices(q: Any, tables: dict[str, Any], others: dict[str, Any], *, name_of_q: str = "q") -> None:
    """Check what a kernel on a GPU is given: it follows pointers wherever they lead. None is passed over.

    Args:
        q: Queries: all else has to be where they are.
        tables: By name: block tables and lengths.
        others: By name: other arrays.
        name_of_q: What messages call it.

    Raises:
        KernelError: If one is elsewhere, or a table does not hold integers.
    """
    for name, array in (tables | others).items():
        if array is not None and (is_torch(array) != is_torch(q) or (is_torch(q) and array.device != q.device)):
            places = (f"on {part.device}" if is_torch(part) else "of numpy" for part in (array, q))
            raise KernelError(f"{name} is {next(places)}, {name_of_q} is {next(places)}: needs both in one place")
    for name, array in tables.items():
        kind = None if array is None else dtype_name(array)
        need(kind in (None, "int32", "int64"), f"{name} is {kind}: needs int32")
