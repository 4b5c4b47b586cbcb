"""llama.cpp's server and Ollama: all rules together on random loads."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from llama_cpp_scheduling import server

from pagedkv.scheduling.content import shared_segments


@given(
    requests=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 12), st.integers(0, 3)), min_size=1, max_size=14),
    allocator=st.sampled_from(["llama-cpp-unified", "llama-cpp-split", "ollama"]),
    cells=st.integers(4, 60),
    slots=st.integers(1, 4),
    n_batch=st.integers(4, 40),
    at_once=st.integers(1, 14),
    cont_batching=st.booleans(),
)
def test_every_request_is_served_or_fails_and_no_slot_is_lost(
    requests: list[tuple[int, int, int]], allocator: str, cells: int, slots: int, n_batch: int, at_once: int, cont_batching: bool
) -> None:
    one = server(
        cells=cells,
        slots=slots,
        allocator=allocator,
        context=cells // slots if allocator == "ollama" and cells >= slots else None,
        n_batch=n_batch,
        cont_batching=cont_batching,
    )
    accepted: list[int] = []
    served: set[int] = set()
    failed: list[int] = []
    started: list[int] = []
    arrivals = list(requests)
    while arrivals or one.num_running or one.num_waiting:
        for prompt, output, stream in [arrivals.pop(0) for _ in range(min(len(arrivals), at_once))]:
            content = shared_segments(np.array([stream]), np.array([prompt])) if stream else None
            added = one.add(prompt_tokens=prompt, output_tokens=output, content=content)
            accepted += [] if added is None else [added]
        if not one.num_running and not one.num_waiting:
            continue
        step = one.schedule()
        one.check_integrity()
        started += step.batch["request"][step.num_running_before : step.num_entries].tolist()
        if one.failed.size:
            assert allocator == "llama-cpp-unified"  # nobody else shares cells
            assert step.num_entries == one.num_running == 0
            assert one.allocator.free_slots == one.allocator.usable_slots
            failed += one.failed.tolist()
        else:
            assert 0 < step.batch["num_scheduled_tokens"][: step.num_entries].sum() <= n_batch
            one.complete()
            served.update(one.finished.tolist())
            one.check_integrity()
        assert not one.preempted.size
        assert one.num_running <= slots
    assert sorted([*served, *failed]) == accepted
    assert started == sorted(set(started))  # in order of arrival, each once
    assert one.allocator.free_slots == one.allocator.usable_slots
    assert not one._memory.slots.runs.any()
