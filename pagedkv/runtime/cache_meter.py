"""How many bytes a cache really takes: every tensor that it makes is seen when it is made, and when its memory goes."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pagedkv.runtime.paged_cache import PagedCache


class CacheMeter(TorchDispatchMode):
    """Counts the memory of tensors that are made under it, as long as it lives; a view has none of its own.

    Example:
        >>> with CacheMeter() as meter:
        ...     old = torch.zeros(1000)
        ...     new = torch.cat((old, torch.zeros(24)))
        >>> del old
        >>> meter.live_bytes, meter.peak_bytes
        (4096, 8192)
    """

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = self.peak_bytes = self.held_bytes = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {_address(tensor) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, torch.Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and _address(tensor) not in given | self._known:
                self._add(tensor.untyped_storage())
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        return out

    def _add(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, int(storage.nbytes())
        self._known.add(address)
        self.live_bytes += size
        weakref.finalize(storage, self._drop, address, size)

    def _drop(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.live_bytes -= size

    def watch(self, cache: Any) -> None:
        """Count from now on what a cache makes when it takes keys and values; `held_bytes` is the most that it holds between.

        Of a `PagedCache`, the memory must have been taken under the meter.
        """
        if isinstance(cache, PagedCache):
            for layer in cache.layers:
                layer.write = self._counted(layer.write)
        else:
            cache.update = self._counted(cache.update)

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.held_bytes = max(self.held_bytes, self.live_bytes)
            with self:
                return function(*args, **kwargs)

        return counted


def _address(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
