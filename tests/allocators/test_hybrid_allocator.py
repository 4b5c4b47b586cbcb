"""The allocator over groups of layers: slots, pages and states, as schedulers and views ask for them."""

from typing import Any

import numpy as np
import pytest
from hybrid_requests import request

from pagedkv.allocation import NO_SLOT, KVPoolSettings
from pagedkv.allocators.hybrid import HybridAllocator
from pagedkv.errors import ConfigError
from pagedkv.kv_request import KVRequest
from pagedkv.kv_spec import LayerGroup


def attention(kind: Any = "full", num_layers: int = 2, heads: int = 1, window: int | None = None) -> LayerGroup:
    return LayerGroup(kind=kind, num_layers=num_layers, num_kv_heads=heads, key_dim=8, value_dim=8, window=window)


def allocator(*layers: LayerGroup, num_blocks: int = 20, caching: bool = False, **pool: Any) -> HybridAllocator:
    pool = {"block_size": 4, "max_model_len": 64, "max_num_seqs": 4, "num_blocks": num_blocks, **pool}
    return HybridAllocator(KVPoolSettings(layer_groups=layers, enable_prefix_caching=caching, **pool))


def accounts(of: HybridAllocator, *live: KVRequest) -> None:
    held = np.concatenate([of.slots_held(guest, group) for guest in live for group in range(of.num_groups)])
    held = held[held != NO_SLOT]
    assert sum(of.num_slots_held(guest) for guest in live) == held.size
    assert of.free_slots + np.unique(held).size + of.state_slots * len(live) + of.rounding_slots == of.usable_slots
    assert not np.isin(of.cached_slots(), held).any()
    of.check_integrity()


def test_without_groups_it_is_refused() -> None:
    with pytest.raises(ConfigError, match="no layer-groups to give blocks to: needs those of the model"):
        allocator()


def test_a_window_gives_back_what_it_has_left_behind() -> None:
    pool, guest = allocator(attention(), attention("sliding_window", window=8)), request(range(20))
    assert [(kind.kind, kind.window) for kind in pool.manager.rules] == [("full", None), ("sliding_window", 8)]
    for _ in range(20):
        assert pool.allocate_slots(guest, 1) is not None
        guest.num_computed_tokens += 1
        accounts(pool, guest)
    slots = pool.slots_held(guest, 1)
    assert (slots[:12] == NO_SLOT).all()  # 19 - 8 + 1 = 12 tokens
    assert (slots[12:] >= 4).all()
    assert np.unique(pool.slots_held(guest)).size == 20
    pool.preempt(guest)
    assert pool.free_slots == pool.usable_slots


def test_pages_of_shorter_blocks_list_the_slots_that_they_leave_unused_at_the_end() -> None:
    pool, guest = allocator(attention(), attention("sliding_window", heads=2, window=9)), request(range(8))
    assert [kind.block_size for kind in pool.manager.rules] == [8, 4]
    assert pool.allocate_slots(guest, 8) is not None
    assert pool.slots_held(guest, 0).tolist() == [*range(8, 16)]
    assert pool.slots_held(guest, 1).tolist() == [16, 17, 18, 19, 24, 25, 26, 27, 20, 21, 22, 23, 28, 29, 30, 31]
    accounts(pool, guest)


def test_states_count_as_state_slots_without_caching_and_as_a_group_with_it() -> None:
    layers = attention(), LayerGroup(kind="state", num_layers=2, state_bytes=4 * 32)
    guest = request(range(14))
    alone, sharing = allocator(*layers), allocator(*layers, caching=True)
    assert (alone.num_groups, alone.state_slots) == (1, 4)
    assert (sharing.num_groups, sharing.state_slots) == (2, 0)
    for pool in (alone, sharing):
        assert pool.allocate_slots(guest, 12) is not None
        guest.num_computed_tokens = 12
        accounts(pool, guest)
        pool.preempt(guest)
    assert alone.get_computed_tokens(guest) == 0
    assert sharing.get_computed_tokens(guest) == 12
    assert sharing.cached_slots().size == 4 * 4


def test_a_model_of_states_only_has_no_slots_of_tokens() -> None:
    pool, guest = allocator(LayerGroup(kind="state", num_layers=2, state_bytes=100)), request(range(40))
    assert pool.allocate_slots(guest, 40) is not None
    assert (pool.num_groups, pool.state_slots, pool.num_slots_held(guest), pool.slots_held(guest).size) == (0, 4, 0, 0)
    assert pool.free_slots == pool.usable_slots - 4


def test_who_can_ever_fit_depends_on_the_tokens_of_a_step() -> None:
    """64 tokens: 16 blocks of full attention, and of a window of 8 either all 16, or cdiv(8 - 1 + 8, 4) + 1 = 5."""
    layers = attention(), attention("sliding_window", window=8)
    assert allocator(*layers, num_blocks=33).admission_slots(60, 5) == 0
    assert allocator(*layers, num_blocks=32).admission_slots(60, 5) is None
    assert allocator(*layers, num_blocks=22, max_num_batched_tokens=8).admission_slots(60, 5) == 0
    assert allocator(*layers, num_blocks=21, max_num_batched_tokens=8).admission_slots(60, 5) is None
    assert allocator(*layers, num_blocks=99).admission_slots(60, 6) is None  # longer than max_model_len


def test_state_layers_and_state_slots_are_one_too_many() -> None:
    with pytest.raises(ConfigError, match="state_slots is 4, but layer_groups"):
        allocator(LayerGroup(kind="state", num_layers=2, state_bytes=100), state_slots=4)
    assert allocator(attention(), state_slots=5).state_slots == 8
