"""Triton's interpreter, watching memory: every address is in a tensor of the launch, and none is written twice.

The interpreter runs one program after the other, so that what two of them write, a race on a GPU, ends right; and what lies behind
a tensor is mostly memory too.
"""

from typing import Any

import numpy as np
import torch
from triton.runtime import interpreter


class Watched:
    """In place of the interpreter's compiled part: its loads and stores, looked at."""

    def __init__(self, compiled: Any) -> None:
        self._compiled = compiled
        self._begins = self._ends = np.zeros(0, np.uint64)
        self._stored: set[int] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._compiled, name)

    def launch(self, arguments: list[Any]) -> None:
        """Take the tensors of a launch."""
        tensors = [array for array in arguments if isinstance(array, torch.Tensor) and array.numel()]
        last = [sum((n - 1) * stride for n, stride in zip(array.shape, array.stride(), strict=True)) for array in tensors]
        begins = [array.data_ptr() for array in tensors]
        self._begins = np.array(begins, np.uint64)
        self._ends = np.array(
            [at + (n + 1) * array.itemsize for at, n, array in zip(begins, last, tensors, strict=True)], np.uint64
        )
        self._stored = set()

    def load(self, addresses: Any, mask: Any, *rest: Any) -> Any:
        """Load."""
        self._inside(addresses[mask])
        return self._compiled.load(addresses, mask, *rest)

    def store(self, addresses: Any, values: Any, mask: Any) -> Any:
        """Store."""
        written = addresses[mask]
        self._inside(written)
        places = set(written.ravel().tolist())
        assert len(places) == written.size, "a program writes an element twice"
        assert not places & self._stored, "two programs write one element"
        self._stored |= places
        return self._compiled.store(addresses, values, mask)

    def _inside(self, addresses: Any) -> None:
        flat = addresses.ravel()[:, None]
        within = ((flat >= self._begins) & (flat < self._ends)).any(1)
        assert within.all(), f"{int((~within).sum())} of {len(flat)} addresses are in no tensor of the launch"


def watch() -> None:
    """Watch from now on, in this process."""
    watched = Watched(interpreter._interpreter)
    interpreter._interpreter = watched
    begin = interpreter.GridExecutor._init_args_hst

    def beginning(self: Any, arguments: Any, keywords: Any) -> Any:
        there, named = begin(self, arguments, keywords)
        watched.launch([*there, *named.values()])
        return there, named

    interpreter.GridExecutor._init_args_hst = beginning
