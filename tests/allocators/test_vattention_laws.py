"""No page has two owners, no content is lost, and what fits is what an oracle says that only counts pages."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from vattention_requests import PAGE, allocator, grow, state

from pagedkv.kv_request import KVRequest

OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["admit", "grow", "grow", "free", "preempt", "premap", "manage"]), st.integers(0, 9), st.integers(1, 12)
    )
)


@given(
    operations=OPERATIONS,
    num_pages=st.integers(1, 8),
    state_slots=st.sampled_from([0, 0, 1, 5]),
    watermark=st.sampled_from([0.0, 0.0, 0.3]),
)
def test_whatever_is_mapped_where_no_content_is_lost(
    operations: list[tuple[str, int, int]], num_pages: int, state_slots: int, watermark: float
) -> None:
    """A memory of physical slots, and an oracle that only counts pages: it knows what fits, whatever is mapped where."""
    vattention = allocator(num_pages, state_slots=state_slots, watermark=watermark)
    memory = np.zeros((vattention.num_slots, 2), np.int64)
    live: list[KVRequest] = []
    written: dict[KVRequest, int] = {}
    state_pages = -(-state_slots // PAGE)

    def taken(tokens: int) -> int:
        return -(-tokens // PAGE) + state_pages if tokens else 0

    for number, (operation, which, tokens) in enumerate(operations, start=1):
        if operation == "manage":
            vattention.manage_pages()
        elif operation == "admit" and len(live) < vattention.max_num_seqs:
            request = KVRequest(request_id=number, num_tokens=tokens)
            live.append(request)
            kept = int(watermark * num_pages)
            fits = sum(taken(r.num_computed_tokens) for r in live) + taken(tokens) + kept <= num_pages
            before = state(vattention)
            assert grow(vattention, request, tokens, busy=True) == fits
            if not fits:
                assert state(vattention) == before
                live.pop()
        elif operation in ("free", "preempt") and live:
            getattr(vattention, operation)(live.pop(which % len(live)))
        elif operation == "premap" and live:
            vattention.premap(live[which % len(live)], tokens)
        elif operation == "grow" and live:
            request = live[which % len(live)]
            more = min(tokens, vattention.max_model_len - request.num_computed_tokens)
            if more:
                now = request.num_computed_tokens
                fits = sum(taken(r.num_computed_tokens) for r in live) - taken(now) + taken(now + more) <= num_pages
                before = state(vattention)
                assert grow(vattention, request, more) == fits
                assert fits or state(vattention) == before
        vattention.check_integrity()
        slots = [slot for request in live for slot in vattention.slots_held(request).tolist()]
        assert len(set(slots)) == len(slots)
        assert vattention.free_slots == (num_pages - sum(taken(r.num_computed_tokens) for r in live)) * PAGE
        assert vattention.free_slots + len(slots) + vattention.state_slots * len(live) == vattention.usable_slots
        for request in live:
            held = vattention.slots_held(request)
            assert held.size == vattention.num_slots_held(request) == (taken(request.num_computed_tokens) - state_pages) * PAGE
            for t in range(written.get(request, 0), request.num_computed_tokens):
                memory[held[t]] = request.request_id, t
            written[request] = request.num_computed_tokens
            content = memory[held[: request.num_computed_tokens]].tolist()
            assert content == [[request.request_id, t] for t in range(request.num_computed_tokens)]
    counts, pages = vattention.counts, vattention.pages
    assert counts.mapped + counts.premapped - counts.reclaimed - counts.unmapped == pages.arrays.num_mapped.sum()
    for request in live:
        vattention.free(request)
    assert vattention.free_slots == vattention.usable_slots


@given(
    left=st.lists(st.integers(1, 9), max_size=3),
    num_pages=st.integers(1, 6),
    prompt=st.integers(1, 12),
    output=st.integers(1, 12),
    state_slots=st.integers(0, 5),
)
def test_who_can_ever_fit_fits_alone(left: list[int], num_pages: int, prompt: int, output: int, state_slots: int) -> None:
    vattention = allocator(num_pages, watermark=0.5, state_slots=state_slots)
    for tokens in left:  # pages stay mapped behind idle rows
        gone = KVRequest(request_id="gone", num_tokens=tokens)
        if grow(vattention, gone, tokens):
            vattention.free(gone)
    alone = KVRequest(request_id="alone", num_tokens=prompt)
    grown = grow(vattention, alone, prompt) and all(grow(vattention, alone, 1, busy=True) for _ in range(output - 1))
    assert grown == (vattention.admission_slots(prompt, output) is not None)
