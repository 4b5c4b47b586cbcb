"""Requests that go on from what others have computed: parallel sampling and beams. They share blocks until they write to them."""

from pagedkv.block_hash import BlockKeys
from pagedkv.errors import ConfigError
from pagedkv.pooled_memory import PooledMemory
from pagedkv.scheduling.content import NO_SEGMENTS, Segments, keyed_segments
from pagedkv.scheduling.following_keys import FollowingKeys
from pagedkv.scheduling.requests import NO_ROW
from pagedkv.scheduling.roster import Roster
from pagedkv.step_allocation import StepAllocator


class Forks:
    """Forks requests of `roster`. What is copied on the first write, the compiled step decides: `pagedkv.shared_tails`."""

    def __init__(self, roster: Roster, allocator: StepAllocator, keys: FollowingKeys) -> None:
        self._roster, self._allocator, self._keys = roster, allocator, keys

    def fork(self, parent: int, *, content: Segments | None = None, keys: BlockKeys | None = None) -> int:
        """Let a new request go on from what `parent` has computed; return its index: see `Scheduler.fork`."""
        memory = self._expect_decoding(parent)
        self._keys.expect_of_fork(parent, keys)
        roster, requests = self._roster, self._roster.requests
        segments = keyed_segments(keys, memory.hash_block_size) if keys is not None else content
        child = requests.fork(
            parent,
            segments if memory.pool.enable_caching and segments is not None else NO_SEGMENTS,
            self._keys.room(parent),
        )
        if parent in self._keys:
            self._keys.begin(child)
        row = roster.join(child)
        if row is not None:
            known, records = int(requests.arrays["num_known_tokens"][parent]), requests.arrays
            memory.fork(int(records["row"][parent]), row, known - 1)
            for name in ("num_computed_tokens", "num_cached_tokens", "num_hit_tokens"):
                records[name][child] = known - 1
            records["num_queried_tokens"][child] = known
        return child

    def take_over(self, request: int, parent: int, *, keys: BlockKeys | None = None) -> None:
        """Let `request` give up what it has and go on from what `parent` has computed: see `Scheduler.take_over`."""
        self._expect_decoding(request)
        memory, requests = self._expect_decoding(parent), self._roster.requests.arrays
        names = ["num_known_tokens", "prompt_tokens", "output_tokens"]
        alike = (request in self._keys) == (parent in self._keys)
        if request == parent or not alike or any(requests[name][request] != requests[name][parent] for name in names):
            raise ConfigError(f"request {request} cannot go on from {parent}: needs another of the same prompt, and as far")
        self._keys.expect_of_fork(parent, keys)
        if keys is None and memory.pool.enable_caching:
            raise ConfigError(
                f"request {request} cannot go on from {parent}: its blocks are known by its number, needs keys_follow"
            )
        row = int(requests["row"][request])
        memory.free(row)
        memory.fork(int(requests["row"][parent]), row, int(requests["num_computed_tokens"][parent]))
        if keys is not None:
            self._keys.replace(request, keys)

    def _expect_decoding(self, request: int) -> PooledMemory:
        """Return the memory, if `request` is one that can be forked."""
        requests, allocator = self._roster.requests.arrays, self._allocator
        if not isinstance(allocator, PooledMemory) or allocator.state_units:
            raise ConfigError(f"requests cannot be forked over {allocator.name} with a state: needs paged or hybrid memory without")
        runs = not self._roster.in_step and 0 <= request < self._roster.requests.size and requests["row"][request] != NO_ROW
        known = requests["num_known_tokens"][request] if runs else 0
        if not runs or requests["num_computed_tokens"][request] != known - 1 or known <= requests["prompt_tokens"][request]:
            raise ConfigError(f"request {request} cannot be forked: needs one that decodes, between steps")
        return allocator
