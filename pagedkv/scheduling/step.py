"""What a scheduler decides, and what a clock asks of any scheduler: the simulator's engine and recorder know no more than this."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from pagedkv.arrays import Int64Array
from pagedkv.scheduling.content import Segments
from pagedkv.scheduling.requests import RequestTable
from pagedkv.scheduling.waiting import SchedulerArrays
from pagedkv.step_allocation import RowMemory
from pagedkv.step_batch import StepBatch


class Blocker(Enum):
    """Why the head of the queue did not start in a step."""

    NONE = "none"
    """Nobody waits."""
    KV_MEMORY = "kv_memory"
    """The allocator had no room for it, or had to preempt for those who run."""
    MAX_NUM_SEQS = "max_num_seqs"
    """Every row of the running batch is taken."""
    TOKEN_BUDGET = "token_budget"
    """The step's tokens were spent: prefill waits for compute."""


BLOCKERS = tuple(Blocker)
"""By the number that compiled code uses."""


@dataclass(slots=True)
class Step:
    """What the scheduler decided. The arrays are reused by the next step."""

    batch: StepBatch
    num_entries: int = 0
    """Entries of `batch` that run."""
    num_running_before: int = 0
    """How many of them ran before; the others are admissions."""
    num_preempted: int = 0
    num_failed: int = 0
    blocker: Blocker = Blocker.NONE


class StepScheduler(Protocol):
    """Decides step by step which requests compute how many tokens. It has no clock."""

    num_output_tokens: int
    """Output tokens of the step completed last: one for each of `sampled`, more where drafts were accepted."""

    @property
    def arrays(self) -> SchedulerArrays:
        """Who runs, the entries of a step first and in its order, and how many wait."""

    @property
    def allocator(self) -> RowMemory:
        """The memory of the running batch."""

    @property
    def requests(self) -> RequestTable:
        """All requests since the start."""

    @property
    def num_running(self) -> int:
        """Requests in the running batch."""

    @property
    def num_waiting(self) -> int:
        """Requests in the queue."""

    @property
    def caches_prefixes(self) -> bool:
        """Whether requests find what others, or they themselves before a preemption, have computed."""

    @property
    def cached_slots(self) -> int:
        """Free slots that keep a prefix for reuse."""

    @property
    def shared_slots(self) -> int:
        """Slots that are held more than once, each counted as often as it is held beyond the first time."""

    @property
    def moved_blocks(self) -> tuple[int, int]:
        """Blocks that the step decided last copies from a second tier of the memory, and to it."""

    @property
    def preempted(self) -> Int64Array:
        """Requests preempted by the step decided last, in order."""

    @property
    def failed(self) -> Int64Array:
        """Requests that the last `schedule` ended with an error, in order: they hold nothing and never come back."""

    @property
    def sampled(self) -> Int64Array:
        """Requests that got an output token in the step completed last, in scheduling order."""

    @property
    def finished(self) -> Int64Array:
        """Those of them that are done."""

    def add(self, *, prompt_tokens: int, output_tokens: int, priority: int = 0, content: Segments | None = None) -> int | None:
        """Put a request into the queue and return its index; None if it is refused."""

    def schedule(self) -> Step:
        """Decide the next step and take its slots.

        A step without entries, with nobody in `failed`, says that the head of the queue cannot run though nobody else does.
        """

    def forward_passes(self) -> Iterator[StepBatch]:
        """Yield what the step decided last computes together: one batch, but where an engine cuts it into micro-batches."""

    def complete(self) -> None:
        """Apply the step decided last: its tokens are computed, `sampled` and `finished` say what came out."""

    def drop_head(self) -> int:
        """Take the head of the queue out for good and return it: the way out when nothing runs and it still does not fit."""

    def check_integrity(self) -> None:
        """Raise IntegrityError, with the state dumped, if an invariant is broken."""
