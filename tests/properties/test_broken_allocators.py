"""The laws of allocators notice what is broken on purpose, and let pass what is not."""

from typing import Any

import pytest
from allocator_contract import MAX_MODEL_LEN, SMALL, run
from hypothesis import Phase
from toy_allocators import BROKEN, KeepingToy, MovesAndCopies, SharesUnasked, Toy

from pagedkv.allocation import KVPoolSettings
from pagedkv.allocators import ALLOCATORS
from pagedkv.errors import IntegrityError
from pagedkv.fuzzing import FuzzFailure, fuzz, fuzz_settings
from pagedkv.sims.fuzz_command import choose_from


@pytest.mark.parametrize("kind", [Toy, KeepingToy, MovesAndCopies])
def test_correct_toys_are_accepted(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ALLOCATORS._registered, "toy", kind)
    for pool in fuzz_settings("toy", **SMALL)[:4]:
        run("toy", pool, examples=30)
        fuzz("toy", pool, choose_from(1), ops=3000, seed=1)


def pool_for(kind: Any) -> KVPoolSettings:
    return KVPoolSettings(
        num_blocks=32, block_size=1, max_model_len=MAX_MODEL_LEN, max_num_seqs=3, enable_prefix_caching=kind is not SharesUnasked
    )


def broken() -> list[Any]:
    return [pytest.param(kind, message, id=kind.__name__) for kind, message in BROKEN.items()]


@pytest.mark.parametrize(("kind", "message"), broken())
def test_a_broken_allocator_is_caught(kind: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ALLOCATORS._registered, "broken", kind)
    with pytest.raises(IntegrityError, match=message):
        run("broken", pool_for(kind), examples=1000, phases=(Phase.generate,))


@pytest.mark.parametrize(("kind", "message"), broken())
def test_a_broken_allocator_is_caught_by_fuzzing(kind: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ALLOCATORS._registered, "broken", kind)
    with pytest.raises(FuzzFailure, match=message):
        fuzz("broken", pool_for(kind), choose_from(1), ops=20_000, seed=1)
