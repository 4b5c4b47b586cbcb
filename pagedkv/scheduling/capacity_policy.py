"""Who may run in a step for TensorRT-LLM's capacity scheduler: one function per policy.

Rules, not code, of its capacityScheduler.cpp. Requests come in queue order, by priority and arrival, started or not; the answer's
order is the one in which the micro-batch scheduler looks at them.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, Protocol

from pagedkv.scheduling.step import Blocker


class BlockNeeds(Protocol):
    """What a policy asks about memory."""

    @property
    def free_blocks(self) -> int:
        """Blocks that nobody holds now."""

    def blocks_to_completion(self, request: int) -> int:
        """Return the blocks that `request` lacks to run to its end."""

    def blocks_for_step(self, request: int) -> int:
        """Return the blocks that `request` lacks for its next step: of one that has not started, those of all known tokens."""

    def is_delayed(self, request: int) -> bool:
        """Return whether `request` had better wait a step to reuse a block that another one is about to fill.

        Asked once per request and step: who is not delayed is taken to fill its first block.
        """

    def pause(self, request: int) -> None:
        """Take the blocks of a started request away."""


class Fitting(NamedTuple):
    """What a policy answers."""

    requests: list[int]
    """Who may run."""
    blocker: Blocker = Blocker.TOKEN_BUDGET
    """Why the next one may not; if there is none, only tokens can hold up those who may."""


Policy = Callable[[BlockNeeds, Iterable[int], Sequence[int], int], Fitting]
"""(needs, all requests in queue order, those of them that have started, most requests) -> who may run."""


def guaranteed_no_evict(needs: BlockNeeds, active: Iterable[int], started: Sequence[int], most: int) -> Fitting:
    """Let all started ones go on; admit who can get all blocks to its end besides theirs, until the first who cannot. No pause."""
    going_on = set(started)
    pending = (request for request in active if request not in going_on and not needs.is_delayed(request))
    return _admit_to_completion(needs, pending, started, most)


def static_batch(needs: BlockNeeds, active: Iterable[int], started: Sequence[int], most: int) -> Fitting:
    """Do the same, but admit only when nobody has started, and delay nobody."""
    if started:
        return Fitting(list(started), Blocker.MAX_NUM_SEQS)
    return _admit_to_completion(needs, active, (), most)


def _admit_to_completion(needs: BlockNeeds, pending: Iterable[int], started: Sequence[int], most: int) -> Fitting:
    fitting, left = list(started), None
    for request in pending:
        if len(fitting) >= most:
            return Fitting(fitting, Blocker.MAX_NUM_SEQS)
        if left is None:
            left = needs.free_blocks - sum(map(needs.blocks_to_completion, started))
        needed = needs.blocks_to_completion(request)
        if needed > left:
            return Fitting(fitting, Blocker.KV_MEMORY)
        fitting.append(request)
        left -= needed
    return Fitting(fitting)


def max_utilization(needs: BlockNeeds, active: Iterable[int], started: Sequence[int], most: int) -> Fitting:
    """Let run who gets the blocks of its next step; for one who does not, pause the started ones behind it, the last one first.

    It ends at the first who does not get them though none is left to pause, and where the first paused one stands: nobody
    overtakes those.
    """
    fitting: list[int] = []
    taken, behind, end = 0, deque(started), None
    for request in active:
        if request == end:
            return Fitting(fitting, Blocker.KV_MEMORY)
        if needs.is_delayed(request):
            continue
        needed = needs.blocks_for_step(request)
        while len(fitting) >= most or taken + needed > needs.free_blocks:
            if not behind:
                return Fitting(fitting, Blocker.MAX_NUM_SEQS if len(fitting) >= most else Blocker.KV_MEMORY)
            end = behind.pop()
            needs.pause(end)
            if end == request:
                return Fitting(fitting, Blocker.KV_MEMORY)
        fitting.append(request)
        taken += needed
        if behind and behind[0] == request:
            behind.popleft()
    return Fitting(fitting)


CAPACITY_POLICIES: dict[str, Policy] = {
    "guaranteed_no_evict": guaranteed_no_evict,
    "max_utilization": max_utilization,
    "static_batch": static_batch,
}
"""By TensorRT-LLM's names, in lower case."""
