"""Who a scheduler knows, who of them runs, in which row, and who waits: the arrays of `waiting`, and room for all."""

import numpy as np

from pagedkv.arrays import Int64Array
from pagedkv.errors import IntegrityError
from pagedkv.jit import fixed_types
from pagedkv.scheduling.requests import NO_ROW, RequestTable
from pagedkv.scheduling.waiting import (
    NUM_RUNNING,
    NUM_WAITING,
    WAITING_HEAD,
    SchedulerArrays,
    drop_head,
    goes_before,
    leave_running,
    push_waiting,
    return_waiting,
    start_running,
    stop_running,
    withdraw_waiting,
)

# Their arguments have the same types in every roster.
_push_waiting = fixed_types(push_waiting)
_return_waiting = fixed_types(return_waiting)
_start_running = fixed_types(start_running)
_withdraw_waiting = fixed_types(withdraw_waiting)


class Roster:
    """The requests of one scheduler. Who leaves a row leaves its memory too, which whoever called gives back."""

    def __init__(self, *, max_num_seqs: int, by_priority: bool) -> None:
        self.requests = RequestTable()
        self.arrays = SchedulerArrays.empty(max_num_seqs, waiting_capacity=256)
        self.by_priority = by_priority
        """The queue is a heap."""
        self.in_step = False
        """A step is decided and not completed: its forward pass uses the rows of those who run, so nobody may leave."""

    @property
    def num_running(self) -> int:
        """Requests in the running batch."""
        return int(self.arrays.counts[NUM_RUNNING])

    @property
    def num_waiting(self) -> int:
        """Requests in the queue."""
        return int(self.arrays.counts[NUM_WAITING])

    def running(self) -> Int64Array:
        """Return who runs, in the order of admission. A view."""
        return self.arrays.running[: self.num_running]

    def waiting(self) -> Int64Array:
        """Return the queue, its head first; under policy priority the others in no order. O(waiting)."""
        return self.arrays.waiting[self._places()]

    def _places(self) -> Int64Array:
        places: Int64Array = self.arrays.counts[WAITING_HEAD] + np.arange(self.num_waiting)
        return places % self.arrays.waiting.size

    def queue(self, request: int) -> None:
        """Let a new `request` wait behind the others, or in its place by priority. O(1), or O(log waiting)."""
        self._make_room(self.num_waiting + self.num_running)
        _push_waiting(self.arrays, self.requests.arrays, request, self.by_priority)

    def expect_all(self) -> None:
        """Have room for all known requests in the queue, so that compiled code can put them there as they arrive."""
        self._make_room(self.requests.size)

    def join(self, request: int) -> int | None:
        """Let a new `request` run at once; return its row. If none is free it waits in front of the others: None."""
        if self.num_running == self.arrays.running.size:
            self._make_room(self.num_waiting + self.num_running)
            _return_waiting(self.arrays, self.requests.arrays, request, self.by_priority)
            return None
        row = int(self.arrays.free_rows[self.num_running])
        _start_running(self.arrays, self.requests.arrays, request, row)
        return row

    def _make_room(self, num_others: int) -> None:
        """Let the queue have places for one more than so many: preempted requests come back to it, so whoever runs has one."""
        while num_others + 1 >= self.arrays.waiting.size:
            waiting, head = self.arrays.waiting, self.arrays.counts[WAITING_HEAD]  # a heap begins at 0
            self.arrays = self.arrays._replace(waiting=np.concatenate((np.roll(waiting, -head), np.zeros_like(waiting))))
            self.arrays.counts[WAITING_HEAD] = 0

    def stop(self, place: int) -> int:
        """Preempt the running request at `place`; return the row that it leaves. O(running)."""
        return int(stop_running(self.arrays, self.requests.arrays, place, self.by_priority))

    def leave(self, request: int) -> int | None:
        """Take `request` out of the running batch for good; return the row that it leaves, None if it does not run. O(running)."""
        place = np.flatnonzero(self.running() == request)
        return int(leave_running(self.arrays, self.requests.arrays, int(place[0]))) if place.size else None

    def withdraw(self, request: int) -> bool:
        """Take `request` out of the queue for good; return whether it was there. O(waiting), or O(waiting log waiting)."""
        return bool(_withdraw_waiting(self.arrays, self.requests.arrays, request, self.by_priority))

    def to_front(self, request: int) -> int | None:
        """Let `request`, which is there, wait before all others, fcfs; return the row that it leaves if it runs. O(all)."""
        if self.withdraw(request):
            _return_waiting(self.arrays, self.requests.arrays, request, self.by_priority)
            return None
        return self.stop(int(np.flatnonzero(self.running() == request)[0]))

    def drop_head(self) -> int:
        """Take the head of the queue out for good and return it."""
        return int(drop_head(self.arrays, self.requests.arrays, self.by_priority))

    def present(self) -> Int64Array:
        """Return all who run or wait, ascending. O(all log all)."""
        return np.sort(np.concatenate((self.running(), self.waiting())))

    def keep(self, present: Int64Array, room: Int64Array) -> None:
        """Know only those who are present from now on, numbered from 0: see `RequestTable.keep`. O(all)."""
        running, places = self.running(), self._places()
        running[:] = np.searchsorted(present, running)
        self.arrays.waiting[places] = np.searchsorted(present, self.arrays.waiting[places])
        self.requests.keep(present, room)

    def check_integrity(self, slots_held: Int64Array) -> None:
        """Raise IntegrityError unless rows, queue and running batch fit together, and with `slots_held`, by row."""
        requests, running, waiting = self.requests.arrays, self.running(), self.waiting()
        rows, free_rows = requests["row"][running], self.arrays.free_rows[self.num_running :]
        slots = slots_held[rows]
        if (
            not np.array_equal(np.sort(np.concatenate((rows, free_rows))), np.arange(self.arrays.running.size))
            or np.unique(np.concatenate((running, waiting))).size != running.size + waiting.size
            or (requests["row"][waiting] != NO_ROW).any()
            or requests["num_computed_tokens"][waiting].any()
            or (slots < requests["num_computed_tokens"][running]).any()
            or slots_held[free_rows].any()
            or (self.by_priority and any(goes_before(requests, waiting[i], waiting[(i - 1) // 2]) for i in range(1, waiting.size)))
        ):
            raise IntegrityError(
                f"running {running.tolist()} in rows {rows.tolist()} with {slots.tolist()} slots, waiting {waiting.tolist()}"
            )
