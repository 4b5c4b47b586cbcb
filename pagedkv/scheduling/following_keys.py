"""Requests whose block keys come as their tokens do: a running model knows what it generates no sooner."""

from collections.abc import Iterable

import numpy as np

from pagedkv.arrays import Int64Array
from pagedkv.block_hash import BlockKeys
from pagedkv.errors import ConfigError
from pagedkv.scheduling.content import keyed_segments
from pagedkv.scheduling.requests import RequestTable


class FollowingKeys:
    """Which requests these are; their segments, one per block, have room for all blocks that they will ever fill."""

    def __init__(self, requests: RequestTable, block_size: int) -> None:
        self._requests, self._block_size = requests, block_size
        self._followed = set[int]()

    def __contains__(self, request: int) -> bool:
        """Return whether keys of `request` are still to come."""
        return request in self._followed

    def __len__(self) -> int:
        """Return how many they are."""
        return len(self._followed)

    def begin(self, request: int) -> None:
        """Expect keys of `request`, which has room for them."""
        self._followed.add(request)

    def end(self, requests: Iterable[int]) -> None:
        """Expect none any more of these, of whom some may have had all from the beginning."""
        self._followed.difference_update(requests)

    def room(self, request: int) -> int:
        """Return how many segments `request` needs room for: the blocks that it will ever fill, 0 if no keys follow."""
        if request not in self._followed:
            return 0
        known = self._requests.arrays[request]
        return int(known["prompt_tokens"] + known["output_tokens"] - 1) // self._block_size

    def add(self, request: int, keys: BlockKeys) -> None:
        """Take the keys of the next full blocks of `request`: see `Scheduler.add_keys`."""
        if request not in self._followed:
            raise ConfigError(f"keys for request {request}: needs one that was added with keys_follow, and is not done")
        known, first = (int(self._requests.arrays[name][request]) for name in ("num_known_tokens", "num_segments"))
        if (first + len(keys)) * self._block_size > known:
            raise ConfigError(f"keys of {first} + {len(keys)} blocks for a request of {known} known tokens: needs full blocks")
        segments = keyed_segments(keys, self._block_size)
        segments["end_token"] += first * self._block_size
        self._requests.add_segments(request, segments)

    def replace(self, request: int, keys: BlockKeys) -> None:
        """Let `request` have these keys and no others: its text is another from now on."""
        self._requests.arrays["num_segments"][request] = 0
        self._requests.add_segments(request, keyed_segments(keys, self._block_size))

    def expect_of_fork(self, parent: int, keys: BlockKeys | None) -> None:
        """Refuse `keys` that a fork of `parent` cannot begin with.

        Raises:
            ConfigError: If they are missing, or too many, or there is no use for them.
        """
        full = int(self._requests.arrays["num_known_tokens"][parent]) // self._block_size
        if (keys is not None) != (parent in self._followed) or (keys is not None and len(keys) > full):
            given = "no keys" if keys is None else f"{len(keys)} keys"
            raise ConfigError(f"{given} for a fork of request {parent}: needs them if its keys follow, up to {full}, and else none")

    def renumber(self, present: Int64Array) -> None:
        """Let who is present[i] be request i: see `Roster.keep`."""
        self._followed = set(np.searchsorted(present, sorted(self._followed)).tolist())
