"""Server slots as in llama.cpp: each runs one request, and remembers the tokens of its last one until it is needed for another.

Not modelled: the cache of prompts in host memory (--cache-ram), chunks moved to other positions (--cache-reuse) and context shift.
State of fixed size (recurrent layers) is taken to be there for every prefix, as the context checkpoints of llama.cpp aim at; of
layers with a window, `pagedkv.slot_windows` knows what is there.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from pagedkv.allocation import KVPoolSettings
from pagedkv.arrays import NO_TOKENS, Int32Array
from pagedkv.errors import IntegrityError
from pagedkv.jit import fixed_types
from pagedkv.kv_request import KVRequest
from pagedkv.slot_arrays import NO_SLOT, NUM_BUSY, SlotArrays, choose_slot
from pagedkv.slot_windows import SlotWindows, begin_window, count_computed, reusable_tokens

# Their arguments have the same types in every allocator.
_choose_slot = fixed_types(choose_slot)
_reusable_tokens = fixed_types(reusable_tokens)
_begin_window = fixed_types(begin_window)
_count_computed = fixed_types(count_computed)


def common_prefix(a: Int32Array, b: Int32Array) -> int:
    """Return how many leading tokens are the same. O(shorter one), O(1) if the first token differs."""
    n = min(a.size, b.size)
    if n == 0 or a[0] != b[0]:
        return 0
    differs = a[:n] != b[:n]
    first = int(differs.argmax())
    return first if differs[first] else n


@dataclass(eq=False, kw_only=True)
class ServerSlot:
    """One of the places where requests run, as who brings token ids sees it. What else is known of it is in the arrays."""

    index: int
    """Its number."""
    request: KVRequest | None = None
    """What runs here; None: it is idle."""
    tokens: Int32Array = field(default_factory=lambda: NO_TOKENS)
    """While it is idle: the tokens whose keys and values it still has."""
    namespace: str = ""
    """What they were computed under."""
    num_computed: int = 0
    """While it runs: leading tokens whose keys and values are known to be there."""


class ServerSlots:
    """The server slots, the requests in them, and the choice of a slot for the next one.

    Whoever takes or gives back a slot in `arrays`, which the allocator does with its cells, says so here.
    """

    def __init__(self, settings: KVPoolSettings, num_server_slots: int, *, share_cells: bool) -> None:
        self.slots = tuple(ServerSlot(index=i) for i in range(num_server_slots))
        self.arrays = SlotArrays.empty(num_server_slots, SlotWindows.of(settings, num_server_slots, shared=share_cells))
        self.remembers = bool(settings.enable_prefix_caching)
        """Whether idle slots keep what they have computed."""
        self._settings = settings
        self._running: dict[KVRequest, ServerSlot] = {}

    def of(self, request: KVRequest) -> ServerSlot | None:
        """Return the slot that `request` runs in."""
        return self._running.get(request)

    def running(self) -> tuple[KVRequest, ...]:
        """Return the requests that run, in order of admission."""
        return tuple(self._running)

    def idle(self) -> Iterator[ServerSlot]:
        """Yield the slots in which nothing runs, by number."""
        return (slot for slot in self.slots if slot.request is None)

    def choose(self, request: KVRequest) -> tuple[ServerSlot, int] | None:
        """Return the slot that an admission would get now and the leading tokens it would find there; None if none is idle.

        Which one it is, `choose_slot` says. What it has is cut to the common prefix either way, or to what layers with a window
        can go on from, and the last token is always computed. O(server slots + tokens compared).

        Raises:
            ConfigError: If the request knows fewer token_ids than tokens.
        """
        tokens = self._tokens(request, request.num_tokens)
        common = np.array([self._common(slot, request, tokens) for slot in self.slots], np.int64)
        chosen = int(_choose_slot(self.arrays._replace(num_common=common), request.num_tokens))
        if chosen == NO_SLOT:
            return None
        kept, windows = int(self.arrays.num_kept[chosen]), self.arrays.windows
        found = _reusable_tokens(windows, chosen, kept, int(common[chosen]), int(request.num_tokens))
        return self.slots[chosen], int(found)

    def check(self, request: KVRequest, num_new_tokens: int, num_slots_held: int) -> None:
        """Raise ConfigError unless `request` can ask for slots for `num_new_tokens` more tokens."""
        request.check_known(max_model_len=self._settings.max_model_len, num_keys=0)
        request.check_slots(num_new_tokens=num_new_tokens, num_slots_held=num_slots_held)
        request.check_length(request.num_computed_tokens + num_new_tokens, self._settings.max_model_len)
        self._tokens(request, request.num_tokens)
        if request not in self._running:
            request.check_place(len(self._running), self._settings.max_num_seqs)

    def begin_window(self, slot: ServerSlot, request: KVRequest, num_kept: int, num_cached: int) -> None:
        """Note that `request` begins in `slot`, which remembered `num_kept` tokens, behind `num_cached` of them."""
        message_start = int(request.message_start)
        _begin_window(self.arrays.windows, slot.index, int(num_kept), int(num_cached), int(request.num_tokens), message_start)

    def count_computed(self, slot: ServerSlot, num_tokens: int) -> None:
        """Note that `slot` computes so many more tokens."""
        _count_computed(self.arrays.windows, slot.index, int(num_tokens))

    def start(self, slot: ServerSlot, request: KVRequest, num_cached: int) -> None:
        """Note that `request` runs in `slot`, which has its first `num_cached` tokens, and which slots have been purged for it."""
        slot.request, slot.num_computed = request, num_cached
        self._running[request] = slot
        self.forget_lost()

    def forget_lost(self) -> None:
        """Let slots that are not idle any more, or that have been purged, know nothing."""
        for slot, kept in zip(self.slots, self.arrays.num_kept.tolist(), strict=True):
            if not kept and slot.tokens.size:
                slot.tokens, slot.namespace = NO_TOKENS, ""

    def slots_of_fork(self, parent: KVRequest, child: KVRequest) -> tuple[ServerSlot, ServerSlot]:
        """Return the slot of `parent` and the first idle one, in which `child` can run.

        Raises:
            ConfigError: If `parent` does not run, `child` runs, knows too few tokens, or no slot is idle.
        """
        slot = self.running_slot(parent)
        if child in self._running:
            raise child.error("holds slots already: only a request that holds nothing can be forked into")
        if child.num_tokens < parent.num_computed_tokens:
            raise child.error(
                f"{child.num_tokens} known tokens: needs the {parent.num_computed_tokens} that its parent has computed"
            )
        child.check_place(len(self._running), self._settings.max_num_seqs)
        target = next(self.idle(), None)
        if target is None:
            raise child.error(f"all {len(self.slots)} server slots run requests: free one first, or give the pool room for more")
        return slot, target

    def running_slot(self, request: KVRequest) -> ServerSlot:
        """Return the slot that `request` runs in.

        Raises:
            ConfigError: If there is none.
        """
        slot = self._running.get(request)
        if slot is None:
            raise request.holds_nothing()
        return slot

    def note_computed(self, request: KVRequest, num_slots_held: int) -> None:
        """Hear that all its num_computed_tokens, of which each must have a slot, are there now."""
        slot = self.running_slot(request)
        if not 0 <= request.num_computed_tokens <= num_slots_held:
            raise request.error(f"{request.num_computed_tokens} computed tokens, but it holds {num_slots_held} slots")
        slot.num_computed = request.num_computed_tokens

    def end(self, request: KVRequest) -> ServerSlot:
        """Note that the slot of `request` is idle; return it. All tokens known to be computed stay, if others can be told them.

        Raises:
            ConfigError: If it does not run, or knows fewer token_ids than stay.
        """
        slot = self.running_slot(request)
        num_kept = min(slot.num_computed, request.num_computed_tokens, request.num_tokens)
        tokens = self._tokens(request, num_kept).copy()
        del self._running[request]
        slot.request, slot.tokens, slot.namespace = None, tokens, request.namespace
        slot.num_computed = 0
        return slot

    def check_integrity(self) -> None:
        """Raise IntegrityError unless slots and requests point to each other, and what they remember can be."""
        runs, num_kept = self.arrays.runs.tolist(), self.arrays.num_kept.tolist()
        for slot in self.slots:
            running = slot.request is not None
            known = self._running.get(slot.request) if slot.request is not None else slot
            told = (runs[slot.index], num_kept[slot.index])
            if known is not slot or told != (running, slot.tokens.size) or (told[1] if running else slot.num_computed):
                raise IntegrityError(f"{slot}, {told}, does not fit the running requests {[r.request_id for r in self._running]}")
        if not len(self._running) == sum(runs) == self.arrays.counts[NUM_BUSY]:
            raise IntegrityError(f"{len(self._running)} requests run in {self.slots}")

    def _tokens(self, request: KVRequest, num_tokens: int) -> Int32Array:
        """Return its first `num_tokens` tokens, none if it shares nothing."""
        if not self.remembers or not request.token_ids.size:
            return NO_TOKENS
        if request.token_ids.size < num_tokens:
            raise request.error(
                f"{request.token_ids.size} token_ids, but {num_tokens} tokens are known: extend them, or leave them out"
            )
        return request.token_ids[:num_tokens]

    def _common(self, slot: ServerSlot, request: KVRequest, tokens: Int32Array) -> int:
        return common_prefix(slot.tokens, tokens) if slot.namespace == request.namespace else 0
