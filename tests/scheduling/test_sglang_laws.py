"""SGLang's scheduler: all of its rules together on random loads."""

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang_scheduling import scheduler, text
from steps import advance

from pagedkv.scheduling.sglang_queue import QUEUE_POLICIES

REQUEST = st.fixed_dictionaries(
    {
        "prompt_tokens": st.integers(1, 60),
        "output_tokens": st.integers(1, 40),
        "ignore_eos": st.booleans(),
        "content": st.none() | st.builds(text, st.integers(0, 2), st.integers(1, 50)),
    }
)


@settings(max_examples=40)
@given(
    policy=st.sampled_from(sorted(QUEUE_POLICIES)),
    load=st.lists(st.tuples(REQUEST, st.integers(0, 3)), min_size=1, max_size=14),
    shape=st.sampled_from([(1, 110), (4, 112), (16, 160)]),
    chunk=st.sampled_from([None, 16, 32]),
    mixed=st.booleans(),
    caching=st.booleans(),
    conservativeness=st.sampled_from([0.1, 1.0]),
)
def test_everyone_is_served_and_no_slot_is_lost(
    policy: str,
    load: list[tuple[dict[str, Any], int]],
    shape: tuple[int, int],
    chunk: int | None,
    mixed: bool,
    caching: bool,
    conservativeness: float,
) -> None:
    block_size, slots = shape
    one = scheduler(
        slots=slots,
        block_size=block_size,
        rows=4,
        caching=caching or policy == "shortest-prefill-first",
        schedule_policy=policy,
        chunked_prefill_size=chunk,
        enable_mixed_chunk=mixed and chunk is not None,
        schedule_conservativeness=conservativeness,
    )
    accepted, finished, sampled = set[int](), list[int](), 0
    for request, pause in load:
        if (index := one.add(**request)) is not None:
            accepted.add(index)
        for _ in range(pause if one.num_running or one.num_waiting else 0):
            if not (one.num_running or one.num_waiting):
                break
            assert advance(one)
            finished += one.finished.tolist()
            sampled += one.sampled.size
    while one.num_running or one.num_waiting:
        step = one.schedule()
        rows = step.batch["row"][: step.num_entries]
        assert 0 < step.num_entries == np.unique(rows).size <= 4
        assert one.failed.size == 0
        one.check_integrity()
        one.complete()
        one.check_integrity()
        finished += one.finished.tolist()
        sampled += one.sampled.size
    assert sorted(finished) == sorted(accepted)
    assert sampled == one.requests.arrays["output_tokens"][sorted(accepted)].sum()
    assert one.allocator.free_slots == one.allocator.usable_slots
    assert caching or policy == "shortest-prefill-first" or one.cached_slots == 0
