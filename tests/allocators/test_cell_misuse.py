"""llama.cpp's cells: bad use says what would work and changes nothing, and corruption is noticed."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from cell_requests import EVERY, SPLIT, UNIFIED, admit, allocator_of, forked, request_of, run

from pagedkv.errors import ConfigError, IntegrityError
from pagedkv.kv_request import KVRequest
from pagedkv.shadow_memory import check_unchanged, state_of


@EVERY
@pytest.mark.parametrize(
    ("who", "fields", "call", "message"),
    [
        pytest.param("new", {}, lambda a, r: a.free(r), "never allocated, or was freed before", id="free of nothing"),
        pytest.param("new", {}, lambda a, r: a.preempt(r), "never allocated, or was freed before", id="preemption of nothing"),
        pytest.param("new", {}, lambda a, r: a.note_computed(r), "never allocated, or was freed before", id="news of nobody"),
        pytest.param("live", {}, lambda a, r: a.allocate_slots(r, 0), "0 new", id="no new tokens"),
        pytest.param("live", {}, lambda a, r: a.allocate_slots(r, 14), "17 tokens are more than max_model_len 16", id="too long"),
        pytest.param(
            "new", {}, lambda a, r: a.allocate_slots(r, 17), "17 tokens are more than max_model_len 16", id="too long at once"
        ),
        pytest.param(
            "new", {"num_tokens": 17}, lambda a, r: a.get_computed_tokens(r), "up to max_model_len 16", id="knows too much"
        ),
        pytest.param(
            "live", {"num_computed_tokens": 99}, lambda a, r: a.allocate_slots(r, 1), "99 computed", id="beyond its cells"
        ),
        pytest.param(
            "live", {"num_computed_tokens": 99}, lambda a, r: a.note_computed(r), "99 computed", id="news beyond its cells"
        ),
        pytest.param("new", {"num_computed_tokens": 1}, lambda a, r: a.allocate_slots(r, 1), "1 computed", id="computed nowhere"),
        pytest.param(
            "new", {"num_tokens": 4}, lambda a, r: a.allocate_slots(r, 1), "3 token_ids, but 4", id="admission without tokens"
        ),
        pytest.param(
            "live", {"num_tokens": 4}, lambda a, r: a.allocate_slots(r, 1), "3 token_ids, but 4", id="growth without tokens"
        ),
        pytest.param(
            "new", {"num_tokens": 4}, lambda a, r: a.get_computed_tokens(r), "3 token_ids, but 4", id="look-up without tokens"
        ),
        pytest.param(
            "live", {"token_ids": np.ones(1, np.int32)}, lambda a, r: a.free(r), "1 token_ids, but 3", id="end without tokens"
        ),
    ],
)
def test_bad_use_says_what_would_work_and_changes_nothing(
    name: str, who: str, fields: dict[str, Any], call: Callable[[Any, KVRequest], object], message: str
) -> None:
    allocator = allocator_of(name, 48, seqs=3)
    requests = {title: request_of([i] * 3, title) for i, title in enumerate(("live", "new", "gone"))}
    run(allocator, requests["gone"])
    admit(allocator, requests["live"])
    for field, value in fields.items():
        setattr(requests[who], field, value)
    before = state_of(allocator)
    with pytest.raises(ConfigError, match=message):
        call(allocator, requests[who])
    check_unchanged(before, state_of(allocator))


@EVERY
def test_one_request_too_many_is_a_mistake(name: str) -> None:
    allocator = allocator_of(name, 32)
    for i in range(2):
        admit(allocator, request_of([i], str(i)))
    before = state_of(allocator)
    with pytest.raises(ConfigError, match="free one first, or raise max_num_seqs 2"):
        allocator.allocate_slots(request_of([5]), 1)
    check_unchanged(before, state_of(allocator))


@pytest.mark.parametrize("name", [UNIFIED, SPLIT])
def test_fork_needs_a_parent_that_runs_a_child_that_does_not_and_an_idle_slot(name: str) -> None:
    allocator = allocator_of(name, 32)
    parent, child, new = (request_of([1, 2, 3], title) for title in ("parent", "child", "new"))
    admit(allocator, parent)
    short = request_of([1], "short")
    for first, second, message in (
        (new, child, "holds no"),
        (parent, parent, "holds slots already"),
        (parent, short, "1 known tokens: needs the 3"),
    ):
        before = state_of(allocator)
        with pytest.raises(ConfigError, match=message):
            allocator.fork(first, second)
        check_unchanged(before, state_of(allocator))
    allocator.fork(parent, child)
    before = state_of(allocator)
    with pytest.raises(ConfigError, match="free one first"):
        allocator.fork(parent, new)
    check_unchanged(before, state_of(allocator))


def put(array: Any, at: Any, value: object) -> None:
    array[at] = value


@pytest.mark.parametrize(
    "corrupt",
    [
        pytest.param(lambda a: put(a.cells.arrays.num_seqs, 0, 2), id="one sequence too many"),
        pytest.param(lambda a: put(a.cells.arrays.num_live, 2, 0), id="running cell taken for idle"),
        pytest.param(lambda a: put(a.cells.arrays.num_live, 0, 1), id="idle cell taken for running"),
        pytest.param(lambda a: put(a.cells.arrays.counters, 0, 99), id="head outside"),
        pytest.param(lambda a: put(a.cells.arrays.counters, 1, 4), id="wrong count of used cells"),
        pytest.param(lambda a: put(a.cells.arrays.counters, 2, 4), id="wrong highest cell"),
        pytest.param(lambda a: put(a.cells.arrays.counters, 3, 2), id="wrong count of held cells"),
        pytest.param(lambda a: put(a.arrays.tables, (0, 0), 99), id="cell outside"),
        pytest.param(lambda a: put(a.arrays.tables, (0, 0), 1), id="cell twice in a sequence"),
        pytest.param(lambda a: put(a.arrays.slots.num_kept, 1, 1), id="cell lost"),
        pytest.param(lambda a: setattr(a.server_slots.slots[1], "tokens", np.arange(1, dtype=np.int32)), id="token forgotten"),
        pytest.param(lambda a: setattr(a.server_slots.slots[0], "request", None), id="slot without its request"),
        pytest.param(lambda a: setattr(a.server_slots.slots[0], "num_computed", 4), id="computed beyond its cells"),
        pytest.param(lambda a: a.server_slots._running.clear(), id="request lost"),
    ],
)
def test_unified_notices_corruption(corrupt: Callable[[Any], None]) -> None:
    allocator = allocator_of(UNIFIED, 16)
    live, idle = request_of([1, 2, 3], "live"), request_of([4, 5], "idle")
    admit(allocator, idle)  # cells 0 and 1
    admit(allocator, live)  # cells 2 to 4, slot 0
    allocator.free(idle)
    allocator.check_integrity()
    corrupt(allocator)
    with pytest.raises(IntegrityError):
        allocator.check_integrity()


@pytest.mark.parametrize(
    "corrupt",
    [
        pytest.param(lambda a: put(a._streams, 0, 1), id="stream twice"),
        pytest.param(lambda a: put(a._used, 1, 1), id="idle slot with tokens at work"),
        pytest.param(lambda a: put(a._uncopied, 1, (2, 1)), id="idle slot that waits for copies"),
        pytest.param(lambda a: put(a._uncopied, 0, (1, 4)), id="copies from an idle stream"),
        pytest.param(lambda a: put(a._uncopied, 0, (2, 5)), id="copies of more than it has"),
        pytest.param(lambda a: setattr(a.server_slots.slots[0], "num_computed", 9), id="computed beyond its stream"),
        pytest.param(lambda a: a.server_slots._running.popitem(), id="request lost"),
    ],
)
def test_split_notices_corruption(corrupt: Callable[[Any], None]) -> None:
    allocator = allocator_of(SPLIT, 24, seqs=3)
    forked(allocator)  # parent in slot 2, child in slot 0
    corrupt(allocator)
    with pytest.raises(IntegrityError):
        allocator.check_integrity()
