"""TensorRT-LLM's block manager as its tests see it: an allocator whose memory is looked at after every call."""

from dataclasses import replace
from typing import Any

import numpy as np

from pagedkv.allocation import Grant, KVPoolSettings
from pagedkv.allocators.tensorrt_llm import TensorRTLLMAllocator
from pagedkv.kv_request import KVRequest
from pagedkv.shadow_memory import ShadowMemory, check_unchanged, prefix_identities, state_of

POOL = KVPoolSettings(num_blocks=8, block_size=4, max_num_seqs=4, max_model_len=40, enable_prefix_caching=True)


class World:
    """An allocator, its owner, and the shadow of its memory, checked after every call."""

    def __init__(self, pool: KVPoolSettings = POOL, *, host_blocks: int = 0) -> None:
        self.allocator = TensorRTLLMAllocator(replace(pool, offload_blocks=host_blocks))
        self.memory = ShadowMemory(self.allocator)
        self.last = Grant()
        self.num_requests = 0

    def request(self, tokens: Any, **more: Any) -> KVRequest:
        self.num_requests += 1
        ids = np.array(list(tokens), np.int32)
        return KVRequest(request_id=self.num_requests, num_tokens=ids.size, token_ids=ids, **more)

    def cached(self, tokens: Any, **more: Any) -> int:
        return self.allocator.get_computed_tokens(self.request(tokens, **more))

    def step(self, request: KVRequest, num_new: int, *, computed: bool = True) -> bool:
        before = state_of(self.allocator)
        grant = self.allocator.allocate_slots(request, num_new)
        if grant is None:
            check_unchanged(before, state_of(self.allocator))
            return False
        self.last = grant
        tokens = np.arange(POOL.max_model_len * 2) if not request.token_ids.size else request.token_ids
        self.memory.write(request, prefix_identities(tokens, request.namespace), grant, num_new)
        if computed:
            self.allocator.note_computed(request)
        self.memory.check()
        return True

    def admit(self, tokens: Any, *, computed: bool = True, **more: Any) -> KVRequest:
        """A request whose prompt is computed in one step, as far as it is not cached."""
        request = self.request(tokens, **more)
        assert self.step(request, request.num_tokens - self.allocator.get_computed_tokens(request), computed=computed)
        return request

    def decode(self, request: KVRequest, token: int) -> None:
        request.token_ids = np.append(request.token_ids, np.int32(token))
        request.num_tokens += 1
        self.memory.identities[request] = (prefix_identities(request.token_ids, request.namespace),)
        assert self.step(request, 1)

    def free(self, *requests: KVRequest) -> None:
        for request in requests:
            self.allocator.free(request)
            self.memory.forget(request)
            self.memory.check()

    def leave(self, tokens: Any, **more: Any) -> None:
        """A request that comes, computes `tokens` and one more, and ends: all of `tokens` are stored."""
        self.free(self.admit([*tokens, 99], **more))

    def blocks(self, request: KVRequest) -> list[int]:
        return (self.allocator.slots_held(request)[:: POOL.block_size] // POOL.block_size).tolist()

    def fill(self, num_blocks: int) -> None:
        """Evict: a request that shares nothing takes so many blocks for a moment."""
        request = KVRequest(request_id="fill", num_tokens=num_blocks * POOL.block_size)
        assert self.step(request, request.num_tokens)
        self.free(request)


def seq(start: int, count: int) -> list[int]:
    return list(range(start, start + count))
