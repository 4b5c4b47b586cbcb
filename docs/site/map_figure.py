"""The memory map of the docs: paged and contiguous memory under the same requests, by the one function that draws such maps."""

import json
from typing import Any

from pagedkv.sims.config import LoadConfig, MeasurementConfig, ServingConfig, SimulationConfig
from pagedkv.sims.memory_frames import frames_of
from pagedkv.sims.memory_map import Frame, memory_map
from pagedkv.sims.scenario import resolve

ALLOCATORS = ("paged", "contiguous-max")
NUM_BLOCKS, NUM_FRAMES, END_S = 480, 24, 50.0


def frames() -> dict[str, list[Frame]]:
    """Return the moments by allocator: of a pool that is small enough to be seen whole."""
    config = SimulationConfig(
        load=LoadConfig(request_rate=1.0, random_input_len=250, random_output_len=200, random_range_ratio=0.6),
        serving=ServingConfig(num_gpu_blocks_override=NUM_BLOCKS, max_model_len=1024, watermark=0.0),
        measurement=MeasurementConfig(allocator=ALLOCATORS, duration="60s", warmup="0s"),
    )
    scenario = resolve(config)
    return {name: frames_of(scenario, name, seed=0, end_s=END_S, number=NUM_FRAMES) for name in ALLOCATORS}


def figures(panels: dict[str, list[Frame]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the figure for a light and for a dark page."""
    light, dark = (json.loads(memory_map(panels, columns=20, dark=dark).to_json()) for dark in (False, True))
    return light, dark
