"""A GPU that is not there: torch's calls about one are answered, and what would lie on it lies on the CPU."""

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

PROPERTIES = SimpleNamespace(
    name="Fake GPU", major=9, minor=0, multi_processor_count=4, total_memory=1 << 30, L2_cache_size=1 << 14
)


class OnTheCpu(TorchFunctionMode):
    """Whatever is to be made on a GPU, or sent there, is on the CPU."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def there(value: Any) -> Any:
            return torch.device("cpu") if isinstance(value, torch.device) and value.type == "cuda" else value

        return function(*map(there, args), **{name: there(value) for name, value in (kwargs or {}).items()})


class Event:
    """Every piece of work takes a millisecond."""

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        """Nothing to do."""

    def elapsed_time(self, end: "Event") -> float:
        """Return milliseconds."""
        return 1.0


class Gpu:
    """What the test may see and set."""

    def __init__(self) -> None:
        self.stream = "main"
        self.capturing, self.lost, self.forbids_graphs = False, False, False

    def synchronize(self, device: Any = None) -> None:
        """Wait for everything: the first call that sees that a kernel went astray."""
        if self.lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def set_stream(self, stream: str) -> None:
        """Go on there."""
        self.stream = stream

    @contextlib.contextmanager
    def graph(self, graph: Any) -> Iterator[None]:
        """Capture, as torch does: an end that fails leaves the stream of the capture the current one."""
        self.stream, self.capturing = "capture", True
        try:
            yield
        finally:
            self.capturing = False
            if self.forbids_graphs:
                raise RuntimeError("operation failed due to a previous error during capture")
        self.stream = "main"


@contextlib.contextmanager
def fake_gpu(patch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    """Answer for a GPU while this lasts."""
    gpu = Gpu()
    for name, value in {
        "is_available": lambda: True,
        "get_device_properties": lambda _: PROPERTIES,
        "get_device_name": lambda _: PROPERTIES.name,
        "mem_get_info": lambda _: (1 << 29, PROPERTIES.total_memory),
        "synchronize": gpu.synchronize,
        "current_stream": lambda: gpu.stream,
        "set_stream": gpu.set_stream,
        "graph": gpu.graph,
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
        "Event": Event,
    }.items():
        patch.setattr(torch.cuda, name, value)
    with OnTheCpu():
        yield gpu
