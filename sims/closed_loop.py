"""How many people a load has who wait for their answers, and how long they pause, for judging by Little's law."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pagedkv.sims.load import ClosedLoop, Load
from pagedkv.sims.simulation import Run
from pagedkv.sims.workload import Workload


class People(NamedTuple):
    """Users of a closed loop."""

    users: int
    pause_s: float
    """Mean before a request, over the requests of the run."""


def people(load: Load, runs: Sequence[Run]) -> People | None:
    """Return who waits for answers in `load`; None if requests arrive by themselves."""
    if isinstance(load, ClosedLoop):
        return People(load.users, load.think_time_s)
    if isinstance(load, Workload) and load.is_closed:
        return People(sum(load.num_users), load.mean_pause_s(np.concatenate([run.measured.user_class for run in runs])))
    return None


def is_batch(load: Load) -> bool:
    """Return whether all of `load` is there from the start: its requests wait for each other, however few they are."""
    return isinstance(load, Workload) and load.is_batch
