"""Moments of a run for its memory map: the run is done again, and looked at."""

import numpy as np

from pagedkv.scheduling.scheduler_memory import memory_of
from pagedkv.scheduling.step import StepScheduler
from pagedkv.sims.memory_panel import Frame
from pagedkv.sims.scenario import Scenario
from pagedkv.sims.simulation import Watch, run
from pagedkv.snapshot import snapshot

NUM_FRAMES = 12


def frames_of(scenario: Scenario, allocator: str, *, seed: int, end_s: float, number: int = NUM_FRAMES) -> list[Frame]:
    """Return `number` moments of the run with this seed, evenly spaced up to `end_s`.

    Memory that is not made of blocks is shown in pieces of the size of a block, so that maps can be compared.
    """
    frames: list[Frame] = []
    run(scenario, allocator, seed=seed, watch=watch_frames(scenario, frames, end_s=end_s, number=number))
    return frames


def watch_frames(scenario: Scenario, frames: list[Frame], *, end_s: float, number: int = NUM_FRAMES) -> Watch:
    """Return who appends `number` moments of a run to `frames`: see `frames_of`."""
    unit_slots = scenario.deployment.pool.block_size

    def see(now_s: float, scheduler: StepScheduler) -> None:
        memory = memory_of(scheduler)
        frames.append(Frame(label=f"{now_s:.0f} s", snapshot=snapshot(memory, max(unit_slots, memory.unit_slots))))

    return Watch(times_s=np.linspace(0, end_s, number + 1, endpoint=False)[1:].tolist(), see=see)
