"""The array types that state is made of."""

from typing import Any, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

Int8Array: TypeAlias = npt.NDArray[np.int8]
Int32Array: TypeAlias = npt.NDArray[np.int32]
Int64Array: TypeAlias = npt.NDArray[np.int64]
Float64Array: TypeAlias = npt.NDArray[np.float64]

Columns = TypeVar("Columns", bound=tuple[Any, ...])


def joined(columns: Columns, more: Columns) -> Columns:
    """Return a tuple of arrays in which each array of `columns` is followed by the one of `more`."""
    kind: Any = type(columns)
    both: Columns = kind(*(np.concatenate(pair) for pair in zip(columns, more, strict=True)))
    return both
