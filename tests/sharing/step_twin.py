"""An allocator that is asked request by request, beside a scheduler whose steps are compiled: both must do the same."""

from typing import Any

import numpy as np

from pagedkv.allocation import Allocator, Grant
from pagedkv.block_hash import BlockKeys
from pagedkv.kv_request import KVRequest
from pagedkv.scheduling.content import stream_of
from pagedkv.scheduling.scheduler import Scheduler


class StepTwin:
    """Takes of `allocator` what `scheduler` was seen to take, in the same order."""

    def __init__(self, allocator: Allocator, scheduler: Scheduler, *, hash_block_size: int, max_num_batched_tokens: int) -> None:
        self.allocator, self.scheduler = allocator, scheduler
        self.hash_block_size, self.max_num_batched_tokens = hash_block_size, max_num_batched_tokens
        self.requests: dict[int, KVRequest] = {}
        self.grown: dict[int, int] = {}

    def keys(self, index: int, num_tokens: int) -> BlockKeys:
        """The keys that compiled code makes of streams."""
        record, segments, size = self.scheduler.requests.arrays[index], self.scheduler.requests.segments, self.hash_block_size
        place, keys = int(record["first_segment"]), np.zeros((num_tokens // size, 2), np.uint64)
        end = place + int(record["num_segments"])
        for i in range(len(keys)):
            while place < end and segments["end_token"][place] < (i + 1) * size:
                place += 1
            word_a, word_b = stream_of(segments, place, end, index)
            keys[i] = np.uint64((int(word_a) + i) % 2**64), word_b
        return keys

    def decide(self, step: Any, preempted: list[int]) -> int:
        """Take what the step has taken; return the tokens that were found."""
        victims, found = list(preempted), 0
        for entry in range(step.num_running_before):
            index, tokens = int(step.batch["request"][entry]), int(step.batch["num_scheduled_tokens"][entry])
            while (grant := self.ask(index, tokens, something_runs=entry > 0)) is None:
                self.give_up(victims.pop(0))
            self.note(step.batch[entry], grant)
        if victims:  # the last of them could not go on itself, even without the others
            asker = self.known(victims[-1])
            tokens = min(asker.num_tokens - asker.num_computed_tokens, self.budget(step))
            for index in victims:
                assert self.ask(victims[-1], tokens, something_runs=True) is None
                self.give_up(index)
        for entry in range(step.num_running_before, step.num_entries):
            index, tokens = int(step.batch["request"][entry]), int(step.batch["num_scheduled_tokens"][entry])
            found += self.allocator.get_computed_tokens(self.known(index))
            grant = self.ask(index, tokens, something_runs=entry > 0)
            assert grant is not None
            self.note(step.batch[entry], grant)
        return found

    def ask(self, index: int, tokens: int, *, something_runs: bool) -> Grant | None:
        return self.allocator.allocate_slots(self.known(index), tokens, has_scheduled_reqs=something_runs)

    def note(self, entry: Any, grant: Grant) -> None:
        request = self.requests[int(entry["request"])]
        grown = request.num_computed_tokens + grant.num_cached_tokens + int(entry["num_scheduled_tokens"])
        assert grown == entry["num_slots_needed"]
        self.grown[int(entry["request"])] = grown

    def budget(self, step: Any) -> int:
        """Tokens that the step has left."""
        return self.max_num_batched_tokens - int(step.batch["num_scheduled_tokens"][: step.num_entries].sum())

    def refuses(self, index: int, step: Any, *, something_runs: bool) -> bool:
        """Whether there is no room for the head of the queue either."""
        request = self.known(index)
        tokens = min(request.num_tokens - self.allocator.get_computed_tokens(request), self.budget(step))
        refused = self.allocator.allocate_slots(request, tokens, has_scheduled_reqs=something_runs) is None
        del self.requests[index]
        return refused

    def known(self, index: int) -> KVRequest:
        num_tokens = int(self.scheduler.requests.arrays["num_known_tokens"][index])
        request = self.requests.setdefault(index, KVRequest(request_id=index, num_tokens=num_tokens))
        request.num_tokens, request.block_keys = num_tokens, self.keys(index, num_tokens)
        return request

    def give_up(self, index: int) -> None:
        if (request := self.requests.pop(index, None)) is not None:
            self.allocator.free(request)

    def complete(self, finished: list[int]) -> None:
        for index, computed in self.grown.items():
            self.requests[index].num_computed_tokens = computed
            self.allocator.note_computed(self.requests[index])
        self.grown.clear()
        for index in finished:
            self.give_up(index)
