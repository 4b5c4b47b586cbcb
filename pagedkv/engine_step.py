"""What a compiled loop over steps asks of an engine's scheduler: a version of each function for each kind of engine.

A kind is a NamedTuple, `engine`, of an engine's limits, and of arrays if it has a state besides who runs and who waits. `state` are
the `SchedulerArrays`, `requests` the `REQUEST` records, `memory` and `rules` the memory: see `pagedkv.step_memory`.
"""

from typing import Any

from pagedkv.jit import by_kind, lean_jit

RAN_BEFORE, ENTRIES, PREEMPTED, BLOCKER, FAILED, NUM_DECIDED = range(6)
"""In a decision: entries that ran before; entries in all; preemptions; what held the head of the queue up; requests that failed."""


@by_kind
def decide_step(
    engine: Any,
    state: Any,
    requests: Any,
    memory: Any,
    rules: Any,
    segments: Any,
    batch: Any,
    preempted: Any,
    failed: Any,
    decision: Any,
) -> Any:
    """Decide the next step and take its slots.

    Args:
        engine: The engine.
        state: Who runs and who waits: the entries of the step become the first of those who run.
        requests: Their records.
        memory: The memory.
        rules: How it is given.
        segments: What requests share: see `pagedkv.scheduling.content`.
        batch: Receives the entries: running requests in their order, then admissions in theirs.
        preempted: Receives the requests preempted, in order.
        failed: Receives those that are given up, in order: they hold nothing and never come back.
        decision: Receives RAN_BEFORE and so on.
    """


@by_kind
def apply_step(
    engine: Any,
    state: Any,
    requests: Any,
    memory: Any,
    rules: Any,
    segments: Any,
    batch: Any,
    num_entries: int,
    sampled: Any,
    finished: Any,
) -> Any:
    """Apply the step of `batch`, and give back what finished requests hold.

    Receive in `sampled` who got an output token, in scheduling order, in `finished` those of them that are done.

    Returns:
        (number sampled, output tokens that they got, number finished).
    """


@by_kind
def forward_passes(engine: Any, state: Any, requests: Any, batch: Any, num_entries: int, passes: Any, ends: Any) -> Any:
    """Write what is computed together into `passes`, pass after pass, and where each ends into `ends`; return how many there are.

    0: the step of `batch` is computed as it is, in one.
    """


@lean_jit
def in_one_pass(engine: Any, state: Any, requests: Any, batch: Any, num_entries: int, passes: Any, ends: Any) -> int:
    """`forward_passes` of engines that compute a step as it is."""
    return 0


@by_kind
def queue_request(engine: Any, state: Any, requests: Any, request: int) -> Any:
    """Let `request`, which has just arrived, wait."""


@by_kind
def drop_request(engine: Any, state: Any, requests: Any) -> Any:
    """Take the one whose turn it is out of the queue for good, and return it."""
