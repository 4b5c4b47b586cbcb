"""Names that a sweep goes over, looked up before anything runs: a name that there is not is no combination that cannot run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pagedkv.catalogue import load_hardware, load_model
from pagedkv.errors import unknown_name
from pagedkv.heaps import HEAPS
from pagedkv.kv_spec import kv_element_pair_bytes
from pagedkv.sims.config import MeasurementConfig
from pagedkv.sims.engines import load_engine
from pagedkv.sims.goodput import parse_goals
from pagedkv.sims.length_names import load_lengths
from pagedkv.sims.scenario import asked_allocators
from pagedkv.sims.sweep_grid import Grid
from pagedkv.sims.traces import read_trace
from pagedkv.sims.workload_file import load_workload
from pagedkv.weight_format import load_weight_format


def check_names(grid: Grid) -> None:
    """Look up every value of the swept names.

    Raises:
        ConfigError: For the first that there is not, with near ones.
    """
    for axis in grid.axes:
        if (look_up := _LOOK_UP.get(axis.name)) is not None:
            for value in axis.values:
                look_up(value)


def _heap(name: str) -> None:
    if name not in HEAPS.names():
        raise unknown_name("contiguous-heap", name, HEAPS.names())


_LOOK_UP: dict[str, Callable[[Any], object]] = {
    "model": load_model,
    "hardware": load_hardware,
    "engine": load_engine,
    "quantization": load_weight_format,
    "kv_cache_dtype": kv_element_pair_bytes,
    "contiguous_heap": _heap,
    "lengths": load_lengths,
    "workload": load_workload,
    "trace": lambda name: read_trace(Path(name), format=None),
    "goodput": parse_goals,
    "allocator": lambda names: asked_allocators(MeasurementConfig(allocator=names), usual=()),
}
