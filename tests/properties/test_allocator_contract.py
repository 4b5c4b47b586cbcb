"""The laws that every registered allocator keeps, after every operation, whatever its owner does.

A new allocator is covered by being registered.
"""

from typing import Any

import pytest
from allocator_contract import MAX_MODEL_LEN, SMALL, run

from pagedkv.allocation import KVPoolSettings
from pagedkv.allocators import ALLOCATORS
from pagedkv.fuzzing import fuzz_settings


def cases() -> list[Any]:
    """Every registered allocator on every small pool that concerns it."""
    return [
        pytest.param(name, pool, id=f"{name}-{i}")
        for name in ALLOCATORS.names()
        for i, pool in enumerate(fuzz_settings(name, **SMALL))
        if pool.max_model_len == MAX_MODEL_LEN and (pool.enable_prefix_caching or pool.block_size == 2)
    ]


@pytest.mark.parametrize(("name", "pool"), cases())
def test_allocator_keeps_its_contract(name: str, pool: KVPoolSettings) -> None:
    run(name, pool, examples=12)
