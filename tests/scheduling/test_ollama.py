"""Ollama: a context for each slot, and a queue with an end."""

import numpy as np
import pytest
from llama_cpp_scheduling import finish, server
from steps import add, advance

from pagedkv.errors import ConfigError
from pagedkv.scheduling.llama_cpp_scheduler import OLLAMA, LlamaCppScheduler


def ollama(*, context: int, parallel: int, max_queue: int = 2) -> LlamaCppScheduler:
    return server(cells=context * parallel, slots=parallel, context=context, allocator="ollama", max_queue=max_queue)


def test_ollama_reserves_a_context_for_each_slot_at_load() -> None:
    """ "every slot gets NumCtx, all reserved at load"; "cannot occur (slot-bound)"."""
    one = ollama(context=16, parallel=2)
    add(one, (1, 1))
    one.schedule()
    assert (one.allocator.units_held.sum(), one.allocator.free_slots) == (16, 16)
    assert one.add(prompt_tokens=9, output_tokens=8) is None  # longer than a context
    assert one.num_turned_away == 0


def test_ollama_turns_away_who_finds_the_queue_full() -> None:
    """ "OLLAMA_MAX_QUEUE 512 (then 503)"."""
    assert OLLAMA.max_queue == 512
    one = ollama(context=16, parallel=1, max_queue=2)
    assert add(one, (4, 2), (4, 2), (4, 2), (4, 2)) == [0, 1, 2, None]  # one for the slot, two wait
    advance(one)
    assert (add(one, (4, 2)), one.num_turned_away) == ([None], 2)
    advance(one)  # request 0 ends
    assert add(one, (4, 2), (4, 2)) == [3, None]
    assert len(finish(one)) == 6


def test_only_a_queue_without_limit_can_be_told_who_will_come() -> None:
    lengths = np.array([4, 90, 4]), np.array([2, 20, 2])
    assert server(cells=100).add_all(*lengths).tolist() == [True, False, True]
    with pytest.raises(ConfigError, match="add them one by one"):
        ollama(context=16, parallel=1).add_all(*lengths)
