"""llama.cpp's server: which slot a request gets, and what it finds there."""

from llama_cpp_scheduling import chat, finish, server
from steps import advance

from pagedkv.scheduling.llama_cpp_scheduler import LlamaCppScheduler


def slot_of(one: LlamaCppScheduler, request: int) -> int:
    slots = one._memory.slots
    slot = int(one.requests.arrays["row"][request])
    assert (slots.runs[slot], slots.requests[slot]) == (1, request)
    return slot


def test_the_slot_with_the_longest_common_prefix_is_chosen_else_the_least_recently_used() -> None:
    """ "slot with best LCP/prompt ratio > -sps (0.1 default), else LRU slot"."""
    one = server(cells=300, slots=3)
    for stream, output in ((1, 3), (2, 1), (3, 2)):
        chat(one, stream, 30, output)
    advance(one)
    home = {request: slot_of(one, request) for request in (0, 2)}
    finish(one)
    home[1] = ({0, 1, 2} - set(home.values())).pop()
    chat(one, 3, 40, 1)  # goes on where request 2 was, all it computed is found
    assert advance(one) == [(3, 9)]
    assert one.requests.arrays["num_cached_tokens"][3] == 31
    chat(one, 9, 40, 3)  # knows nobody: goes where request 1 was, which ended first
    chat(one, 1, 40, 3, shared=4)  # 4 of 40 tokens are not more than a tenth: the next by age is where request 0 was
    advance(one)
    assert (slot_of(one, 4), slot_of(one, 5)) == (home[1], home[0])
    assert one.requests.arrays["num_cached_tokens"][5] == 4  # what it has in common with that slot is kept all the same


def test_the_last_token_is_always_computed() -> None:
    """ "last token rule: ≤ len−1"."""
    one = server(cells=64)
    chat(one, 1, 10, 4)
    finish(one)
    chat(one, 1, 10, 4)
    assert advance(one) == [(1, 1)]


def test_a_prefix_is_not_shared_between_slots() -> None:
    """ "duplicates of a prefix: per slot"."""
    one = server(cells=64)
    chat(one, 1, 10, 4)
    chat(one, 1, 10, 4)
    assert advance(one) == [(0, 10), (1, 10)]
    assert one.shared_slots == 0


def test_without_cache_prompt_nothing_is_found() -> None:
    one = server(cells=64, cache_prompt=False)
    chat(one, 1, 10, 1)
    finish(one)
    chat(one, 1, 10, 1)
    assert advance(one) == [(1, 10)]
