"""Everybody whom SGLang's scheduler knows, and who waits."""

from collections.abc import Sequence

import numpy as np

from pagedkv.arrays import Int64Array
from pagedkv.radix_tree import RadixTree
from pagedkv.scheduling.content import Segments
from pagedkv.scheduling.requests import NO_ROW, RequestArrays, RequestTable
from pagedkv.scheduling.sglang_queue import Permutation, sort_queue
from pagedkv.scheduling.sglang_request import SGLangRequest
from pagedkv.scheduling.stream_tokens import token_ids


class SGLangRequests:
    """A table of all requests, what is needed of those who are not done, and the queue."""

    def __init__(self) -> None:
        self.table = RequestTable()
        self.waiting: list[SGLangRequest] = []
        """As the last sort left it, newcomers behind."""
        self.num_prefilled_tokens = 0
        """Prompt tokens that the engine has computed so far."""
        self._live: dict[int, SGLangRequest] = {}
        self._num_joined = 0

    @property
    def arrays(self) -> RequestArrays:
        """Their records."""
        return self.table.arrays

    def add(self, request: SGLangRequest, *, output_tokens: int, segments: Segments) -> None:
        """Put a new `request`, whose index is the next one, into the table and the queue; give it tokens."""
        prompt = request.num_prompt_tokens
        request.tokens = token_ids(segments, request.index, prompt + output_tokens)
        self.table.add(prompt_tokens=prompt, output_tokens=output_tokens, admission_slots=0, priority=request.priority)
        self._live[request.index] = request
        self._join(request)

    def sort(
        self, policy: str, tree: RadixTree | None, *, running: Sequence[SGLangRequest], permutation: Permutation | None
    ) -> None:
        """Put the queue in the order of `policy`: see `sort_queue`."""
        prefilled = self.num_prefilled_tokens
        order = sort_queue(policy, self.waiting, tree, running=running, num_prefilled_tokens=prefilled, permutation=permutation)
        self.waiting = order.requests

    def take_up(self, requests: set[SGLangRequest]) -> None:
        """Take `requests` out of the queue."""
        self.waiting = [request for request in self.waiting if request not in requests]

    def put_back(self, request: SGLangRequest) -> None:
        """Let a retracted `request`, which holds nothing any more, wait behind the others."""
        self.arrays["num_computed_tokens"][request.index] = 0
        self.arrays["num_preemptions"][request.index] += 1
        self.arrays["row"][request.index] = NO_ROW
        self._join(request)

    def count_admission(self, request: SGLangRequest, row: int, num_cached: int) -> None:
        """Note that `request` runs in `row`, with so many tokens from the cache."""
        record, known = self.arrays[request.index], request.num_tokens
        record["row"], record["num_computed_tokens"] = row, num_cached
        if record["num_queried_tokens"] == 0:
            record["num_cached_tokens"] = num_cached
        record["num_queried_tokens"] += known
        record["num_hit_tokens"] += num_cached

    def drop_head(self) -> SGLangRequest:
        """Take the head of the queue out for good."""
        request = self.waiting.pop(0)
        del self._live[request.index]
        return request

    def forget(self, index: int) -> SGLangRequest:
        """Note that a request is done, and return it."""
        self.arrays["row"][index] = NO_ROW
        return self._live.pop(index)

    def live(self, indices: Int64Array) -> list[SGLangRequest]:
        """Return those of `indices` that are not done, with the outputs that they have now."""
        found = []
        outputs = (self.arrays["num_known_tokens"][indices] - self.arrays["prompt_tokens"][indices]).tolist()
        for index, num_output in zip(indices.tolist(), outputs, strict=True):
            if (request := self._live.get(index)) is not None:
                request.num_output_tokens = num_output
                found.append(request)
        return found

    def queue(self) -> Int64Array:
        """Return the indices of those who wait, the head first."""
        return np.array([request.index for request in self.waiting], np.int64)

    def _join(self, request: SGLangRequest) -> None:
        request.arrival, request.prefilled_before = self._num_joined, self.num_prefilled_tokens
        self._num_joined += 1
        self.waiting.append(request)
