"""A queue in order of priority and arrival, of which anybody may leave: the ring of `waiting`, kept sorted, compiled."""

from pagedkv.jit import lean_jit
from pagedkv.scheduling.requests import RequestArrays
from pagedkv.scheduling.waiting import NUM_WAITING, WAITING_HEAD, SchedulerArrays, goes_before


@lean_jit
def waiting_at(state: SchedulerArrays, place: int) -> int:
    """Return who waits at `place`, counted from the head."""
    return int(state.waiting[(state.counts[WAITING_HEAD] + place) % state.waiting.size])


@lean_jit
def _place_of(state: SchedulerArrays, requests: RequestArrays, request: int) -> int:
    """Return how many of those who wait go before `request`. O(log waiting)."""
    low, high = 0, state.counts[NUM_WAITING]
    while low < high:
        middle = (low + high) // 2
        if goes_before(requests, waiting_at(state, middle), request):
            low = middle + 1
        else:
            high = middle
    return int(low)


@lean_jit
def join_line(state: SchedulerArrays, requests: RequestArrays, request: int) -> None:
    """Let `request` wait in its place. O(log waiting + those before or behind it, whoever are fewer)."""
    counts, waiting, place = state.counts, state.waiting, _place_of(state, requests, request)
    number = counts[NUM_WAITING]
    counts[NUM_WAITING] = number + 1
    if 2 * place < number:
        head = counts[WAITING_HEAD] = (counts[WAITING_HEAD] - 1) % waiting.size
        for i in range(place):
            waiting[(head + i) % waiting.size] = waiting_at(state, i + 1)
    else:
        head = counts[WAITING_HEAD]
        for i in range(number, place, -1):
            waiting[(head + i) % waiting.size] = waiting_at(state, i - 1)
    waiting[(head + place) % waiting.size] = request


@lean_jit
def leave_line(state: SchedulerArrays, requests: RequestArrays, request: int) -> None:
    """Take `request`, which waits, out of the queue. O(log waiting + those before or behind it, whoever are fewer)."""
    counts, waiting, place = state.counts, state.waiting, _place_of(state, requests, request)
    number, head = counts[NUM_WAITING], counts[WAITING_HEAD]
    counts[NUM_WAITING] = number - 1
    if 2 * place < number:
        for i in range(place, 0, -1):
            waiting[(head + i) % waiting.size] = waiting_at(state, i - 1)
        counts[WAITING_HEAD] = (head + 1) % waiting.size
    else:
        for i in range(place, number - 1):
            waiting[(head + i) % waiting.size] = waiting_at(state, i + 1)
