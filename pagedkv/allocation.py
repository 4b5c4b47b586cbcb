"""The contract of an allocator: requests come, grow, share what is alike, and go.

A slot is room for the keys and values of one token in every layer. A request's tokens lie in slots; which ones, the allocator
decides. It has no clock, no randomness and no I/O. A shortage is a value, None, and a refusal changes nothing.

The owner of a request (a scheduler) keeps `KVRequest` up to date:

    grant = allocator.allocate_slots(request, num_new_tokens)           # None: does not fit now
    if grant is not None:
        request.num_computed_tokens += grant.num_cached_tokens + num_new_tokens
        ...copy grant.copies, compute the step...
        allocator.note_computed(request)
    ...
    allocator.free(request)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from pagedkv.arrays import Int64Array
from pagedkv.errors import ConfigError, expect_one_or_more
from pagedkv.kv_request import KVRequest
from pagedkv.kv_spec import LayerGroup

NO_SLOT = -1
"""Stands, in a request's slots, for a token that has none any more: it has left the window."""
NO_COPIES: Int64Array = np.empty((0, 2), np.int64)


class Grant(NamedTuple):
    """What a request got.

    Example:
        >>> grant = Grant(num_cached_tokens=2, copies=np.array([[4, 8], [5, 9]]))
        >>> memory = np.arange(12)
        >>> for source, destination in grant.copies:
        ...     memory[destination] = memory[source]
        >>> memory[8:10].tolist(), Grant()
        ([4, 5], Grant(num_cached_tokens=0, copies=array([], shape=(0, 2), dtype=int64)))
    """

    num_cached_tokens: int = 0
    """Tokens found in the cache, to count as computed: at admission the leading ones, else 0. Never all that are known."""
    copies: Int64Array = NO_COPIES
    """Slots to copy, in order, before the step computes anything: int64 [n, 2], source and destination."""


class Allocator(Protocol):
    """Hands out KV slots, request by request."""

    name: str
    """Its name in the registry."""
    placement: str
    """How it finds room: "block", "cell", "page", or the name of the heap."""
    num_slots: int
    """Slot ids are 0 to num_slots - 1."""
    usable_slots: int
    """Slots that requests can get: the denominator of every share."""
    max_model_len: int
    """Longest request, in tokens."""
    max_num_seqs: int
    """Most requests that hold slots at once."""
    state_slots: int
    """Slots' worth of memory that each running request takes for its state besides."""
    unit_slots: int
    """Slots that are taken and given back together: a block, a page, or 1."""
    num_groups: int
    """Layer groups that keep slots of their own; 1 but for hybrid models."""

    def admission_slots(self, prompt_tokens: int, output_tokens: int) -> int | None:
        """Return the slots to take in one piece at admission, 0 if the request grows step by step, None if it can never fit.

        The owner writes it to `KVRequest.admission_slots`. The last output token never needs a slot. O(1).
        """

    def get_computed_tokens(self, request: KVRequest) -> int:
        """Return how many leading tokens an admission now would find cached, at most num_tokens - 1. Nothing is taken.

        O(tokens or blocks compared), where nothing is shared O(1).
        """

    def allocate_slots(self, request: KVRequest, num_new_tokens: int, *, has_scheduled_reqs: bool = False) -> Grant | None:
        """Give `request` slots for `num_new_tokens` beyond its computed and its cached tokens.

        A request that holds nothing is admitted: its cached prefix is looked up and held first. What it costs differs: see the
        table in docs/allocator.md.

        Args:
            request: The request. Its owner counts cached and new tokens as computed afterwards, the allocator never.
            num_new_tokens: Known tokens to compute now, 1 or more.
            has_scheduled_reqs: Something runs, so an admission must leave the watermark free.

        Returns:
            None if they do not fit now: nothing has changed then.

        Raises:
            ConfigError: If the numbers cannot be; nothing has changed then.
        """

    def note_computed(self, request: KVRequest) -> None:
        """Hear that the keys and values of all `request.num_computed_tokens` tokens are in their slots now.

        O(tokens newly computed) where that makes them findable, else O(1).
        """

    def free(self, request: KVRequest) -> None:
        """Take back what a finished request holds. Its content may stay for others until the room is needed. O(units held).

        Raises:
            ConfigError: If it holds nothing: it was never admitted, or freed before.
        """

    def preempt(self, request: KVRequest) -> None:
        """Take back what `request` holds; it will come again. Its num_computed_tokens is 0 afterwards. O(units held).

        Raises:
            ConfigError: As `free`.
        """

    def live_requests(self) -> Sequence[KVRequest]:
        """Return the requests that hold slots, in order of admission. O(requests)."""

    def num_slots_held(self, request: KVRequest) -> int:
        """Return the slots taken for the tokens of `request`, shared and unfilled ones included; 0 if it holds nothing. O(1)."""

    def slots_held(self, request: KVRequest, group: int = 0) -> Int64Array:
        """Return them: entry t is the slot of its token t (NO_SLOT if given back); entries beyond its tokens are unfilled.

        O(slots held).
        """

    def cached_slots(self) -> Int64Array:
        """Return the slots that nobody holds but that keep content for reuse: free for anyone who needs them.

        O(num_slots log num_slots) at most.
        """

    @property
    def num_cached_slots(self) -> int:
        """How many `cached_slots` there are. O(requests) at most, but for hits inside a block."""

    @property
    def free_slots(self) -> int:
        """Slots that nobody holds, cached ones included. O(requests) at most."""

    @property
    def rounding_slots(self) -> int:
        """Slots lost to a heap's rounding of live reservations: neither held nor free. O(1)."""

    def check_integrity(self) -> None:
        """Raise IntegrityError, with the state dumped, if an invariant is broken. O(num_slots + slots held)."""


@runtime_checkable
class Forkable(Protocol):
    """An allocator under which requests can share what they have computed, and part ways."""

    def fork(self, parent: KVRequest, child: KVRequest) -> None:
        """Let `child`, which holds nothing and knows the same tokens, share all slots of `parent`.

        The owner then sets `child.num_computed_tokens` to that of `parent`: the allocator does not. Whoever writes first into a
        slot that both hold gets one of its own: the copies are in the grant of that allocation. O(units held).

        Raises:
            ConfigError: If `parent` holds nothing, or `child` holds something; nothing has changed then.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class KVPoolSettings:
    """What an allocator is built from. Every allocator reads what concerns it.

    Example:
        >>> KVPoolSettings(num_blocks=9, block_size=4, max_model_len=32).num_slots
        36
        >>> KVPoolSettings(num_blocks=9, block_size=4, max_model_len=0)
        Traceback (most recent call last):
        pagedkv.errors.ConfigError: max-model-len is 0: needs 1 or more
    """

    num_blocks: int
    """Blocks in the pool, vLLM's null block included; every allocator divides the same num_blocks * block_size slots."""
    block_size: int = 16
    """Tokens per block."""
    max_num_seqs: int = 256
    """Rows of the running batch."""
    max_model_len: int
    """Longest prompt + output of a request, in tokens."""
    contiguous_heap: str = "buddy"
    """Which heap places contiguous reservations: a name in `pagedkv.heaps`."""
    watermark: float = 0.0
    """Share of the blocks that an admission must leave free while something runs."""
    reserve_full_isl: bool = True
    """Admit a request only if all its known tokens fit now (vLLM's scheduler_reserve_full_isl)."""
    lookahead_slots: int = 0
    """Slots for drafted tokens that a running request may take beyond its known ones (speculative decoding)."""
    freed_to_front: bool = True
    """Blocks freed without a key are handed out next; False: last, as in vLLM 0.19."""
    state_slots: int = 0
    """Slots' worth of memory that each running request takes for state of fixed size (linear attention, Mamba)."""
    enable_prefix_caching: bool = False
    """Keep what finished and preempted requests computed, and give it to requests that begin alike."""
    eviction: str = "lru"
    """What leaves the prefix cache first: a name in `pagedkv.eviction`."""
    offload_blocks: int = 0
    """Blocks of a second tier, in host memory or on NVMe, that keeps what leaves the prefix cache; 0: there is none."""
    prefix_match_unit: int = 0
    """Tokens in which a hit may end inside a block: a divisor of block_size; 0: hits end with a block."""
    layer_groups: tuple[LayerGroup, ...] = ()
    """What the model's layers cache, for an allocator that gives each group blocks of its own, which needs it."""
    kv_cache_dtype: str = "auto"
    """Element type of the cache, for pages of layer groups: a name in `pagedkv.kv_spec`."""
    max_num_batched_tokens: int | None = None
    """Most tokens of a step: how far a windowed layer can run ahead of what it gives back; None: not known."""
    window_tokens: int = 0
    """Tokens of the window of layers that have cells of their own (llama.cpp); 0: there are none, all layers keep all tokens."""
    window_cells: int = 0
    """Those cells, of all server slots."""
    context_checkpoints: int = 32
    """Most copies of its window that a server slot keeps, from which it can go on (llama.cpp's --ctx-checkpoints)."""
    ubatch_tokens: int = 512
    """Most tokens that a server with such layers computes together."""
    page_tokens: int = 64
    """Tokens in one physical page of one layer's keys (virtual contiguous memory): page bytes / (KV heads * head size * element
    bytes)."""

    def __post_init__(self) -> None:
        """Refuse what no allocator can work with.

        Raises:
            ConfigError: With the values that would work.
        """
        expect_one_or_more(self, "num_blocks", "block_size", "max_num_seqs", "max_model_len", "page_tokens", "ubatch_tokens")
        unit = self.prefix_match_unit
        if unit < 0 or (unit and self.block_size % unit):
            raise ConfigError(f"prefix-match-unit is {unit}: needs 0, or a divisor of block-size {self.block_size}")
        if min(self.window_tokens, self.window_cells, self.context_checkpoints) < 0:
            raise ConfigError(
                f"a window of {self.window_tokens} tokens, {self.window_cells} cells, {self.context_checkpoints} checkpoints: "
                "needs 0 or more of each"
            )
        if self.offload_blocks < 0:
            raise ConfigError(f"offload-blocks is {self.offload_blocks}: needs 0 or more")
        if not 0 <= self.watermark < 1 or self.state_slots < 0:
            raise ConfigError(f"watermark {self.watermark} needs 0 or more, below 1; state_slots {self.state_slots} 0 or more")

    @property
    def num_slots(self) -> int:
        """Slots in the pool."""
        return self.num_blocks * self.block_size
