"""TensorRT-LLM's block manager: queue and tree against oracles, and every law under random use, host tier included."""

from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test
from tensorrt_llm_world import POOL, seq

from pagedkv.allocation import Allocator, Grant, KVPoolSettings
from pagedkv.allocators import ALLOCATORS
from pagedkv.allocators.tensorrt_llm import TensorRTLLMAllocator
from pagedkv.kv_request import KVRequest
from pagedkv.priority_queue import PriorityQueue
from pagedkv.retention import Retention, RetentionRange
from pagedkv.reuse_pool import ReusePool
from pagedkv.reuse_tree import ReuseTree
from pagedkv.shadow_memory import ShadowMemory, check_unchanged, prefix_identities, state_of


class QueueMachine(RuleBasedStateMachine):
    """The queue against a list that is sorted whenever somebody asks."""

    @initialize()
    def start(self) -> None:
        self.queue = PriorityQueue(capacity=2000)
        self.items: list[dict[str, Any]] = []
        self.now, self.count = 0.0, 0

    @rule(
        priority=st.integers(0, 3), duration=st.none() | st.integers(1, 4), ready=st.booleans(), repeat=st.sampled_from([1, 1, 40])
    )
    def add(self, priority: int, duration: int | None, ready: bool, repeat: int) -> None:
        for _ in range(repeat):
            self.queue.add(self.count, Retention(priority, duration), ready=ready)
            ends = None if duration is None else self.now + duration
            self.items.append({"item": self.count, "priority": priority, "ends": ends, "ready": ready})
            self.count += 1

    @precondition(lambda self: self.items)
    @rule(data=st.data(), count=st.integers(1, 30))
    def remove(self, data: st.DataObject, count: int) -> None:
        for _ in range(min(count, len(self.items))):
            gone = self.items.pop(data.draw(st.integers(0, len(self.items) - 1)))
            assert self.queue.remove(gone["item"]).priority == gone["priority"]

    @precondition(lambda self: self.items)
    @rule(data=st.data(), ready=st.booleans())
    def set_ready(self, data: st.DataObject, ready: bool) -> None:
        item = data.draw(st.sampled_from(self.items))
        item["ready"] = ready
        self.queue.set_ready(item["item"], ready=ready)

    @rule(step=st.integers(0, 3))
    def advance(self, step: int) -> None:
        self.now += step
        self.queue.advance(self.now)
        expired = [item for item in self.items if item["ends"] is not None and item["ends"] <= self.now]
        for item in sorted(expired, key=lambda item: (item["ends"], self.items.index(item))):
            self.items.remove(item)
            self.items.append({**item, "priority": 35, "ends": None})

    @invariant()
    def agree(self) -> None:
        self.queue.check_integrity()
        ready = [item for item in self.items if item["ready"]]
        expected = min(ready, key=lambda item: item["priority"])["item"] if ready else None  # the first of the lowest
        assert self.queue.lowest() == expected
        assert sorted(self.queue) == sorted(item["item"] for item in self.items)


def test_the_queue_agrees_with_a_sorted_list() -> None:
    run_state_machine_as_test(QueueMachine, settings=settings(max_examples=60, stateful_step_count=25))


def test_the_heap_of_a_queue_does_not_grow_with_the_number_of_changes() -> None:
    queue = PriorityQueue(capacity=2)
    queue.add(0, Retention(1), ready=True)
    for _ in range(1000):
        queue.add(1, Retention(50, 1000), ready=True)
        queue.set_ready(1, ready=False)
        queue.set_ready(1, ready=True)
        queue.check_integrity()
        queue.remove(1)
    assert queue.ready() == [0]
    assert queue.lowest() == 0


def shared(one: list[int], other: list[int]) -> int:
    return next((i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), min(len(one), len(other)))


TOKENS = st.lists(st.integers(0, 2) | st.sampled_from([255, 256, 65536]), max_size=9)


@settings(max_examples=200)
@given(stored=st.lists(TOKENS, max_size=8), wanted=TOKENS, size=st.sampled_from([2, 4]))
def test_a_match_is_the_longest_common_prefix_of_all_that_is_stored(stored: list[list[int]], wanted: list[int], size: int) -> None:
    tree, block = ReuseTree(capacity=40, block_size=size), 0
    for tokens in stored:
        node = tree.root("")
        for i in range(0, len(tokens), size):
            key, known = np.array(tokens[i : i + size], np.int32), tree.child(node, np.array(tokens[i : i + size], np.int32))
            node, block = tree.insert(node, key, block) if known is None else known, block + 1
    tree.check_integrity()
    match = tree.match("", np.array(wanted, np.int32))
    assert len(match.path) * size + match.num_partial == max((shared(tokens, wanted) for tokens in stored), default=0)
    found = [token for node in [*match.path, *([] if match.partial is None else [match.partial])] for token in tree.tokens_of(node)]
    assert shared(found, wanted) == len(match.path) * size + match.num_partial


PREFIXES = [seq(0, 24), [*seq(0, 8), *seq(50, 16)], [*seq(0, 6), *seq(70, 18)], [*seq(0, 2), *seq(90, 22)], seq(30, 24)]


class Machine(RuleBasedStateMachine):
    """Drives the allocator as a scheduler does, beside a shadow of the memory of GPU and host."""

    @initialize(
        num_blocks=st.integers(2, 12),
        block_size=st.sampled_from([2, 4]),
        host_blocks=st.sampled_from([0, 1, 3, 8]),
        reserve_full_isl=st.booleans(),
        state_slots=st.sampled_from([0, 0, 3]),
    )
    def start(self, num_blocks: int, block_size: int, host_blocks: int, reserve_full_isl: bool, state_slots: int) -> None:
        self.pool = KVPoolSettings(
            num_blocks=num_blocks,
            block_size=block_size,
            max_num_seqs=4,
            max_model_len=24,
            reserve_full_isl=reserve_full_isl,
            state_slots=state_slots,
            enable_prefix_caching=True,
            offload_blocks=host_blocks,
        )
        self.allocator = TensorRTLLMAllocator(self.pool)
        self.memory = ShadowMemory(self.allocator)
        self.live: list[KVRequest] = []
        self.waiting: list[KVRequest] = []
        self.count, self.copied = 0, 0

    def ask(self, request: KVRequest, num_new: int) -> Grant | None:
        allocator, before = self.allocator, state_of(self.allocator)
        grant = allocator.allocate_slots(request, num_new)
        if grant is None:
            check_unchanged(before, state_of(allocator))
            return None
        self.copied += int((grant.copies >= allocator.num_slots).any(1).sum()) if grant.copies.size else 0
        self.memory.write(request, self.identities(request), grant, num_new)
        return grant

    def identities(self, request: KVRequest) -> Any:
        return prefix_identities(request.token_ids if request.token_ids.size else np.arange(40), request.namespace)

    @precondition(lambda self: len(self.live) < 4)
    @rule(
        prefix=st.sampled_from(PREFIXES),
        tokens=st.lists(st.integers(0, 1), max_size=2),
        length=st.integers(1, 20),
        chunk=st.integers(1, 20),
        salt=st.sampled_from(["", "", "", "x"]),
        private=st.sampled_from([False, False, False, True]),
        priority=st.sampled_from([0, 0, 10, 29, 30, 60]),
        computed=st.booleans(),
    )
    def admit(
        self, prefix: list[int], tokens: list[int], length: int, chunk: int, salt: str, private: bool, priority: int, computed: bool
    ) -> None:
        ids = np.array([*prefix[:length], *tokens], np.int32)
        self.count += 1
        request = KVRequest(request_id=self.count, num_tokens=ids.size, namespace=salt, priority=priority)
        request.token_ids = ids[:0] if private else ids
        self.begin(request, chunk, computed)

    @precondition(lambda self: self.waiting and len(self.live) < 4)
    @rule(chunk=st.integers(1, 20))
    def come_again(self, chunk: int) -> None:
        self.begin(self.waiting.pop(0), chunk, computed=True)

    def begin(self, request: KVRequest, chunk: int, computed: bool) -> None:
        cached = self.allocator.get_computed_tokens(request)
        assert 0 <= cached < request.num_tokens
        assert cached == self.longest_stored(request)
        grant = self.ask(request, min(chunk, request.num_tokens - cached))
        if grant is None:
            return
        assert grant.num_cached_tokens == cached
        self.live.append(request)
        if computed:
            self.allocator.note_computed(request)

    def longest_stored(self, request: KVRequest) -> int:
        wanted = request.token_ids.tolist()[:-1]
        tree = self.allocator.memory.pool.tree
        paths = map(tree.tokens_up_to, tree.nodes(request.namespace))
        return max((shared(path, wanted) for path in paths), default=0)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), num_new=st.integers(1, 6), token=st.integers(0, 2), computed=st.booleans())
    def grow(self, data: st.DataObject, num_new: int, token: int, computed: bool) -> None:
        request = data.draw(st.sampled_from(self.live))
        self.allocator.note_computed(request)
        if request.num_computed_tokens == request.num_tokens:
            if request.num_tokens == self.pool.max_model_len:
                return
            request.num_tokens += 1
            if request.token_ids.size:
                request.token_ids = np.append(request.token_ids, np.int32(token))
            self.memory.identities[request] = (self.identities(request),)
        if self.ask(request, min(num_new, request.num_tokens - request.num_computed_tokens)) is not None and computed:
            self.allocator.note_computed(request)

    @precondition(lambda self: self.live)
    @rule(
        data=st.data(),
        bounds=st.lists(st.integers(0, 24), unique=True, max_size=3),
        priority=st.integers(0, 100),
        duration=st.none() | st.integers(1, 5),
    )
    def retain(self, data: st.DataObject, bounds: list[int], priority: int, duration: int | None) -> None:
        ends = sorted(bounds)
        ranges = [
            RetentionRange(first=a, last=b, priority=priority, duration=duration) for a, b in zip(ends, ends[1:], strict=False)
        ]
        self.allocator.set_retention(data.draw(st.sampled_from(self.live)), ranges)

    @rule(step=st.integers(0, 3))
    def advance(self, step: int) -> None:
        self.allocator.advance(self.allocator.now + step)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), preempt=st.booleans())
    def end(self, data: st.DataObject, preempt: bool) -> None:
        request = data.draw(st.sampled_from(self.live))
        self.live.remove(request)
        self.memory.forget(request)
        if preempt:
            self.allocator.preempt(request)
            self.waiting.append(request)
        else:
            self.allocator.free(request)

    @rule(prefix=st.sampled_from(PREFIXES), length=st.integers(1, 24))
    def what_can_fit_fits_when_nobody_holds_anything(self, prefix: list[int], length: int) -> None:
        if self.live or self.allocator.admission_slots(length, 1) is None:
            return
        request = KVRequest(request_id="alone", num_tokens=length, token_ids=np.array(prefix[:length], np.int32))
        self.begin(request, length, computed=True)
        assert self.live == [request]

    @invariant()
    def laws(self) -> None:
        self.memory.check()
        host = int((self.memory.contents[self.allocator.num_slots :] != 0).sum())
        assert host <= self.allocator.offloaded_slots
        assert self.copied == self.allocator.offloaded_slots + self.allocator.onboarded_slots


def test_all_laws_hold_under_random_use() -> None:
    run_state_machine_as_test(Machine, settings=settings(max_examples=120, stateful_step_count=40))


def test_what_is_registered() -> None:
    allocator: Allocator = ALLOCATORS.load("tensorrt-llm")(POOL)
    assert isinstance(allocator, TensorRTLLMAllocator)
    assert (allocator.name, allocator.placement, allocator.unit_slots, allocator.usable_slots) == ("tensorrt-llm", "block", 4, 32)


def test_an_empty_pool_gives_its_blocks_in_order() -> None:
    pool = ReusePool(num_blocks=3, host_blocks=1, block_size=2, max_path=3, max_copies=3)
    assert [pool.take() for _ in range(3)] == [0, 1, 2]
    pool.check_integrity([0, 1, 2])
