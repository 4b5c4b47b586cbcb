"""A number for each number, all bits of which depend on all of it. Source: SplitMix64 (Steele et al., OOPSLA 2014)."""

from typing import Any

import numpy as np

from pagedkv.jit import lean_jit


def mixed(number: Any) -> Any:
    """Return another 64-bit number for each of `number`, uint64; for arrays, and the body of `mixed_one`."""
    number = number + np.uint64(0x9E3779B97F4A7C15)
    number = (number ^ (number >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    number = (number ^ (number >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return number ^ (number >> np.uint64(31))


mixed_one = lean_jit(mixed)
"""The same of one number, compiled."""
