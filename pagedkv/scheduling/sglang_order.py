"""In which order SGLang looks at its waiting requests, compiled: a policy is one function, and its line in `order_queue`.

Source: behaviour of SGLang 0.5.23 (tests/conformance/test_sglang_schedule.py); routing-key and random as read in its source.
"""

from typing import NamedTuple

import numpy as np

from pagedkv.arrays import Int32Array, Int64Array
from pagedkv.jit import lean_jit
from pagedkv.radix_arrays import NO_NODE, ROOT, RadixArrays, RadixRules
from pagedkv.radix_walks import match_prefix
from pagedkv.scheduling.requests import RequestArrays
from pagedkv.scheduling.sglang_pass import num_uncached
from pagedkv.scheduling.sglang_request import SGLangRecords
from pagedkv.scheduling.stable_order import SortArrays, sort_places
from pagedkv.splitmix import mixed_one

SHORT_MATCH = 32
"""A request that finds at most this many tokens in the cache is compared with those that wait before it."""
TWIN_MATCH = 32
"""If it begins like one of them for this many tokens, it comes late: one of the two is to fill the cache first."""

FCFS, LOF, RANDOM, ROUTING_KEY, LPM, SHORTEST, HRRN, DEPTH_FIRST = range(8)
"""The policies: the places of `pagedkv.scheduling.sglang_queue.QUEUE_POLICIES`."""


class FcfsQueue(NamedTuple):
    """A queue that is never sorted."""

    num_policies: int = 1
    """It has one."""


class QueueArrays(NamedTuple):
    """What a sort of the queue works on. A place is one in the queue as the last sort left it, newcomers behind."""

    sort: SortArrays
    twins: Int64Array
    """Beginnings of requests that are compared with others, hashed, 0 for none; a power of two long, twice the queue or more."""
    keyed: Int64Array
    """By routing key: how many running requests have it."""
    shuffle: Int64Array
    """For policy random: the order, from outside."""

    @classmethod
    def empty(cls, capacity: int, *, num_keys: int) -> "QueueArrays":
        """Return room for so many who wait, and so many routing keys."""
        twins = 16
        while twins < 2 * capacity:
            twins *= 2
        room = (np.zeros(twins, np.int64), np.zeros(num_keys, np.int64), np.zeros(capacity, np.int64))
        return cls(SortArrays.empty(capacity), *room)


@lean_jit
def clear_twins(queue: QueueArrays, number: int) -> int:
    """Begin a comparison of `number` requests; return how much of `twins` it uses, a power of two."""
    size = 16
    while size < 2 * number:
        size *= 2
    queue.twins[:size] = 0
    return size


@lean_jit
def _has_twin(queue: QueueArrays, num_twins: int, namespace: int, tokens: Int32Array) -> bool:
    """Return whether one that was asked about before begins with the same tokens; if not, remember this one."""
    word = np.uint64(namespace)
    for i in range(TWIN_MATCH):
        word = mixed_one(word ^ np.uint64(tokens[i]))
    beginning = np.int64(word | np.uint64(1))
    place = (beginning >> 1) & (num_twins - 1)
    while queue.twins[place] != 0:
        if queue.twins[place] == beginning:
            return True
        place = (place + 1) & (num_twins - 1)
    queue.twins[place] = beginning
    return False


@lean_jit
def look_up(
    queue: QueueArrays,
    num_twins: int,
    tree: RadixArrays,
    rules: RadixRules,
    requests: RequestArrays,
    records: SGLangRecords,
    request: int,
    tokens: Int32Array,
) -> None:
    """Note where the match of a waiting `request`, of these `tokens`, ends, and whether one before it begins alike.

    It is a use of what it finds. A later match may split the node: then that still is the lower part, and right to lock.
    """
    known, size = requests["num_known_tokens"][request], rules.block_size
    node = match_prefix(tree, rules, tokens, known // size * size, records["namespace"][request])
    depth = tree.nodes["depth"][node]
    records["node"][request], records["num_matched_tokens"][request] = node, min(depth, known - 1)
    records["late"][request] = 0
    if depth <= SHORT_MATCH and known >= TWIN_MATCH:
        records["late"][request] = _has_twin(queue, num_twins, records["namespace"][request], tokens)


@lean_jit
def _longest_prefix_first(sort: SortArrays, records: SGLangRecords, place: int, request: int) -> None:
    """By what the cache has of them, the most first."""
    if not records["late"][request]:
        sort.keys[1, place] = -records["num_matched_tokens"][request]


@lean_jit
def _shortest_prefill_first(sort: SortArrays, requests: RequestArrays, records: SGLangRecords, place: int, request: int) -> None:
    """By what is left to compute, the least first."""
    sort.keys[1, place], sort.keys[2, place] = num_uncached(requests, records, request), records["arrival"][request]


@lean_jit
def _highest_response_ratio_first(
    sort: SortArrays, requests: RequestArrays, records: SGLangRecords, place: int, request: int, num_prefilled_tokens: int
) -> None:
    """By how long they wait, in tokens prefilled meanwhile, for each prompt token that they need computed."""
    uncached = requests["prompt_tokens"][request] - records["num_matched_tokens"][request]
    sort.keys[2, place] = records["tie"][request]
    if records["late"][request]:
        sort.keys[0, place] = 2.0
    elif uncached > 0:
        waited = max(0, num_prefilled_tokens - records["prefilled_before"][request])
        sort.keys[0, place], sort.keys[1, place] = 1.0, -(waited / uncached)
    else:
        sort.keys[0, place] = 0.0


@lean_jit
def _count_keys(queue: QueueArrays, records: SGLangRecords, running: Int64Array, num_running: int) -> bool:
    """Count who of `running` has which routing key; return whether anybody has one."""
    queue.keyed[:] = 0
    found = False
    for i in range(num_running):
        key = records["routing"][running[i]]
        if key > 0:
            queue.keyed[key] += 1
            found = True
    return found


@lean_jit
def _depth_first(sort: SortArrays, tree: RadixArrays, records: SGLangRecords, waiting: Int64Array, head: int, number: int) -> None:
    """Along the tree, so that neighbours share: the child with the most requests below first, a node's own after its children's."""
    nodes, order, following = tree.nodes, sort.order, sort.scratch
    for place in range(number - 1, -1, -1):
        node = records["node"][waiting[(head + place) % waiting.size]]
        following[place], nodes["first_request"][node] = nodes["first_request"][node], place + 1
        while node != ROOT:
            nodes["weight"][node] += 1
            node = nodes["parent"][node]
    node, done = ROOT, 0
    while done < number:
        heaviest, child = NO_NODE, nodes["first_child"][node]
        while child != NO_NODE:
            if nodes["weight"][child] > 0 and (heaviest == NO_NODE or nodes["weight"][child] > nodes["weight"][heaviest]):
                heaviest = child
            child = nodes["younger"][child]
        if heaviest != NO_NODE:
            node = heaviest
            continue
        place = nodes["first_request"][node]
        while place > 0:
            order[done] = place - 1
            done += 1
            place = following[place - 1]
        nodes["first_request"][node] = nodes["weight"][node] = 0
        node = nodes["parent"][node]
    while node != ROOT:  # what is left above has nobody any more
        nodes["weight"][node] = 0
        node = nodes["parent"][node]


@lean_jit
def order_queue(
    queue: QueueArrays,
    policy: int,
    tree: RadixArrays,
    requests: RequestArrays,
    records: SGLangRecords,
    waiting: Int64Array,
    head: int,
    number: int,
    running: Int64Array,
    num_running: int,
    num_prefilled_tokens: int,
) -> None:
    """Write the places of the queue, the ring waiting[head:], in the order of `policy` into queue.sort.order.

    Under policies that match, `look_up` has been asked about each. O(n log n).
    """
    sort = queue.sort
    keyed = policy == ROUTING_KEY and _count_keys(queue, records, running, num_running)
    if policy == DEPTH_FIRST:
        _depth_first(sort, tree, records, waiting, head, number)
        return
    for place in range(number):
        request = waiting[(head + place) % waiting.size]
        sort.keys[0, place] = sort.keys[1, place] = sort.keys[2, place] = 0.0
        if policy == LOF:  # by the output that they may make, the longest first
            sort.keys[0, place] = -records["max_new_tokens"][request]
        elif policy == RANDOM:
            sort.order[place] = queue.shuffle[place]
        elif keyed:  # by how many running requests have the same routing key, then by key
            key = records["routing"][request]
            sort.keys[0, place], sort.keys[1, place] = -queue.keyed[key], key
        elif policy in (LPM, SHORTEST):
            sort.keys[0, place] = records["late"][request]
            if policy == LPM:
                _longest_prefix_first(sort, records, place, request)
            else:
                _shortest_prefill_first(sort, requests, records, place, request)
        elif policy == HRRN:
            _highest_response_ratio_first(sort, requests, records, place, request, num_prefilled_tokens)
    if policy != RANDOM:
        sort_places(sort, number)
