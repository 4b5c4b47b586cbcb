"""What memory over a pool says of itself holds for all kinds of it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedkv.allocation import KVPoolSettings
from pagedkv.errors import ConfigError
from pagedkv.hybrid_steps import HybridStepAllocator
from pagedkv.kv_spec import LayerGroup
from pagedkv.paged_steps import PagedStepAllocator
from pagedkv.pooled_memory import PooledMemory

BLOCK = 4
FULL = LayerGroup(kind="full", num_layers=2, num_kv_heads=1, key_dim=16, value_dim=16)
WINDOW = LayerGroup(kind="sliding_window", num_layers=2, num_kv_heads=1, key_dim=16, value_dim=16, window=9)
MODELS = {"one table": (), "window": (WINDOW, FULL), "windows alone": (WINDOW,)}


def memory_of(model: str, **options: object) -> PooledMemory:
    settings = {"num_blocks": 20, "block_size": BLOCK, "max_num_seqs": 4, "max_model_len": 200, "layer_groups": MODELS[model]}
    pool = KVPoolSettings(**settings | options)  # type: ignore[arg-type]
    return HybridStepAllocator(pool) if MODELS[model] else PagedStepAllocator(pool)


@given(
    model=st.sampled_from(sorted(MODELS)),
    num_blocks=st.integers(8, 40),
    state_slots=st.sampled_from([0, BLOCK, 3 * BLOCK]),
    max_num_batched_tokens=st.sampled_from([None, 3, 30]),
)
def test_most_tokens_is_the_longest_request_that_is_admitted(model: str, **sizes: int | None) -> None:
    memory = memory_of(model, **sizes)
    most = memory.most_tokens(memory.usable_slots // memory.unit_slots)
    assert most > 0
    assert memory.admission_slots(most, 1) == 0  # the last token needs no slot
    assert most == memory.max_model_len or memory.admission_slots(most + 1, 1) is None


@pytest.mark.parametrize("model", sorted(MODELS))
def test_a_state_cannot_be_shared(model: str) -> None:
    memory = memory_of(model, state_slots=BLOCK)
    with pytest.raises(ConfigError, match="cannot be forked"):
        memory.fork(0, 1, 3)
    assert not memory.forks.any()
    assert np.all(memory.pool.ref_cnt[1:] == 0)
