"""The cache manager against plain lists: exact block ids, queue order and hits, for any order of calls and for colliding hashes."""

from collections import Counter, OrderedDict
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule, run_state_machine_as_test

from pagedkv.allocation import KVPoolSettings
from pagedkv.block_hash import BlockHashChain, Digest, blake2b_128
from pagedkv.errors import ConfigError
from pagedkv.kv_cache_manager import KVCacheManager
from pagedkv.kv_request import KVRequest

MAX_MODEL_LEN = 16
Prefix = tuple[str, tuple[int, ...]]
"""A salt and all tokens up to the end of a block: what its key stands for."""


class NumberedHash:
    """Never maps two inputs to one key, and lets keys differ in a few bits only, from `first_bit` on."""

    def __init__(self, first_bit: int) -> None:
        self.first_bit = first_bit
        self.numbers: dict[bytes, int] = {}

    def __call__(self, data: bytes) -> bytes:
        number = self.numbers.setdefault(data, len(self.numbers) + 1)
        return (number << self.first_bit).to_bytes(16, "little")


class Oracle:
    """vLLM's rules over an ordered dictionary (the free queue) and lists (the blocks of each key, first registered first)."""

    def __init__(self, *, num_blocks: int, block_size: int, watermark: float, enable_caching: bool) -> None:
        self.block_size, self.enable_caching = block_size, enable_caching
        self.kept_free = int(watermark * num_blocks)
        self.queue = OrderedDict.fromkeys(range(1, num_blocks))
        self.prefix_of: dict[int, Prefix] = {}
        self.carriers: dict[Prefix, list[int]] = {}
        self.ref_cnt: Counter[int] = Counter()
        self.tables: dict[str, list[int]] = {}
        self.registered: dict[str, int] = {}

    def blocks(self, num_slots: int) -> int:
        return (num_slots + self.block_size - 1) // self.block_size

    def lookup(self, salt: str, tokens: list[int]) -> list[int]:
        hits = []
        for end in range(self.block_size, len(tokens), self.block_size):
            carriers = self.carriers.get((salt, tuple(tokens[:end])))
            if not carriers:
                break
            hits.append(carriers[0])
        return hits

    def allocate(
        self, name: str, salt: str, tokens: list[int], slots: int, lookahead: int, hits: list[int], *, busy: bool, gate: bool
    ) -> list[int] | None:
        admission = name not in self.tables
        table = self.tables.get(name, [])
        room = len(self.queue) - sum(block in self.queue for block in hits)
        room -= self.kept_free if admission and busy else 0
        need = self.blocks(min(slots + lookahead, MAX_MODEL_LEN)) - len(table) - len(hits)
        if need > room or (admission and gate and self.blocks(len(tokens)) - len(hits) > room):
            return None
        for block in hits:
            self.queue.pop(block, None)
        new = [self.queue.popitem(last=False)[0] for _ in range(need)]
        for block in new:
            self.forget(block)
        self.ref_cnt.update(hits + new)
        self.tables[name] = table = table + hits + new
        if self.enable_caching:
            for i in range(max(self.registered.get(name, 0), len(hits)), min(slots, len(tokens)) // self.block_size):
                prefix = (salt, tuple(tokens[: (i + 1) * self.block_size]))
                self.prefix_of[table[i]] = prefix
                self.carriers.setdefault(prefix, []).append(table[i])
        self.registered[name] = sum(block in self.prefix_of for block in table)
        return new

    def forget(self, block: int) -> None:
        if block in self.prefix_of:
            self.carriers[self.prefix_of.pop(block)].remove(block)

    def release(self, blocks: list[int]) -> None:
        self.ref_cnt.subtract(blocks)
        freed = [block for block in reversed(blocks) if self.ref_cnt[block] == 0]
        front = [block for block in freed if block not in self.prefix_of]
        back = [block for block in freed if block in self.prefix_of]
        self.queue = OrderedDict.fromkeys([*front, *self.queue, *back])

    def free(self, name: str) -> None:
        self.release(self.tables.pop(name))
        del self.registered[name]

    def confirm(self, name: str, computed: int) -> int:
        kept = max(self.blocks(computed), self.registered[name])
        surplus = self.tables[name][kept:]
        self.release(surplus)
        del self.tables[name][kept:]
        return len(surplus)


class Sequence:
    """A request with its tokens."""

    def __init__(self, name: str, salt: str, tokens: list[int], block_size: int, digest: Digest) -> None:
        self.name, self.salt, self.tokens = name, salt, list(tokens)
        self.chain = BlockHashChain(block_size=block_size, salt=salt, hash_algorithm=digest)
        self.chain.extend(tokens)
        self.request = KVRequest(request_id=name, num_tokens=len(tokens), block_keys=self.chain.keys)

    def append(self, tokens: list[int]) -> None:
        self.tokens += tokens
        self.chain.extend(tokens)
        self.request.update(self.chain)


def state_of(manager: KVCacheManager) -> list[Any]:
    pool = manager.pool
    arrays = [
        pool.blocks,
        pool.queue,
        pool.cache.index,
        pool.cache.buckets,
        manager.tables.num_blocks,
        manager.tables.blocks,
        manager._num_registered,
    ]
    return [[array.tolist() for array in arrays], dict(manager._rows), list(manager._requests.free)]


class ManagerMachine(RuleBasedStateMachine):
    """Few tokens and a small pool: prefixes meet, and blocks are reused all the time."""

    first_bit: int | None

    @initialize(
        num_blocks=st.integers(2, 20),
        block_size=st.sampled_from([1, 2, 3, 4]),
        watermark=st.sampled_from([0.0, 0.0, 0.1, 0.3]),
        enable_caching=st.sampled_from([True, True, True, False]),
    )
    def start(self, num_blocks: int, block_size: int, watermark: float, enable_caching: bool) -> None:
        self.digest: Digest = blake2b_128 if self.first_bit is None else NumberedHash(self.first_bit)
        pool = KVPoolSettings(
            num_blocks=num_blocks, block_size=block_size, max_num_seqs=6, max_model_len=MAX_MODEL_LEN, watermark=watermark
        )
        self.manager = KVCacheManager(pool, enable_caching=enable_caching)
        self.oracle = Oracle(num_blocks=num_blocks, block_size=block_size, watermark=watermark, enable_caching=enable_caching)
        self.sequences: dict[str, Sequence] = {}
        self.names = iter(range(10**6))

    def drawn(self, data: st.DataObject, *, live: bool) -> Sequence | None:
        names = [name for name in self.sequences if (name in self.oracle.tables) == live]
        return self.sequences[data.draw(st.sampled_from(names))] if names else None

    @rule(
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=MAX_MODEL_LEN),
        salt=st.sampled_from(["", "", "", "s"]),
        data=st.data(),
    )
    def add(self, tokens: list[int], salt: str, data: st.DataObject) -> None:
        name = f"r{next(self.names)}"
        sequence = Sequence(name, salt, tokens, self.oracle.block_size, self.digest)
        if len(self.oracle.tables) < 6 and self.admit(sequence, data):
            self.sequences[name] = sequence

    @rule(data=st.data())
    def resume(self, data: st.DataObject) -> None:
        sequence = self.drawn(data, live=False)
        if sequence and len(self.oracle.tables) < 6:
            self.admit(sequence, data)

    def admit(self, sequence: Sequence, data: st.DataObject) -> bool:
        hits = self.look(sequence)[: data.draw(st.sampled_from([99, 99, 99, 0, 1]))]
        rest = len(sequence.tokens) - len(hits) * self.oracle.block_size
        busy, gate = data.draw(st.booleans()), data.draw(st.booleans())
        return self.allocate(sequence, data.draw(st.sampled_from([rest, data.draw(st.integers(1, rest))])), hits, data, busy, gate)

    def look(self, sequence: Sequence) -> list[int]:
        before = state_of(self.manager)
        blocks, num_tokens = self.manager.get_computed_blocks(sequence.request)
        assert blocks.tolist() == self.oracle.lookup(sequence.salt, sequence.tokens)
        assert num_tokens == len(blocks) * self.oracle.block_size < len(sequence.tokens)
        assert state_of(self.manager) == before
        return [int(block) for block in blocks]

    def allocate(self, sequence: Sequence, new: int, hits: list[int], data: st.DataObject, busy: bool, gate: bool) -> bool:
        request, before = sequence.request, state_of(self.manager)
        slots = request.num_computed_tokens + len(hits) * self.oracle.block_size + new
        lookahead = data.draw(st.sampled_from([0, 0, 1, 5]))
        expected = self.oracle.allocate(sequence.name, sequence.salt, sequence.tokens, slots, lookahead, hits, busy=busy, gate=gate)
        came = self.manager.allocate_slots(
            request, new, hits, num_lookahead_tokens=lookahead, has_scheduled_reqs=busy, full_sequence_must_fit=gate
        )
        assert (None if came is None else came.tolist()) == expected
        if came is None:
            assert state_of(self.manager) == before
            return False
        request.num_computed_tokens = min(slots, len(sequence.tokens))  # drafts were wrong
        return True

    @rule(tokens=st.lists(st.integers(0, 1), max_size=3), drafts=st.integers(0, 3), data=st.data())
    def grow(self, tokens: list[int], drafts: int, data: st.DataObject) -> None:
        sequence = self.drawn(data, live=True)
        if not sequence:
            return
        sequence.append(tokens[: MAX_MODEL_LEN - len(sequence.tokens)])
        computed = sequence.request.num_computed_tokens
        new = min(len(sequence.tokens) + drafts, MAX_MODEL_LEN) - computed
        if new:
            self.allocate(sequence, data.draw(st.integers(1, new)), [], data, data.draw(st.booleans()), data.draw(st.booleans()))

    @rule(data=st.data())
    def confirm(self, data: st.DataObject) -> None:
        sequence = self.drawn(data, live=True)
        if sequence:
            computed = sequence.request.num_computed_tokens
            given_back = self.oracle.confirm(sequence.name, computed)
            assert self.manager.free_lookahead(sequence.request) == given_back
            held = self.manager.block_table(sequence.request).size
            assert computed <= held * self.oracle.block_size < computed + self.oracle.block_size

    @rule(data=st.data(), come_back=st.booleans())
    def leave(self, data: st.DataObject, come_back: bool) -> None:
        sequence = self.drawn(data, live=True)
        if sequence:
            self.oracle.free(sequence.name)
            if come_back:
                self.manager.preempt(sequence.request)
                assert sequence.request.num_computed_tokens == 0
            else:
                self.manager.free(sequence.request)
                del self.sequences[sequence.name]

    @rule()
    def reset(self) -> None:
        before, idle = state_of(self.manager), not self.oracle.tables
        assert self.manager.reset_prefix_cache() is idle
        if idle:
            self.oracle.prefix_of.clear()
            self.oracle.carriers.clear()
        else:
            assert state_of(self.manager) == before

    @precondition(lambda self: self.oracle.tables)
    @rule(data=st.data())
    def misuse(self, data: st.DataObject) -> None:
        sequence, before = self.drawn(data, live=True), state_of(self.manager)
        assert sequence is not None
        request, held = sequence.request, self.oracle.tables[sequence.name]
        copy = KVRequest(request_id="copy", num_tokens=request.num_tokens, block_keys=request.block_keys)
        for call in (
            lambda: self.manager.free(copy),
            lambda: self.manager.preempt(copy),
            lambda: self.manager.free_lookahead(copy),
            lambda: self.manager.allocate_slots(request, 0),
            lambda: self.manager.allocate_slots(request, 1, num_lookahead_tokens=-1),
            lambda: self.manager.allocate_slots(request, 1, held[:1]),
            lambda: self.manager.allocate_slots(request, MAX_MODEL_LEN + 1),
            lambda: self.manager.allocate_slots(copy, 1, [*held, 0]),
            lambda: self.manager.allocate_slots(copy, 1, [99]),
        ):
            with pytest.raises(ConfigError):
                call()
        assert state_of(self.manager) == before

    @invariant()
    def agrees(self) -> None:
        manager, oracle = self.manager, self.oracle
        manager.check_integrity()
        assert manager.free_queue().tolist() == list(oracle.queue)
        held = Counter(block for table in oracle.tables.values() for block in table)
        assert manager.pool.ref_cnt.tolist() == [held[block] for block in range(manager.pool.num_blocks)]
        assert manager.num_free_blocks + len(held) == manager.pool.num_blocks - 1
        assert manager.pool.cache.blocks().tolist() == sorted(oracle.prefix_of)
        for name, sequence in self.sequences.items():
            assert manager.block_table(sequence.request).tolist() == oracle.tables.get(name, [])
            self.look(sequence)

    def teardown(self) -> None:
        if hasattr(self, "manager"):
            for name in list(self.oracle.tables):
                self.manager.free(self.sequences[name].request)
            assert self.manager.num_free_blocks == self.manager.pool.num_blocks - 1
            assert self.manager.reset_prefix_cache()
            self.manager.check_integrity()


@pytest.mark.parametrize("first_bit", [None, 0, 40, 64, 112])
def test_the_manager_follows_the_rules(first_bit: int | None) -> None:
    """With BLAKE2b; with keys in different buckets; in one bucket, differing in the first or in the second word only."""
    machine = type("Machine", (ManagerMachine,), {"first_bit": first_bit})
    run_state_machine_as_test(machine, settings=settings(max_examples=40, stateful_step_count=30))
