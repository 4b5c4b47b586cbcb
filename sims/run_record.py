"""What was recorded of a run, to be read: by one recorder, or by those of all replicas together."""

from pagedkv.sims.recording import (
    ACCEPTED_TOKENS,
    DRAFT_TOKENS,
    HIT_TOKENS,
    ITERATIONS,
    LOADED_TOKENS,
    NUM_COMPLETED,
    NUM_OUTPUT_TOKENS,
    NUM_PREEMPTIONS,
    OFFLOADED_TOKENS,
    QUERIED_TOKENS,
    REQUEST_STEPS,
    RESUMED_HIT_TOKENS,
    RESUMED_TOKENS,
    RUNNING_MAX,
    Integrals,
    RecorderArrays,
)
from pagedkv.sims.timeline import TimelineArrays


class RunRecord:
    """Integrals, counts and the timeline of a run."""

    def __init__(self, arrays: RecorderArrays, *, caches_prefixes: bool, offloads: bool = False) -> None:
        self.arrays = arrays
        self.caches_prefixes = caches_prefixes
        """Whether there is a prefix cache."""
        self.offloads = offloads
        """Whether a second tier keeps what leaves it."""

    @property
    def integrals(self) -> Integrals:
        """Sums over the measured window."""
        return Integrals.of(self.arrays.sums, self.arrays.itl_bins)

    @property
    def timeline(self) -> TimelineArrays:
        """The gauges over time."""
        return self.arrays.timeline

    @property
    def iterations(self) -> int:
        """Steps of the run."""
        return int(self.arrays.counters[ITERATIONS])

    @property
    def request_steps(self) -> int:
        """Requests in a step, summed over all steps of the run."""
        return int(self.arrays.counters[REQUEST_STEPS])

    @property
    def running_max(self) -> int:
        """Most requests that ran at once within the window."""
        return int(self.arrays.counters[RUNNING_MAX])

    @property
    def num_preemptions(self) -> int:
        """Within the window."""
        return int(self.arrays.counters[NUM_PREEMPTIONS])

    @property
    def num_output_tokens(self) -> int:
        """Within the window."""
        return int(self.arrays.counters[NUM_OUTPUT_TOKENS])

    @property
    def num_completed(self) -> int:
        """Requests that finished within the window, whenever they arrived."""
        return int(self.arrays.counters[NUM_COMPLETED])

    @property
    def prefix_tokens(self) -> tuple[int, int]:
        """Tokens of requests admitted for the first time, and those of them found in the prefix cache, within the window."""
        return int(self.arrays.counters[QUERIED_TOKENS]), int(self.arrays.counters[HIT_TOKENS])

    @property
    def copied_tokens(self) -> tuple[int, int]:
        """Tokens copied from a second tier, and to it, within the window."""
        return int(self.arrays.counters[LOADED_TOKENS]), int(self.arrays.counters[OFFLOADED_TOKENS])

    @property
    def draft_tokens(self) -> tuple[int, int]:
        """Tokens that were drafted and verified, and those of them accepted, in all of the run."""
        return int(self.arrays.counters[DRAFT_TOKENS]), int(self.arrays.counters[ACCEPTED_TOKENS])

    @property
    def resumed_tokens(self) -> tuple[int, int]:
        """Tokens of preempted requests that came back, and those of them found, within the window."""
        return int(self.arrays.counters[RESUMED_TOKENS]), int(self.arrays.counters[RESUMED_HIT_TOKENS])
