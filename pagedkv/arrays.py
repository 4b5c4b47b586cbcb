"""The array types that state is made of, and what stands for none."""

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Int8Array: TypeAlias = npt.NDArray[np.int8]
BoolArray: TypeAlias = npt.NDArray[np.bool_]
Int32Array: TypeAlias = npt.NDArray[np.int32]
Int64Array: TypeAlias = npt.NDArray[np.int64]
Float64Array: TypeAlias = npt.NDArray[np.float64]

NO_BLOCKS: Int32Array = np.empty(0, np.int32)
NO_TOKENS: Int32Array = np.empty(0, np.int32)
NO_SLOTS: Int64Array = np.empty(0, np.int64)
NO_KEYS: npt.NDArray[np.uint64] = np.empty((0, 2), np.uint64)
