"""The timeline of a memory request that has a budget, or that its engine refuses at the start."""

from pagedkv.memory_budget import Shortage
from pagedkv.memory_plan import refuse
from pagedkv.memory_request import MemoryRequest
from pagedkv.memory_timeline import MemoryTimeline
from pagedkv.start_phases import attempt_timeline
from pagedkv.start_up import StartOptions


def memory_timeline(request: MemoryRequest, options: StartOptions = StartOptions()) -> MemoryTimeline:  # noqa: B008
    """Return the phases from before the engine starts until it serves.

    An engine that refuses to start ends the timeline there.

    Raises:
        ConfigError: As `plan`, but for such a refusal; or if an option cannot be, with what can.
    """
    outcome = attempt_timeline(request, options)
    if isinstance(outcome, Shortage):
        raise refuse(request, outcome)
    return outcome
