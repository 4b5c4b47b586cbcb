"""An allocator with a second tier, and its owner."""

from typing import Any

import numpy as np

from pagedkv.allocation import KVPoolSettings
from pagedkv.allocators.paged_offload import PagedOffloadAllocator
from pagedkv.events import EventLog
from pagedkv.fuzz_guest import Guest, Script
from pagedkv.fuzz_owner import FuzzOwner
from pagedkv.offload_tier import OffloadTier

POOL = KVPoolSettings(num_blocks=6, block_size=4, max_num_seqs=4, max_model_len=24, enable_prefix_caching=True, offload_blocks=4)


class World:
    """An allocator and its owner; every operation is checked against the shadow of its memory, host slots included."""

    def __init__(self, pool: KVPoolSettings = POOL, **more: Any) -> None:
        self.pool = pool
        self.allocator = PagedOffloadAllocator(pool, **more)
        self.owner = FuzzOwner(self.allocator, pool)
        self.log = EventLog()
        self.allocator.events = self.log
        self.num_guests = 0

    @property
    def tier(self) -> OffloadTier:
        return self.allocator.tier

    def guest(self, tokens: Any, output: int = 1) -> Guest:
        self.num_guests += 1
        script = Script(tokens=np.array([*tokens, *[99] * output], np.int32), block_size=self.pool.block_size)
        return Guest(script, name=self.num_guests, prompt_tokens=len(list(tokens)), output_tokens=output)

    def cached(self, tokens: Any) -> int:
        return self.allocator.get_computed_tokens(self.guest(tokens).request)

    def admit(self, tokens: Any) -> Guest:
        guest = self.guest(tokens)
        assert self.owner.admit(guest, guest.prompt_tokens)
        return guest

    def run(self, tokens: Any) -> None:
        self.owner.free(self.admit(tokens))
