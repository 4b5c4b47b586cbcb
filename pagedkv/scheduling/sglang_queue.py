"""SGLang's queue policies by name, and a sorted queue of requests that are objects: `pagedkv.scheduling.sglang_order`."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np

from pagedkv.arrays import Int64Array
from pagedkv.errors import ConfigError
from pagedkv.radix_tree import RadixTree
from pagedkv.scheduling.sglang_order import QueueArrays, clear_twins, look_up, order_queue
from pagedkv.scheduling.sglang_request import SGLangRequest, records_of

REFRESHED_PROMPTS, REFRESH_INTERVAL = 128, 32
"""Under lru, so many waiting prompts count as used, every so many prefill passes."""

NO_LIMIT = 1 << 60

Permutation: TypeAlias = Callable[[int], Sequence[int] | Int64Array]
"""From n to an order of range(n): where chance comes from."""


class Policy(NamedTuple):
    """When a policy holds."""

    matches: bool = False
    """It looks every request up first. Without prefix caching such a policy is fcfs."""
    longest_queue: int = NO_LIMIT
    """In a longer queue it is fcfs."""


QUEUE_POLICIES: dict[str, Policy] = {
    "fcfs": Policy(),
    "lof": Policy(),
    "random": Policy(),
    "routing-key": Policy(),
    "lpm": Policy(matches=True, longest_queue=128),
    "shortest-prefill-first": Policy(matches=True),
    "hrrn": Policy(matches=True, longest_queue=128),
    "dfs-weight": Policy(matches=True),
}
"""By the name that a user writes after --schedule-policy. What each does: `pagedkv.scheduling.sglang_order`."""


class QueueOrder(NamedTuple):
    """A sorted queue."""

    policy: str
    """The one that was really used."""
    requests: list[SGLangRequest]
    late: frozenset[SGLangRequest]
    """Those that begin like an earlier one."""


def sort_queue(
    policy: str,
    queue: Sequence[SGLangRequest],
    tree: RadixTree | None,
    *,
    running: Sequence[SGLangRequest] = (),
    num_prefilled_tokens: int = 0,
    permutation: Permutation | None = None,
) -> QueueOrder:
    """Return the order in which to look at `queue`; `tree` is None without prefix caching.

    O(n log n) for n requests; policies that match add O(tokens compared), and their lookups are uses of what they find.

    Raises:
        ConfigError: If the policy is random and there is no `permutation`.
    """
    asked, number = QUEUE_POLICIES[policy], len(queue)
    if (asked.matches and tree is None) or number > asked.longest_queue:
        policy, asked = "fcfs", QUEUE_POLICIES["fcfs"]
    common, own = records_of([*queue, *running])
    tree = tree or RadixTree()
    arrays, late = QueueArrays.empty(number + 1, num_keys=number + len(running) + 1), frozenset[SGLangRequest]()
    if policy == "random":
        if permutation is None:
            raise no_chance()
        arrays.shuffle[:number] = permutation(number)
    if asked.matches:
        num_twins = clear_twins(arrays, number)
        for i, request in enumerate(queue):
            own["namespace"][i] = tree.namespace_number(request.namespace)
            tokens = np.ascontiguousarray(request.known_tokens)
            look_up(arrays, num_twins, tree.arrays, tree.rules, common, own, i, tokens)
            request.num_matched_tokens = int(own["num_matched_tokens"][i])
        late = frozenset(request for request, is_late in zip(queue, own["late"].tolist(), strict=False) if is_late)
    order_queue(
        arrays,
        tuple(QUEUE_POLICIES).index(policy),
        tree.arrays,
        common,
        own,
        np.arange(max(number, 1)),
        0,
        number,
        np.arange(number, number + len(running)),
        len(running),
        num_prefilled_tokens,
    )
    return QueueOrder(policy, [queue[place] for place in arrays.sort.order[:number].tolist()], late)


def no_chance() -> ConfigError:
    """Return what is wrong with policy random that has no source of chance."""
    return ConfigError("schedule-policy random needs a source of chance: pass permutation, e.g. that of a numpy Generator")
