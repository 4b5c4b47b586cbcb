"""Who runs and who waits: a ring under fcfs, a heap by (priority, arrival) under priority. Compiled functions over its arrays."""

from typing import Any, NamedTuple

import numpy as np

from pagedkv.arrays import Int32Array, Int64Array
from pagedkv.jit import lean_jit
from pagedkv.scheduling.requests import NO_ROW, RequestArrays

NUM_RUNNING, WAITING_HEAD, NUM_WAITING, NUM_DRAFTED, NUM_ACCEPTED = range(5)
"""In `SchedulerArrays.counts`. The last two since the start: tokens that were drafted and verified, and those of them accepted."""


class SchedulerArrays(NamedTuple):
    """Who runs, who waits, and which rows are free."""

    running: Int64Array
    """Request indices in the order of admission; counts[NUM_RUNNING] of them."""
    free_rows: Int32Array
    """A stack: free_rows[counts[NUM_RUNNING]:] are the rows that nobody has, the next to be given first."""
    waiting: Int64Array
    """Request indices: counts[NUM_WAITING] of them from counts[WAITING_HEAD] on, around the end of the array; or a heap."""
    counts: Int64Array

    @classmethod
    def empty(cls, max_num_seqs: int, waiting_capacity: int) -> "SchedulerArrays":
        """Return the state with nobody in it."""
        running, waiting = np.zeros(max_num_seqs, np.int64), np.zeros(waiting_capacity, np.int64)
        return cls(running, np.arange(max_num_seqs, dtype=np.int32), waiting, np.zeros(5, np.int64))


@lean_jit
def goes_before(requests: RequestArrays, a: int, b: int) -> bool:
    """Return whether `a` is more urgent than `b`, or as urgent and earlier."""
    pa, pb = requests["priority"][a], requests["priority"][b]
    return bool(pa < pb or (pa == pb and a < b))


@lean_jit
def _sift_in(state: SchedulerArrays, requests: RequestArrays, request: int) -> None:
    waiting, place = state.waiting, state.counts[NUM_WAITING]
    while place > 0:
        parent = (place - 1) // 2
        if not goes_before(requests, request, waiting[parent]):
            break
        waiting[place] = waiting[parent]
        place = parent
    waiting[place] = request
    state.counts[NUM_WAITING] += 1


@lean_jit
def push_waiting(state: SchedulerArrays, requests: RequestArrays, request: int, by_priority: bool) -> None:  # noqa: FBT001
    """Let `request` wait behind the others, or in its place by priority. O(1), or O(log waiting)."""
    if by_priority:
        _sift_in(state, requests, request)
        return
    state.waiting[(state.counts[WAITING_HEAD] + state.counts[NUM_WAITING]) % state.waiting.size] = request
    state.counts[NUM_WAITING] += 1


@lean_jit
def return_waiting(state: SchedulerArrays, requests: RequestArrays, request: int, by_priority: bool) -> None:  # noqa: FBT001
    """Let a preempted `request` wait in front of the others, or in its place by priority."""
    if by_priority:
        _sift_in(state, requests, request)
        return
    head = (state.counts[WAITING_HEAD] - 1) % state.waiting.size
    state.waiting[head] = request
    state.counts[WAITING_HEAD] = head
    state.counts[NUM_WAITING] += 1


@lean_jit
def drop_head(state: SchedulerArrays, requests: RequestArrays, by_priority: bool) -> int:  # noqa: FBT001
    """Take out the one whose turn it is, waiting[counts[WAITING_HEAD]], and return it."""
    waiting = state.waiting
    first: int = waiting[state.counts[WAITING_HEAD]]
    state.counts[NUM_WAITING] -= 1
    if not by_priority:
        state.counts[WAITING_HEAD] = (state.counts[WAITING_HEAD] + 1) % waiting.size
        return first
    size = state.counts[NUM_WAITING]
    request, place = waiting[size], 0
    while True:
        child = 2 * place + 1
        if child >= size:
            break
        if child + 1 < size and goes_before(requests, waiting[child + 1], waiting[child]):
            child += 1
        if not goes_before(requests, waiting[child], request):
            break
        waiting[place] = waiting[child]
        place = child
    waiting[place] = request
    return first


@lean_jit
def queue_last(engine: Any, state: SchedulerArrays, requests: RequestArrays, request: int) -> None:
    """`queue_request` of engines that serve in order of arrival."""
    push_waiting(state, requests, request, False)  # noqa: FBT003


@lean_jit
def drop_first(engine: Any, state: SchedulerArrays, requests: RequestArrays) -> int:
    """`drop_request` of engines whose queue is a ring."""
    return drop_head(state, requests, False)  # noqa: FBT003


@lean_jit
def withdraw_waiting(state: SchedulerArrays, requests: RequestArrays, request: int, by_priority: bool) -> bool:  # noqa: FBT001
    """Take `request` out of the queue, wherever it is; return whether it was there. O(waiting), or O(waiting log waiting)."""
    found, size, head = False, state.counts[NUM_WAITING], state.counts[WAITING_HEAD]
    state.counts[NUM_WAITING] = 0
    for i in range(size):  # everybody queues again, in the places of those that have been read
        other = state.waiting[(head + i) % state.waiting.size]
        if other == request:
            found = True
        else:
            push_waiting(state, requests, other, by_priority)
    return found


@lean_jit
def start_running(state: SchedulerArrays, requests: RequestArrays, request: int, row: int) -> None:
    """Let `request`, which has left the queue, run in `row`, behind the others. O(1)."""
    requests["row"][request] = row
    state.running[state.counts[NUM_RUNNING]] = request
    state.counts[NUM_RUNNING] += 1


@lean_jit
def leave_running(state: SchedulerArrays, requests: RequestArrays, place: int) -> int:
    """Take the running request at `place` out; return the row that it leaves, which still holds its memory. O(running)."""
    last = state.counts[NUM_RUNNING] - 1
    request = state.running[place]
    row = requests["row"][request]
    for i in range(place, last):
        state.running[i] = state.running[i + 1]
    state.counts[NUM_RUNNING] = last
    state.free_rows[last] = row
    requests["row"][request] = NO_ROW
    requests["num_computed_tokens"][request] = 0
    return int(row)


@lean_jit
def stop_running(state: SchedulerArrays, requests: RequestArrays, place: int, by_priority: bool) -> int:  # noqa: FBT001
    """Let the running request at `place` wait again, its computed tokens forgotten; return the row that it leaves. O(running)."""
    request = state.running[place]
    row = leave_running(state, requests, place)
    requests["num_preemptions"][request] += 1
    return_waiting(state, requests, request, by_priority)
    return row


NOBODY_WAITS, KV_MEMORY, MAX_NUM_SEQS, TOKEN_BUDGET = 0, 1, 2, 3
"""Why the head of the queue did not start: the places of `pagedkv.scheduling.scheduler.Blocker`."""


@lean_jit
def blocker_of(state: SchedulerArrays, refused: bool) -> int:  # noqa: FBT001
    """Return what holds the head of the queue up; `refused` says that memory did, or that there was a preemption."""
    if state.counts[NUM_WAITING] == 0:
        return NOBODY_WAITS
    if refused:
        return KV_MEMORY
    return MAX_NUM_SEQS if state.counts[NUM_RUNNING] == state.running.size else TOKEN_BUDGET
