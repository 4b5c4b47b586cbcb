"""Events: a mirror that hears them knows at any time which block carries which key."""

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pagedkv.allocation import KVPoolSettings
from pagedkv.allocators import ALLOCATORS
from pagedkv.allocators.paged import PagedAllocator
from pagedkv.block_hash import BlockHashChain
from pagedkv.block_pool import BlockPool
from pagedkv.errors import IntegrityError
from pagedkv.events import (
    BlockCopied,
    BlockRemoved,
    BlockRevived,
    BlockStored,
    CacheCleared,
    Event,
    EventLog,
    Key,
    Observable,
    key_bytes,
    replay,
)
from pagedkv.fuzzing import fuzz
from pagedkv.kv_cache_manager import KVCacheManager
from pagedkv.kv_request import KVRequest
from pagedkv.sims.fuzz_command import choose_from

POOL = KVPoolSettings(num_blocks=6, block_size=2, max_num_seqs=4, max_model_len=12, enable_prefix_caching=True)


def request(name: str, tokens: Any) -> KVRequest:
    chain = BlockHashChain(block_size=2)
    chain.extend(list(tokens))
    return KVRequest(request_id=name, num_tokens=chain.num_tokens, block_keys=chain.keys)


def content(pool: BlockPool) -> dict[int, Key]:
    """Which block carries which key, asked of the pool."""
    blocks = pool.cache.blocks()
    index = pool.cache.index[blocks]
    return dict(zip(blocks.tolist(), key_bytes(np.stack((index["key_a"], index["key_b"]), axis=1)), strict=True))


def observed(pool: KVPoolSettings = POOL) -> tuple[KVCacheManager, EventLog]:
    manager, log = KVCacheManager(pool), EventLog()
    manager.events = log
    return manager, log


def admit(manager: KVCacheManager, new: KVRequest, num_tokens: int) -> None:
    hits, cached = manager.get_computed_blocks(new)
    assert manager.allocate_slots(new, num_tokens, hits) is not None
    new.num_computed_tokens = cached + num_tokens


def test_the_life_of_a_block() -> None:
    """Stored when its slots are given, revived by a hit, removed when it is handed out again, with the tail first."""
    manager, log = observed()
    a = request("a", range(6))
    k = key_bytes(a.block_keys)
    admit(manager, a, 4)
    assert log == [BlockStored(blocks=(1, 2), keys=k[:2], parent=None, request_id="a")]
    log.clear()
    assert manager.allocate_slots(a, 2) is not None
    assert log == [BlockStored(blocks=(3,), keys=k[2:], parent=k[1], request_id="a")]
    log.clear()
    manager.free(a)
    assert log == []
    b = request("b", range(6))
    admit(manager, b, 2)
    assert log == [
        BlockRevived(blocks=(1, 2), keys=k[:2], request_id="b"),
        BlockStored(blocks=(4,), keys=k[2:], parent=k[1], request_id="b"),
    ]
    log.clear()
    c = request("c", [7, 7, 7])
    admit(manager, c, 3)
    assert log == [
        BlockRemoved(blocks=(3,), keys=k[2:]),
        BlockStored(blocks=(5,), keys=key_bytes(c.block_keys), parent=None, request_id="c"),
    ]
    log.clear()
    manager.free(b)
    manager.free(c)
    assert manager.reset_prefix_cache()
    assert log == [CacheCleared()]


def test_a_hit_that_somebody_holds_is_not_revived() -> None:
    manager, log = observed()
    admit(manager, request("a", range(4)), 4)
    log.clear()
    admit(manager, request("b", range(4)), 2)
    assert [type(event) for event in log] == [BlockStored]


def test_a_refusal_tells_nothing() -> None:
    manager, log = observed()
    a, b = request("a", range(6)), request("b", range(50, 60))
    admit(manager, a, 6)
    manager.free(a)
    admit(manager, request("c", [1]), 1)
    log.clear()
    assert manager.allocate_slots(b, 10) is None
    assert not manager.reset_prefix_cache()
    assert log == []


def test_a_fork_that_parts_is_a_copy() -> None:
    """Parent and child share a block with one token; who writes first gets the new one. The parent's stays, with no key yet."""
    manager, log = observed()
    parent, child = request("a", range(3)), request("b", range(3))
    admit(manager, parent, 3)
    manager.fork(parent, child)
    child.num_computed_tokens = 3
    log.clear()
    child.update(chain := BlockHashChain(block_size=2))
    chain.extend([0, 1, 2, 9])
    child.update(chain)
    assert manager.allocate_slots(child, 1) is not None
    assert len(manager.take_copies()) == 1
    assert log == [
        BlockStored(blocks=(3,), keys=key_bytes(chain.keys[1:]), parent=key_bytes(chain.keys)[0], request_id="b"),
        BlockCopied(source=2, destination=3, num_tokens=1),
    ]


def test_whoever_attaches_late_hears_of_later_changes_only() -> None:
    manager, log = KVCacheManager(POOL), EventLog()
    a = request("a", range(6))
    admit(manager, a, 6)
    known = content(manager.pool)
    manager.events = log
    manager.free(a)
    admit(manager, request("b", range(50, 58)), 8)
    assert replay(log, known) == content(manager.pool)
    assert {type(event) for event in log} == {BlockRemoved, BlockStored}
    manager.events = None
    manager.check_integrity()
    assert manager.events is None


def test_a_manager_is_observable() -> None:
    manager, log = observed()
    assert isinstance(manager, Observable)
    assert manager.events is log


def test_a_key_that_goes_without_an_event_breaks_integrity() -> None:
    manager, _ = observed()
    a = request("a", range(6))
    admit(manager, a, 6)
    manager.free(a)
    manager.check_integrity()
    manager.pool.evict(np.array([3], np.int32))
    with pytest.raises(IntegrityError, match="but events told of"):
        manager.check_integrity()


class Witness:
    """Hears events, and compares each with what is known when it comes. A function, to those who compare states."""

    def __init__(self) -> None:
        self.mirror: dict[int, Key] = {}
        self.told = Counter[str]()
        self.owners: dict[int | str, KVRequest] = {}
        """Requests by name."""
        self.free: set[int] = set()
        """Blocks that were free before the operation."""

    def __call__(self, event: Event) -> None:
        self.told[type(event).__name__] += 1
        match event:
            case BlockStored():
                keys = key_bytes(self.owners[event.request_id].block_keys)
                first = keys.index(event.keys[0])
                assert event.keys == keys[first : first + len(event.keys)]
                assert event.parent == (keys[first - 1] if first else None)
                assert self.mirror.keys().isdisjoint(event.blocks)
            case BlockRemoved() | BlockRevived():
                assert event.keys == tuple(self.mirror[block] for block in event.blocks)
                assert self.free >= set(event.blocks)
        replay([event], self.mirror)


class Mirrored(PagedAllocator):
    """Compares the mirror with the pool after every operation."""

    def __init__(self, settings: KVPoolSettings) -> None:
        super().__init__(settings)
        self.witness = Witness()
        self.manager.events = self.witness

    def compare(self) -> None:
        assert self.witness.mirror == content(self.manager.pool)

    def allocate_slots(self, request: KVRequest, num_new_tokens: int, **more: Any) -> Any:
        witness, admission = self.witness, not self.manager.block_table(request).size
        witness.owners[request.request_id] = request
        witness.free = set(self.manager.free_queue().tolist())
        revivals = witness.told["BlockRevived"]
        grant = super().allocate_slots(request, num_new_tokens, **more)
        if grant is not None and admission:
            hits = self.manager.block_table(request)[: grant.num_cached_tokens // self.unit_slots].tolist()
            assert (witness.told["BlockRevived"] > revivals) == (not witness.free.isdisjoint(hits))
        self.compare()
        return grant

    def free(self, request: KVRequest) -> None:
        super().free(request)
        if len(self.witness.owners) % 7 == 0:
            self.manager.reset_prefix_cache()
        self.compare()

    def preempt(self, request: KVRequest) -> None:
        super().preempt(request)
        self.compare()

    def note_computed(self, request: KVRequest) -> None:
        super().note_computed(request)
        self.compare()

    def fork(self, parent: KVRequest, child: KVRequest) -> None:
        super().fork(parent, child)
        self.compare()


TOLD = ("BlockStored", "BlockRemoved", "BlockRevived", "BlockCopied", "CacheCleared")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, TOLD),
        ({"num_blocks": 24}, TOLD),
        ({"block_size": 1, "num_blocks": 14}, [each for each in TOLD if each != "BlockCopied"]),
        ({"eviction": "lfu"}, TOLD),
        ({"eviction": "fifo", "block_size": 4, "prefix_match_unit": 2}, TOLD),
        ({"block_size": 4, "prefix_match_unit": 1}, TOLD),
        ({"state_slots": 3, "watermark": 0.1, "reserve_full_isl": False}, [each for each in TOLD if each != "BlockCopied"]),
        ({"enable_prefix_caching": False}, ["BlockCopied", "CacheCleared"]),
    ],
    ids=str,
)
def test_a_mirror_of_the_events_is_the_cache(changes: dict[str, Any], told: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """After every operation of a random run, forks, preemptions, refusals and misuse included."""
    made: list[Mirrored] = []

    def make(settings: KVPoolSettings) -> Mirrored:
        made.append(Mirrored(settings))
        return made[-1]

    pool = replace(POOL, **{"num_blocks": 10, **changes})
    monkeypatch.setitem(ALLOCATORS._registered, "mirrored", make)
    monkeypatch.setattr(ALLOCATORS, "names", lambda: ("mirrored",))
    fuzz("mirrored", pool, choose_from(5), ops=2500, seed=5, check_every=50)
    assert {name for name in TOLD if made[-1].witness.told[name] > 3} == set(told)
