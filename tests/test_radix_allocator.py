"""SGLang's memory as an allocator: rule by rule, wrong use, and random requests against a memory that knows every prefix."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pagedkv.allocation import KVPoolSettings
from pagedkv.allocators import ALLOCATORS
from pagedkv.allocators.radix import RadixAllocator
from pagedkv.errors import ConfigError, IntegrityError
from pagedkv.eviction import EVICTION_POLICIES
from pagedkv.kv_request import KVRequest
from pagedkv.radix_rules import RadixCacheRules, UnifiedRules
from pagedkv.slot_allocator import SlotAllocator


def pool(usable_blocks: int, **changes: Any) -> RadixAllocator:
    """An allocator with so many blocks besides the padding, of one slot unless told otherwise."""
    wanted = {"block_size": 1, "max_model_len": 64, "enable_prefix_caching": True, **changes}
    allocator = ALLOCATORS.load("radix")(KVPoolSettings(num_blocks=usable_blocks + 1, **wanted))
    assert isinstance(allocator, RadixAllocator)
    return allocator


def known(*tokens: int, **changes: Any) -> KVRequest:
    return KVRequest(request_id=str(tokens), num_tokens=len(tokens), token_ids=np.array(tokens, np.int32), **changes)


def grow(allocator: RadixAllocator, request: KVRequest, num_tokens: int | None = None) -> int:
    """Let it compute `num_tokens` (by default all that are known) as far as granted; return its cached ones, -1 if refused."""
    cached = 0 if request.num_computed_tokens else allocator.get_computed_tokens(request)
    new = request.num_tokens - request.num_computed_tokens - cached if num_tokens is None else num_tokens
    grant = allocator.allocate_slots(request, new)
    if grant is None:
        return -1
    request.num_computed_tokens += grant.num_cached_tokens + new
    return grant.num_cached_tokens


def run(allocator: RadixAllocator, request: KVRequest, *outputs: int) -> None:
    """Prefill it, then decode: the last output is not computed."""
    assert grow(allocator, request) >= 0
    allocator.note_computed(request)
    for output in outputs:
        if request.num_tokens > request.num_computed_tokens:
            assert grow(allocator, request) >= 0
            allocator.note_computed(request)
        request.token_ids = np.append(request.token_ids, np.int32(output))
        request.num_tokens += 1


def serve(allocator: RadixAllocator, request: KVRequest, *outputs: int) -> None:
    """Run it to its end."""
    run(allocator, request, *outputs)
    allocator.free(request)


def contents(allocator: RadixAllocator) -> object:
    """All that a lookup must leave: who holds what, the free list in order, and every stored token with its slot."""
    tree = allocator.cache.tree
    ends = [node for node in tree.root.below() if not node.children]
    stored = [
        (n.namespace, *(np.concatenate([getattr(m, part) for m in n.path()]).tolist() for part in ("tokens", "slots")))
        for n in ends
    ]
    held = [(r.request_id, r.num_computed_tokens, allocator.slots_held(r).tolist()) for r in allocator.live_requests()]
    return allocator.cache.slots.free_list().tolist(), stored, held, allocator.free_slots, sorted(allocator.cached_slots().tolist())


def everything(allocator: RadixAllocator) -> object:
    """That, and what eviction goes by."""
    nodes = [(repr(n), n.last_access, n.created, n.hit_count, n.priority, n.deepest) for n in allocator.cache.tree.root.below()]
    return contents(allocator), nodes


def test_the_first_writer_wins_and_the_duplicates_are_freed() -> None:
    allocator = pool(20, block_size=2)
    first, second = known(1, 2, 3, 4, 5), known(1, 2, 3, 4, 6, 7)
    assert grow(allocator, first) == grow(allocator, second) == 0  # in one step: nothing is stored yet
    own = allocator.slots_held(second).tolist()
    free = allocator.free_slots
    allocator.note_computed(first)
    assert allocator.free_slots == free
    allocator.note_computed(second)
    assert allocator.slots_held(second).tolist() == allocator.slots_held(first)[:4].tolist() + own[4:]
    assert allocator.free_slots == free + 4
    assert allocator.cache.slots.free_list()[:2].tolist() == [own[0] // 2, own[2] // 2]  # at the front, in order
    allocator.check_integrity()


@pytest.mark.parametrize(("block_size", "cached"), [(1, 7), (2, 6), (4, 4), (8, 0), (3, 6)])
def test_hits_are_whole_blocks_and_the_last_token_is_always_computed(block_size: int, cached: int) -> None:
    allocator = pool(40, block_size=block_size)
    serve(allocator, known(*range(8)))
    assert allocator.cached_slots().size == 8 // block_size * block_size  # the unaligned tail is freed
    again = known(*range(8))
    assert allocator.get_computed_tokens(again) == cached
    assert grow(allocator, again) == cached
    allocator.note_computed(again)
    assert allocator.get_computed_tokens(known(*range(9))) == 8 // block_size * block_size
    allocator.check_integrity()


def test_each_chunk_of_a_prompt_is_shared_as_soon_as_it_is_computed() -> None:
    allocator = pool(20, block_size=2)
    first = known(*range(8))
    for chunk, cached in ((3, 2), (2, 4), (3, 6)):
        grow(allocator, first, chunk)
        allocator.note_computed(first)
        assert allocator.get_computed_tokens(known(*range(8))) == cached


def test_outputs_are_stored_at_the_end_and_not_while_decoding() -> None:
    allocator = pool(20)
    first = known(1, 2, 3)
    run(allocator, first, 7, 8, 9)  # 9 is not computed
    assert allocator.get_computed_tokens(known(1, 2, 3, 7, 8, 9, 5)) == 3
    allocator.free(first)
    assert allocator.get_computed_tokens(known(1, 2, 3, 7, 8, 9, 5)) == 5
    assert allocator.cached_slots().size == 5
    assert allocator.free_slots == 20


def test_retraction_stores_nothing() -> None:
    allocator = pool(20, block_size=2)
    victim = known(1, 2, 3, 4, 5)
    run(allocator, victim, 7, 8, 9)
    own = set(allocator.slots_held(victim)[4:].tolist())
    allocator.preempt(victim)
    assert victim.num_computed_tokens == 0
    assert sorted(allocator.cached_slots().tolist()) == [2, 3, 4, 5]  # the prompt, stored after its prefill
    assert {slot // 2 for slot in own} <= set(allocator.cache.slots.free_list().tolist())
    assert grow(allocator, victim) == 4  # it comes back for its prompt and its outputs
    allocator.note_computed(victim)
    assert allocator.cached_slots().size == 0
    assert allocator.get_computed_tokens(known(1, 2, 3, 4, 5, 7, 8, 9, 9)) == 8  # recomputed outputs are its prompt now


def test_a_retraction_amid_the_prompt_loses_the_chunk_that_was_not_noted() -> None:
    allocator = pool(20)
    victim = known(*range(6))
    grow(allocator, victim, 2)
    allocator.note_computed(victim)
    grow(allocator, victim, 2)
    allocator.preempt(victim)
    assert allocator.get_computed_tokens(victim) == 2
    assert allocator.free_slots == 20


def test_namespaces_share_nothing() -> None:
    allocator = pool(20)
    serve(allocator, known(1, 2, 3, namespace="a"))
    assert allocator.get_computed_tokens(known(1, 2, 3, 4, namespace="b")) == allocator.get_computed_tokens(known(1, 2, 3, 4)) == 0
    assert allocator.get_computed_tokens(known(1, 2, 3, 4, namespace="a")) == 3


def test_without_token_ids_or_without_caching_nothing_is_shared() -> None:
    for allocator, tokens in (
        (pool(8, enable_prefix_caching=False), np.arange(4, dtype=np.int32)),
        (pool(8), np.empty(0, np.int32)),
    ):
        for _ in range(2):
            request = KVRequest(request_id="a", num_tokens=4, token_ids=tokens)
            assert grow(allocator, request) == 0
            allocator.note_computed(request)
            allocator.free(request)
            assert allocator.cache.tree.total_size == allocator.cached_slots().size == 0
            assert allocator.cache.slots.num_free_slots == 8


def test_eviction_is_on_demand_and_takes_whole_leaves() -> None:
    allocator = pool(10)
    serve(allocator, known(1, 2, 3, 4))
    serve(allocator, known(5, 6, 7))
    grow(allocator, known(8, 9, 10))
    assert (allocator.cache.slots.num_free_slots, allocator.cached_slots().size) == (0, 7)  # the free list is used up first
    one = known(11)
    grow(allocator, one)
    assert (allocator.cache.slots.num_free_slots, allocator.cached_slots().size) == (3, 3)  # the least recent leaf, all of it
    assert allocator.get_computed_tokens(known(1, 2, 3, 4, 5)) == 0
    assert allocator.get_computed_tokens(known(5, 6, 7, 8)) == 3


def test_eviction_makes_up_the_shortfall_only() -> None:
    allocator = pool(6)
    for token in range(4):
        serve(allocator, known(token))
    grow(allocator, known(9, 9, 9))  # two slots are free, the third comes from the tree
    assert allocator.cached_slots().size == 3


def test_a_request_that_ends_before_its_cached_tokens_are_counted_loses_none() -> None:
    allocator = pool(8)
    serve(allocator, known(1, 2, 3))
    request = known(1, 2, 3, 4)
    assert allocator.allocate_slots(request, 1) is not None
    allocator.note_computed(request)
    assert allocator.cached_slots().size == 0
    allocator.free(request)
    assert (allocator.free_slots, allocator.cached_slots().size) == (8, 3)
    allocator.check_integrity()


def test_more_new_tokens_than_known_ones_are_no_way_around_the_pool() -> None:
    """Drafts, for example: the gate is for known tokens, but all that is asked for must fit."""
    allocator = pool(4)
    assert allocator.allocate_slots(known(1, 2), 5) is None
    assert allocator.allocate_slots(known(1, 2), 4) is not None


def test_growth_evicts_too() -> None:
    allocator = pool(6, block_size=2)
    serve(allocator, known(*range(8)))
    running = known(9, 9, 9, 9)
    run(allocator, running, 7, 7)
    assert (allocator.cache.slots.num_free_slots, allocator.cached_slots().size) == (6, 0)
    allocator.check_integrity()


def test_what_somebody_holds_stays() -> None:
    """A locked path, and so the whole prefix of a live request, is no candidate for eviction."""
    allocator = pool(8)
    serve(allocator, known(1, 2, 3, 4))
    holder = known(1, 2, 9)
    assert grow(allocator, holder) == 2  # the match splits the node; 3 and 4 are not held
    assert allocator.free_slots == 5
    before = everything(allocator)
    assert allocator.allocate_slots(KVRequest(request_id="big", num_tokens=6), 6) is None
    assert everything(allocator) == before
    assert allocator.allocate_slots(KVRequest(request_id="fits", num_tokens=5), 5) is not None
    assert allocator.slots_held(holder).tolist()[:2] == [1, 2]
    assert allocator.get_computed_tokens(known(1, 2, 3, 4)) == 2
    allocator.check_integrity()


def test_an_admission_does_not_evict_its_own_prefix() -> None:
    """The matched node is locked before room is made: it is the least recent, but it is needed."""
    allocator = pool(8, eviction="mru")
    serve(allocator, known(1, 2, 3, 4))
    serve(allocator, known(5, 6, 7))
    assert grow(allocator, known(1, 2, 3, 4, 8, 9, 10)) == 4
    assert allocator.get_computed_tokens(known(5, 6, 7, 8)) == 0
    allocator.check_integrity()


def test_a_lookup_is_a_use_and_a_refused_admission_is_none() -> None:
    allocator = pool(10)
    serve(allocator, known(1, 2, 3, 4))
    serve(allocator, known(5, 6))
    grow(allocator, known(7, 7, 7, 7))
    before = everything(allocator)
    tall = known(1, 2, 9, 9, 9, 9, 9)
    assert allocator.allocate_slots(tall, 5) is None  # has 4 once its prefix is locked
    assert everything(allocator) == before
    stored, nodes = contents(allocator), len(list(allocator.cache.tree.root.below()))
    assert allocator.get_computed_tokens(tall) == 2
    assert contents(allocator) == stored
    assert len(list(allocator.cache.tree.root.below())) == nodes + 1  # split where the match ends
    grow(allocator, known(8))
    assert allocator.get_computed_tokens(known(5, 6, 7)) == 0  # these went: 1 and 2 are more recent, as are 3 and 4 by the split
    allocator.check_integrity()


def test_a_refused_growth_leaves_no_trace() -> None:
    allocator = pool(3, block_size=2)
    first, second = known(1, 1), known(2, 2, 2, 2)
    run(allocator, first, 5)
    run(allocator, second)
    before = everything(allocator)
    assert allocator.allocate_slots(first, 1) is None
    assert everything(allocator) == before


def test_the_gate_and_the_watermark_hold_for_admissions_only() -> None:
    wishes = [(9, 8), (9, 1), (8, 1)]  # known tokens, new tokens; int(0.2 * 11) = 2 of 10 blocks are kept
    for gate, granted in ((True, [False, False, True]), (False, [True, True, True])):
        for (num_known, new), expected in zip(wishes, granted, strict=True):
            allocator, request = pool(10, watermark=0.2, reserve_full_isl=gate), known(*range(num_known))
            assert (allocator.allocate_slots(request, new, has_scheduled_reqs=True) is not None) == expected
            assert pool(10, watermark=0.2, reserve_full_isl=gate).allocate_slots(known(*range(10)), 10) is not None
    request.num_computed_tokens = 1
    assert allocator.allocate_slots(request, 9, has_scheduled_reqs=True) is not None  # growth may use it all
    assert allocator.free_slots == 0
    assert pool(10, watermark=0.2, reserve_full_isl=False).allocate_slots(known(*range(9)), 9, has_scheduled_reqs=True) is None


def test_a_gate_counts_no_cached_token() -> None:
    allocator = pool(6)
    serve(allocator, known(1, 2, 3, 4))
    holder = known(1, 2, 3, 4, 5)
    grow(allocator, holder)
    assert grow(allocator, known(1, 2, 3, 4, 6, 7)) == -1
    assert grow(allocator, known(1, 2, 3, 4, 6)) == 4


def test_state_takes_whole_blocks_and_is_never_stored() -> None:
    allocator = pool(6, block_size=2, state_slots=3)
    assert allocator.state_slots == 4
    assert (allocator.admission_slots(7, 2), allocator.admission_slots(7, 3)) == (0, None)
    first = known(1, 2, 3)
    grow(allocator, first)
    assert allocator.free_slots == 12 - 4 - allocator.num_slots_held(first)
    assert grow(allocator, known(5)) == -1
    allocator.free(first)
    assert (allocator.free_slots, allocator.cached_slots().size) == (12, 2)
    allocator.check_integrity()


def test_a_request_counts_one_hit_however_often_it_stores() -> None:
    """Else every long prompt would be a used one to slru. Source: SGLang's pull requests 8533 and 30689."""
    allocator = pool(20, eviction="slru")
    once = known(*range(6))
    for _ in range(3):
        grow(allocator, once, 2)
        allocator.note_computed(once)
    allocator.free(once)
    assert {node.hit_count for node in allocator.cache.tree.root.below()} == {1}
    serve(allocator, known(*range(6), 7, 8))
    assert sorted((node.depth, node.hit_count) for node in allocator.cache.tree.root.below()) == [(2, 2), (4, 2), (6, 2), (8, 1)]


def test_the_policy_of_the_settings_decides() -> None:
    def survivors(eviction: str, priorities: Sequence[int] = (0, 0, 0)) -> list[int]:
        allocator = pool(6, eviction=eviction)
        for token, priority in zip((1, 2, 3), priorities, strict=True):
            serve(allocator, known(token, token, priority=priority))
        allocator.get_computed_tokens(known(1, 1, 9))
        grow(allocator, known(8))
        return [token for token in (1, 2, 3) if allocator.get_computed_tokens(known(token, token, 9))]

    assert (survivors("lru"), survivors("mru"), survivors("fifo"), survivors("filo")) == ([1, 3], [2, 3], [2, 3], [1, 2])
    assert survivors("priority", (2, 3, 1)) == [1, 2]
    with pytest.raises(ConfigError, match="eviction policy"):
        pool(6, eviction="rlu")


@pytest.mark.parametrize("block_size", [1, 2, 4])
def test_slots_are_those_of_alloc_extend_and_alloc_decode(block_size: int) -> None:
    """Blocks are taken whole, which hands out the same slots as SGLang's three phases do for one request at a time."""
    allocator, oracle = pool(30, block_size=block_size), SlotAllocator(num_blocks=30, block_size=block_size)
    requests = [KVRequest(request_id=i, num_tokens=12) for i in range(3)]
    expected: list[list[int]] = [[], [], []]
    for turn, size in enumerate([3, 5, 1, 1, 2, 1, 4, 1, 1, 1, 1, 3]):
        request, slots = requests[turn % 3], expected[turn % 3]
        seq, last = [len(slots) + size], [slots[-1] if slots else -1]
        new = oracle.alloc_decode(seq=seq, last=last) if size == 1 else oracle.alloc_extend(pre=[len(slots)], seq=seq, last=last)
        assert new is not None
        slots += new.tolist()
        assert grow(allocator, request, size) == 0
        assert allocator.slots_held(request)[: len(slots)].tolist() == slots
        assert allocator.cache.slots.free_list().tolist() == oracle.free_list().tolist()


def test_wrong_use_is_told_and_changes_nothing() -> None:
    allocator = pool(20, block_size=2, max_model_len=8, max_num_seqs=2)
    live, stranger = known(1, 2, 3), known(1, 2, 3, 4)
    run(allocator, live)
    short = KVRequest(request_id="short", num_tokens=5, token_ids=np.arange(4, dtype=np.int32))
    far = known(1, 2, 3)
    far.num_computed_tokens = 3

    def with_(request: KVRequest, change: Callable[[KVRequest], None], call: Callable[[KVRequest], object]) -> Callable[[], object]:
        def do() -> object:
            saved = (request.num_computed_tokens, request.token_ids)
            change(request)
            try:
                return call(request)
            finally:
                request.num_computed_tokens, request.token_ids = saved

        return do

    def too_far(request: KVRequest) -> None:
        request.num_computed_tokens = 5

    def too_few(request: KVRequest) -> None:
        request.token_ids = request.token_ids[:1]

    calls: list[tuple[Callable[[], object], str]] = [
        (lambda: allocator.free(stranger), "never allocated, or was freed"),
        (lambda: allocator.preempt(stranger), "never allocated, or was freed"),
        (lambda: allocator.note_computed(stranger), "never allocated, or was freed"),
        (lambda: allocator.allocate_slots(stranger, 0), "needs 1 or more"),
        (lambda: allocator.allocate_slots(live, -1), "needs 1 or more"),
        (lambda: allocator.allocate_slots(stranger, 9), "max_model_len 8"),
        (lambda: allocator.allocate_slots(live, 6), "max_model_len 8"),
        (lambda: allocator.allocate_slots(known(*range(9)), 1), "max_model_len 8"),
        (lambda: allocator.get_computed_tokens(known()), "needs 1 or more"),
        (lambda: allocator.allocate_slots(far, 1), "set it to what is held"),
        (lambda: allocator.allocate_slots(short, 1), "4 token ids for 5 tokens"),
        (lambda: allocator.get_computed_tokens(short), "4 token ids for 5 tokens"),
        (with_(live, too_far, lambda request: allocator.allocate_slots(request, 1)), "set it to what is held"),
        (with_(live, too_far, allocator.note_computed), "set it to what is held"),
        (with_(live, too_far, allocator.free), "set it to what is held"),
        (with_(live, too_few, allocator.note_computed), "1 token ids for 2 tokens"),
        (with_(live, too_few, allocator.free), "1 token ids for 2 tokens"),
    ]
    for call, message in calls:
        before = everything(allocator)
        with pytest.raises(ConfigError, match=message):
            call()
        assert everything(allocator) == before
    grow(allocator, stranger)
    before = everything(allocator)
    with pytest.raises(ConfigError, match="raise max_num_seqs 2"):
        allocator.allocate_slots(known(9), 1)
    assert everything(allocator) == before
    allocator.free(live)
    with pytest.raises(ConfigError, match="was freed before"):
        allocator.free(live)
    with pytest.raises(ConfigError, match="needs"):
        pool(0)


def test_integrity_checks_notice_damage() -> None:
    def held(allocator: RadixAllocator) -> Any:
        return next(iter(allocator._holdings.values()))

    def point_elsewhere(allocator: RadixAllocator) -> None:
        held(allocator).table[0] += 2

    def lose_a_block(allocator: RadixAllocator) -> None:
        held(allocator).num_slots -= 2

    def lock_for_nobody(allocator: RadixAllocator) -> None:
        allocator.cache.tree.inc_lock_ref(held(allocator).node)

    def give_twice(allocator: RadixAllocator) -> None:
        held(allocator).state[:] = held(allocator).table[:2]

    for damage, message in (
        (point_elsewhere, "does not hold the prefix"),
        (lose_a_block, "lost or given twice"),
        (lock_for_nobody, "no request explains"),
        (give_twice, "lost or given twice"),
    ):
        allocator = pool(9, block_size=2, state_slots=1)
        run(allocator, known(1, 2, 3))
        allocator.check_integrity()
        damage(allocator)
        with pytest.raises(IntegrityError, match=message):
            allocator.check_integrity()


MAX_MODEL_LEN = 14
Prefix = tuple[str, tuple[int, ...]]


@dataclass(eq=False)
class Guest:
    """A request with all it will ever say."""

    request: KVRequest
    script: list[int]
    private: bool

    def identity(self, position: int) -> Prefix:
        """Its prefix up to a token, which nobody shares if it is private."""
        return (f"{id(self)}" if self.private else self.request.namespace, tuple(self.script[: position + 1]))

    def know(self, num_tokens: int) -> None:
        self.request.num_tokens = num_tokens
        if not self.private:
            self.request.token_ids = np.array(self.script[:num_tokens], np.int32)


class RadixMachine(RuleBasedStateMachine):
    """Requests with few different tokens in a small pool. `memory` holds, by slot, the prefix that was computed into it last."""

    @initialize(
        block_size=st.sampled_from([1, 2, 4]),
        slots=st.integers(8, 40),
        eviction=st.sampled_from(EVICTION_POLICIES.names()),
        rules=st.sampled_from([UnifiedRules, RadixCacheRules]),
        watermark=st.sampled_from([0.0, 0.2]),
        reserve_full_isl=st.booleans(),
        state_slots=st.sampled_from([0, 0, 1]),
        caching=st.sampled_from([True, True, True, False]),
    )
    def start(
        self,
        block_size: int,
        slots: int,
        eviction: str,
        rules: Callable[[], Any],
        watermark: float,
        reserve_full_isl: bool,
        state_slots: int,
        caching: bool,
    ) -> None:
        self.settings = KVPoolSettings(
            num_blocks=slots // block_size + 1,
            block_size=block_size,
            max_num_seqs=4,
            max_model_len=MAX_MODEL_LEN,
            watermark=watermark,
            reserve_full_isl=reserve_full_isl,
            state_slots=state_slots,
            enable_prefix_caching=caching,
            eviction=eviction,
        )
        self.allocator = RadixAllocator(self.settings, rules=rules())
        self.memory: dict[int, Prefix] = {}
        self.waiting: list[Guest] = []
        self.running: list[Guest] = []

    def whole(self, tokens: int) -> int:
        return -(-tokens // self.settings.block_size) * self.settings.block_size

    def stored(self) -> list[Prefix]:
        """The prefixes whose last token the tree has."""
        return [self.memory[slot] for node in self.allocator.cache.tree.root.below() for slot in node.slots.tolist()]

    def expected_hit(self, guest: Guest) -> int:
        """The longest run of whole blocks, short of the last token, that the memory says the tree has."""
        stored, hit = set(self.stored()), 0
        if guest.private or not self.settings.enable_prefix_caching:
            return 0
        while (
            hit + self.settings.block_size < guest.request.num_tokens
            and guest.identity(hit + self.settings.block_size - 1) in stored
        ):
            hit += self.settings.block_size
        return hit

    def write(self, guest: Guest, cached: int, new: int) -> None:
        request = guest.request
        slots = self.allocator.slots_held(request).tolist()
        first = request.num_computed_tokens + cached
        for position in range(first, first + new):
            self.memory[slots[position]] = guest.identity(position)
        request.num_computed_tokens = first + new

    def complete(self, guests: list[Guest]) -> None:
        """The step is over: what was computed is noted, whoever knows all its tokens says the next one."""
        for guest in guests:
            request = guest.request
            self.allocator.note_computed(request)
            if request.num_computed_tokens == len(guest.script) - 1:
                self.allocator.free(request)
                self.running.remove(guest)
            elif request.num_computed_tokens == request.num_tokens:
                guest.know(request.num_tokens + 1)

    def admit(self, guest: Guest, chunk: int, *, busy: bool) -> bool:
        allocator, request = self.allocator, guest.request
        hit = self.expected_hit(guest)
        assert allocator.get_computed_tokens(request) == hit
        new = min(chunk, request.num_tokens - hit)
        before = everything(allocator)
        cached = {self.memory[slot] for slot in allocator.cached_slots().tolist()}
        size = self.settings.block_size
        evictable = size * sum(guest.identity(end - 1) in cached for end in range(size, hit + 1, size))  # a block has one end
        gated = request.num_tokens if self.settings.reserve_full_isl else hit + new
        kept = int(self.settings.watermark * self.settings.num_blocks) * self.settings.block_size if busy else 0
        fits = self.whole(gated) - hit + allocator.state_slots + kept <= allocator.free_slots - evictable
        grant = allocator.allocate_slots(request, new, has_scheduled_reqs=busy)
        assert (grant is not None) == fits
        if grant is None:
            assert everything(allocator) == before
            return False
        assert grant.num_cached_tokens == hit
        held = allocator.slots_held(request).tolist()
        assert [self.memory[slot] for slot in held[:hit]] == [guest.identity(position) for position in range(hit)]
        self.waiting.remove(guest)
        self.running.append(guest)
        self.write(guest, hit, new)
        return True

    def grow(self, guest: Guest, chunk: int) -> bool:
        request = guest.request
        new = min(chunk, request.num_tokens - request.num_computed_tokens)
        missing = self.whole(request.num_computed_tokens + new) - self.allocator.num_slots_held(request)
        before, fits = everything(self.allocator), missing <= self.allocator.free_slots
        grant = self.allocator.allocate_slots(request, new, has_scheduled_reqs=True)
        assert (grant is not None) == fits
        if grant is None:
            assert everything(self.allocator) == before
            return False
        assert grant.num_cached_tokens == 0
        self.write(guest, 0, new)
        return True

    @rule(
        script=st.lists(st.integers(0, 1), min_size=2, max_size=MAX_MODEL_LEN),
        prompt=st.integers(1, MAX_MODEL_LEN - 1),
        namespace=st.sampled_from(["", "", "", "b"]),
        private=st.sampled_from([False] * 7 + [True]),
        priority=st.integers(0, 2),
    )
    def arrive(self, script: list[int], prompt: int, namespace: str, private: bool, priority: int) -> None:
        prompt = min(prompt, len(script) - 1)
        if self.allocator.admission_slots(prompt, len(script) - prompt) is None:
            assert self.whole(len(script) - 1) + self.allocator.state_slots > self.allocator.usable_slots
            return
        request = KVRequest(request_id=len(self.memory), num_tokens=prompt, namespace=namespace, priority=priority)
        guest = Guest(request, script, private)
        guest.know(prompt)
        self.waiting.append(guest)

    @rule(chunk=st.integers(1, MAX_MODEL_LEN), admissions=st.integers(0, 3))
    def step(self, chunk: int, admissions: int) -> None:
        """Whoever runs grows, the youngest are retracted for it, and some are admitted; then all is computed at once."""
        grown: list[Guest] = []
        for guest in self.running[:]:
            while guest in self.running and not self.grow(guest, chunk):
                victim = self.running[-1]
                self.retract(victim)
                grown = [other for other in grown if other is not victim]
            if guest in self.running:
                grown.append(guest)
        for guest in self.waiting[:admissions]:
            if len(self.running) == self.settings.max_num_seqs or not self.admit(guest, chunk, busy=bool(self.running)):
                break
            grown.append(guest)
        assert self.running or not self.waiting or not admissions, "who is alone is served"
        self.complete(grown)

    def retract(self, guest: Guest) -> None:
        assert len(self.running) > 1, "who is alone is never short of slots"
        stored = self.stored()
        self.allocator.preempt(guest.request)
        assert self.stored() == stored
        assert guest.request.num_computed_tokens == 0
        self.running.remove(guest)
        self.waiting.insert(0, guest)

    @precondition(lambda self: len(self.running) > 1)
    @rule(choice=st.integers(0, 3))
    def preempt(self, choice: int) -> None:
        self.retract(self.running[choice % len(self.running)])

    @precondition(lambda self: self.running)
    @rule(choice=st.integers(0, 3))
    def abort(self, choice: int) -> None:
        guest = self.running.pop(choice % len(self.running))
        computed = guest.request.num_computed_tokens // self.settings.block_size * self.settings.block_size
        stored = set(self.stored())
        self.allocator.free(guest.request)
        if self.settings.enable_prefix_caching and not guest.private:
            stored |= {guest.identity(position) for position in range(computed)}
        assert set(self.stored()) == stored

    @invariant()
    def every_slot_holds_what_it_should(self) -> None:
        allocator = self.allocator
        allocator.check_integrity()
        assert list(allocator.live_requests()) == [guest.request for guest in self.running]
        held: set[int] = set()
        for guest in self.running:
            slots = allocator.slots_held(guest.request).tolist()
            assert len(slots) == len(set(slots)) == allocator.num_slots_held(guest.request)
            for position in range(guest.request.num_computed_tokens):
                assert self.memory[slots[position]] == guest.identity(position)
            held |= set(slots)
        cached, stored = set(allocator.cached_slots().tolist()), self.stored()
        ends = [tokens for tokens in stored if len(tokens[1]) % self.settings.block_size == 0]
        assert len(ends) == len(set(ends)), "a prefix is stored twice"
        assert not cached & held
        assert len(cached) <= allocator.free_slots
        assert allocator.free_slots + len(held) + len(self.running) * allocator.state_slots == allocator.usable_slots
        assert min(held | cached, default=self.settings.block_size) >= self.settings.block_size, "the padding was handed out"

    def teardown(self) -> None:
        if hasattr(self, "allocator"):
            for request in self.allocator.live_requests():
                self.allocator.free(request)
            assert self.allocator.free_slots == self.allocator.usable_slots
            self.allocator.check_integrity()


TestRadixMachine = RadixMachine.TestCase
TestRadixMachine.settings = settings(max_examples=60, stateful_step_count=40)
