"""llama.cpp without --kv-unified: every server slot has a stream of cells of its own."""

from collections.abc import Sequence

import numpy as np

from pagedkv.allocation import NO_COPIES, Grant, KVPoolSettings
from pagedkv.allocators import ALLOCATORS
from pagedkv.arrays import NO_SLOTS, Int64Array
from pagedkv.cell_cache import padded
from pagedkv.cell_slots import ServerSlots
from pagedkv.errors import IntegrityError
from pagedkv.kv_request import KVRequest
from pagedkv.slot_arrays import end_slot, start_slot


class SplitStreams:
    """`num_server_slots` private streams of `stream_cells` cells; a request takes a whole one for as long as it runs.

    Nobody else can use the rest of its stream, so all of it counts as held, like a reservation of the longest request: `slots_held`
    lists it behind the tokens. One sequence alone fills a stream from its first cell on, so token t lies in cell t, and the search
    for empty cells of `pagedkv.cell_cache` has nothing to decide. Running out of cells cannot happen: requests wait for a server
    slot, and there may be fewer of them than max_num_seqs.

    State of fixed size is set aside at load for every server slot, behind the streams; that of idle ones counts as free.
    """

    placement = "cell"
    unit_slots = num_groups = 1
    rounding_slots = 0

    def __init__(self, name: str, settings: KVPoolSettings, *, num_server_slots: int, stream_cells: int) -> None:
        self.name = name
        self.num_slots = settings.num_slots
        self.max_model_len, self.max_num_seqs, self.state_slots = (
            settings.max_model_len,
            settings.max_num_seqs,
            settings.state_slots,
        )
        self.stream_cells = stream_cells
        self.server_slots = ServerSlots(settings, num_server_slots, share_cells=False)
        self.usable_slots = num_server_slots * (stream_cells + self.state_slots)
        self._streams = list(range(num_server_slots))
        """By server slot: its stream."""
        self._used = [0] * num_server_slots
        """By server slot: tokens that were granted cells, while it runs."""
        self._uncopied: dict[int, tuple[int, int]] = {}
        """By server slot of a fork that has not written yet: the stream that it reads, which a running request has, and how far."""

    @property
    def n_kv(self) -> int:
        """Cells that attention reads for every token: up to the highest used one of the running requests, padded to 256."""
        used = (max(self._used[self._index(request)], request.num_computed_tokens) for request in self.server_slots.running())
        return padded(max(used, default=0), self.stream_cells)

    def admission_slots(self, prompt_tokens: int, output_tokens: int) -> int | None:
        """Return the length of a stream, or None if it is too short."""
        longest = min(self.stream_cells, self.max_model_len) if self._streams else 0
        return self.stream_cells if prompt_tokens + output_tokens - 1 <= longest else None

    def get_computed_tokens(self, request: KVRequest) -> int:
        """Return the common prefix with what the slot that it would get remembers. O(server slots + tokens compared)."""
        request.check_known(max_model_len=self.max_model_len, num_keys=0)
        chosen = self.server_slots.choose(request)
        return chosen[1] if chosen else 0

    def allocate_slots(self, request: KVRequest, num_new_tokens: int, *, has_scheduled_reqs: bool = False) -> Grant | None:
        """Take a server slot at admission; later tokens must fit into its stream. O(1), at admission as `get_computed_tokens`.

        Raises:
            ConfigError: Also if the tokens are more than the stream has cells.
        """
        slot, num_cached = self.server_slots.of(request), 0
        self.server_slots.check(request, num_new_tokens, 0 if slot is None else self.stream_cells)
        if slot is None:
            chosen = self.server_slots.choose(request)
            if chosen is None:
                return None
            slot, num_cached = chosen
        end = request.num_computed_tokens + num_cached + num_new_tokens
        if end > min(self.stream_cells, self.max_model_len):
            raise request.error(
                f"{end} tokens, but a server slot has {self.stream_cells} cells and max_model_len is {self.max_model_len}: "
                "admit only requests that admission_slots has an answer for"
            )
        if slot.request is None:
            self.server_slots.begin_window(slot, request, slot.tokens.size, num_cached)
            start_slot(self.server_slots.arrays, slot.index)
            self.server_slots.start(slot, request, num_cached)
        slot.num_computed = min(slot.num_computed, end - num_new_tokens)
        self._used[slot.index] = end
        self.server_slots.count_computed(slot, num_new_tokens)
        return Grant(num_cached_tokens=num_cached, copies=self._copies(slot.index, end - num_new_tokens))

    def note_computed(self, request: KVRequest) -> None:
        """Note what may stay in its slot when it ends."""
        self.server_slots.note_computed(request, self.stream_cells)

    def free(self, request: KVRequest) -> None:
        """Make its server slot idle. Its computed tokens stay until the slot gets another request.

        If a fork still reads its stream, that fork gets the stream instead of a copy, and nothing else stays. O(tokens).
        """
        slot = self.server_slots.end(request)
        self._used[slot.index] = 0
        copied = self._uncopied.pop(slot.index, None) is None
        stream = self._streams[slot.index]
        heir = next((index for index, (source, _) in self._uncopied.items() if source == stream), None)
        if heir is not None:
            self._streams[slot.index], self._streams[heir] = self._streams[heir], stream
            del self._uncopied[heir]
        end_slot(self.server_slots.arrays, slot.index, slot.tokens.size if copied and heir is None else 0)
        self.server_slots.forget_lost()

    def preempt(self, request: KVRequest) -> None:
        """End it as `free` does: llama.cpp has no preemption, and split streams never need one.

        So its computed tokens stay in the idle slot, where it finds them if it gets that slot again first.
        """
        self.free(request)
        request.num_computed_tokens = 0

    def live_requests(self) -> Sequence[KVRequest]:
        """Return the requests that run in a server slot."""
        return self.server_slots.running()

    def num_slots_held(self, request: KVRequest) -> int:
        """Return the cells of its stream, and those that it reads in another one."""
        slot = self.server_slots.of(request)
        return 0 if slot is None else self.stream_cells + self._uncopied.get(slot.index, (0, 0))[1]

    def slots_held(self, request: KVRequest, group: int = 0) -> Int64Array:
        """Return its stream. A fork that has not written yet has the cells that it reads first and their places in its own last."""
        slot = self.server_slots.of(request)
        if slot is None:
            return NO_SLOTS
        own = self._cells(self._streams[slot.index])
        source, size = self._uncopied.get(slot.index, (0, 0))
        return np.concatenate((self._cells(source)[:size], own[size:], own[:size]))

    def cached_slots(self) -> Int64Array:
        """Return the cells of what idle slots remember."""
        idle = (self._cells(self._streams[slot.index])[: slot.tokens.size] for slot in self.server_slots.idle())
        return np.concatenate([NO_SLOTS, *idle])

    @property
    def num_cached_slots(self) -> int:
        """How many `cached_slots` there are."""
        return sum(slot.tokens.size for slot in self.server_slots.idle())

    @property
    def free_slots(self) -> int:
        """Cells and state of the idle server slots."""
        return self.usable_slots - len(self.server_slots.running()) * (self.stream_cells + self.state_slots)

    def check_integrity(self) -> None:
        """Raise IntegrityError unless streams and server slots fit together."""
        self.server_slots.check_integrity()
        slots = self.server_slots.slots
        running = {slot.index for slot in slots if slot.request is not None}
        read = {self._streams[index] for index in running - self._uncopied.keys()}
        if (
            sorted(self._streams) != list(range(len(slots)))
            or not self._uncopied.keys() <= running
            or any(source not in read or not 0 < size <= self._used[i] for i, (source, size) in self._uncopied.items())
            or any(not max(slot.num_computed, slot.tokens.size) <= self.stream_cells for slot in slots)
            or any(self._used[slot.index] for slot in slots if slot.index not in running)
        ):
            raise IntegrityError(f"streams {self._streams}, used {self._used}, forks that read {self._uncopied}, slots {slots}")

    def _copies(self, index: int, first: int) -> Int64Array:
        """Return the copies due before server slot `index` writes its tokens from `first` on, and note them as done."""
        stream, due = self._streams[index], []
        for reader, (source, size) in list(self._uncopied.items()):
            if reader == index or (source == stream and size > first):
                due.append(np.stack((self._cells(source)[:size], self._cells(self._streams[reader])[:size]), axis=1))
                del self._uncopied[reader]
        return np.concatenate(due) if due else NO_COPIES

    def _index(self, request: KVRequest) -> int:
        return self.server_slots.running_slot(request).index

    def _cells(self, stream: int) -> Int64Array:
        return np.arange(stream * self.stream_cells, (stream + 1) * self.stream_cells)


@ALLOCATORS.register("llama-cpp-split")
class LlamaCppSplit(SplitStreams):
    """max_num_seqs streams of equal length. Requests can be forked, for several completions of one prompt."""

    def __init__(self, settings: KVPoolSettings) -> None:
        cells = settings.num_slots // settings.max_num_seqs - settings.state_slots
        num_server_slots = settings.max_num_seqs if cells > 0 else 0
        super().__init__("llama-cpp-split", settings, num_server_slots=num_server_slots, stream_cells=max(cells, 0))

    def fork(self, parent: KVRequest, child: KVRequest) -> None:
        """Let `child` run in the first idle slot.

        It reads the computed tokens of `parent` in their place until it writes: then they are copied into its own stream.

        Raises:
            ConfigError: Also if no server slot is idle.
        """
        slot, target = self.server_slots.slots_of_fork(parent, child)
        self.server_slots.begin_window(target, child, 0, 0)
        start_slot(self.server_slots.arrays, target.index)
        self.server_slots.start(target, child, min(slot.num_computed, parent.num_computed_tokens))
        source, size = self._uncopied.get(slot.index, (self._streams[slot.index], self.stream_cells))
        self._used[target.index] = min(size, parent.num_computed_tokens)
        if self._used[target.index]:
            self._uncopied[target.index] = source, self._used[target.index]
