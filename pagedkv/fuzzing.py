"""Random requests against an allocator, every operation held to its laws: what a scheduler does, and what it must never do.

Whatever is random comes from a function that the caller passes in: one seed is one sequence of operations. The checks draw nothing,
so with fewer operations, or with more checks, the sequence is the same up to there.
"""

from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from typing import Any

import numpy as np

from pagedkv.allocation import KVPoolSettings
from pagedkv.allocators import ALLOCATORS
from pagedkv.errors import ConfigError, IntegrityError
from pagedkv.eviction import EVICTION_POLICIES
from pagedkv.fuzz_guest import Guest, Script
from pagedkv.fuzz_owner import Choose, FuzzCounts, FuzzOwner
from pagedkv.fuzzer import Fuzzer
from pagedkv.heaps import HEAPS
from pagedkv.kv_spec import LayerGroup


class FuzzFailure(IntegrityError):  # noqa: N818 - it says what happened in a run, and is an IntegrityError
    """A law that an allocator broke, with all that is needed to see it again."""

    def __init__(self, *, allocator: str, settings: KVPoolSettings, seed: int | str, operation: int, owner: FuzzOwner) -> None:
        self.allocator, self.settings, self.seed, self.operation = allocator, settings, seed, operation
        self.trail = tuple(" ".join(map(str, entry)) for entry in owner.trail)
        """The last operations, the one that failed at the end."""

    def __str__(self) -> str:
        return (
            f"{self.__cause__}\n  allocator {self.allocator}, {self.settings}\n  seed {self.seed!r}, operation {self.operation} "
            f"({self.operation + 1} operations show it again)\n  " + "\n  ".join(self.trail)
        )


def fuzz(
    allocator: str,
    settings: KVPoolSettings,
    choose: Choose,
    *,
    ops: int,
    seed: int | str,
    check_every: int = 251,
    check_all_from: int | None = None,
    progress: Callable[[int], None] = lambda operations: None,
) -> FuzzCounts:
    """Do `ops` random operations on the registered `allocator`: cheap checks on each, all checks now and then and at the end.

    Args:
        allocator: Its name in the registry.
        settings: What it is built from; see `fuzz_settings`.
        choose: The source of randomness, fresh.
        ops: Operations.
        seed: What `choose` was made from: for the message of a failure only.
        check_every: Operations from one full check to the next. A failure at operation n was caused after n - check_every.
        check_all_from: Operation from which every one gets all checks: they find a fault in the operation that causes it. The last
            one by default.
        progress: Is told, at every full check, how many operations are done.

    Raises:
        FuzzFailure: If a law is broken, or an operation raises what it must not.
        ConfigError: If there is no such allocator, or it cannot work with these settings.
    """
    owner = fuzz_owner(allocator, settings)
    fuzzer = Fuzzer(owner, choose)
    operation = 0
    try:
        for operation in range(ops):
            full = operation % check_every == 0
            owner.thorough = full or operation >= (ops - 1 if check_all_from is None else check_all_from)
            if full:
                progress(operation)
            fuzzer.step(operation)
        owner.thorough = True
        owner.memory.check()
    except Exception as error:
        raise FuzzFailure(allocator=allocator, settings=settings, seed=seed, operation=operation, owner=owner) from error
    return owner.counts


def fuzz_owner(allocator: str, settings: KVPoolSettings) -> FuzzOwner:
    """Return the owner of a new `allocator`, knowing which left-out arrays it must notice: those that its like misses when new."""
    new = ALLOCATORS.load(allocator)
    noticed = []
    for kind in ("tokens left out", "keys left out"):
        owner = FuzzOwner(new(settings), settings, must_refuse=(kind,))
        script = Script.for_pool(settings, np.zeros(settings.max_model_len, np.int32))
        guest = Guest(script, name="probe", prompt_tokens=settings.max_model_len - 1, output_tokens=1)
        call = owner.arrive(guest) and owner.misuse_call(kind, guest)
        try:
            if call:
                call()
        except ConfigError:
            noticed.append(kind)
    return FuzzOwner(new(settings), settings, must_refuse=noticed)


def hybrid_layers(block_size: int) -> tuple[LayerGroup, ...]:
    """Return the layers of a small model: one of full attention and one with a window of two blocks."""
    full = LayerGroup(kind="full", num_layers=1, num_kv_heads=1, key_dim=8, value_dim=8)
    return full, replace(full, kind="sliding_window", window=2 * block_size)


def fuzz_settings(
    allocator: str, *, num_slots: int = 64, max_model_len: int = 24, max_num_seqs: int = 5
) -> tuple[KVPoolSettings, ...]:
    """Return small pools, short of room, that `allocator` can work with.

    They have blocks of 1, 2 and 4 tokens with prefix caching and without. Two more have a watermark, state, windows of server
    slots and no gate for whole prompts, one of them pages that are no blocks, and one has more and longer requests in larger
    blocks. Then comes each other value of each setting in `_OTHER_VALUES` that the allocator reads when it is built.

    Raises:
        ConfigError: If it can work with none.
    """
    new = ALLOCATORS.load(allocator)

    def works(settings: KVPoolSettings) -> bool:
        try:
            new(settings)
        except ConfigError:
            return False
        return True

    def small(block_size: int, *, caching: bool, **more: Any) -> KVPoolSettings:
        settings: dict[str, Any] = {
            "num_blocks": num_slots // block_size,
            "max_num_seqs": max_num_seqs,
            "max_model_len": max_model_len,
            "page_tokens": block_size,
            "offload_blocks": max(num_slots // block_size // 4, 1),
            "layer_groups": hybrid_layers(block_size),
        }
        return KVPoolSettings(block_size=block_size, enable_prefix_caching=caching, **(settings | more))

    rare: dict[str, Any] = {"watermark": 0.1, "state_slots": 3, "reserve_full_isl": False}
    rare |= {"window_tokens": 2, "window_cells": 24, "context_checkpoints": 2, "ubatch_tokens": 3}
    large: dict[str, Any] = {"num_blocks": num_slots, "max_num_seqs": 3 * max_num_seqs, "max_model_len": 10 * max_model_len}
    candidates = [small(block_size, caching=caching) for block_size in (1, 2, 4) for caching in (False, True)]
    candidates += [small(2, caching=False, page_tokens=3, **rare), small(2, caching=True, **rare), small(16, caching=True, **large)]
    pools = [settings for settings in candidates if works(settings)]
    if not pools:
        new(candidates[0])
    usual = small(4, caching=True)
    usual = usual if usual in pools else pools[0]
    for name in sorted(settings_read(allocator, usual) & _OTHER_VALUES.keys()):
        others = [_with(usual, name, value) for value in _OTHER_VALUES[name]() if value != getattr(usual, name)]
        pools += filter(works, others)
    return tuple(pools)


def _with(settings: KVPoolSettings, name: str, value: Any) -> KVPoolSettings:
    return replace(settings, **{name: value})


_OTHER_VALUES: dict[str, Callable[[], Iterable[object]]] = {
    "contiguous_heap": HEAPS.names,
    "eviction": EVICTION_POLICIES.names,
    "freed_to_front": lambda: (False,),
    "kv_cache_dtype": lambda: ("fp8",),
    "max_num_batched_tokens": lambda: (3,),
    "offload_blocks": lambda: (0, 1),
    "prefix_match_unit": lambda: (1, 2),
}
"""Settings that concern some allocators only."""


def settings_read(allocator: str, settings: KVPoolSettings) -> frozenset[str]:
    """Return the names of the settings that `allocator` reads when it is built from `settings`.

    Example:
        >>> sorted(settings_read("contiguous-max", fuzz_settings("contiguous-max")[0]))
        ['block_size', 'contiguous_heap', 'max_model_len', 'max_num_seqs', 'num_blocks', 'num_slots', 'state_slots']

    Raises:
        ConfigError: If it cannot work with them.
    """
    read = set[str]()

    class Watched(KVPoolSettings):
        __slots__ = ()

        def __getattribute__(self, name: str) -> object:
            read.add(name)
            return super().__getattribute__(name)

    watched = Watched(**{each.name: getattr(settings, each.name) for each in fields(settings)})
    read.clear()
    ALLOCATORS.load(allocator)(watched)
    return frozenset(read)
