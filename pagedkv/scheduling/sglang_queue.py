"""In which order SGLang looks at its waiting requests: a policy is one function, and its line in the registry.

Source: behaviour of SGLang 0.5.23 (tests/conformance/test_sglang_schedule.py); routing-key and random as read in its source.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

from pagedkv.arrays import Int32Array, Int64Array
from pagedkv.errors import ConfigError
from pagedkv.radix_node import TreeNode
from pagedkv.radix_rules import RadixCacheRules
from pagedkv.radix_tree import RadixTree
from pagedkv.scheduling.sglang_request import SGLangRequest

SHORT_MATCH = 32
"""A request that finds at most this many tokens in the cache is compared with those that wait before it."""
TWIN_MATCH = 32
"""If it begins like one of them for this many tokens, it comes late: one of the two is to fill the cache first."""

REFRESHED_PROMPTS, REFRESH_INTERVAL = 128, 32
"""Under lru, so many waiting prompts count as used, every so many prefill passes."""

Permutation: TypeAlias = Callable[[int], Sequence[int] | Int64Array]
"""From n to an order of range(n): where chance comes from."""


class Scene(NamedTuple):
    """What a policy may look at."""

    queue: Sequence[SGLangRequest]
    """As the last sort left it, newcomers behind."""
    late: frozenset[SGLangRequest]
    """Those that begin like an earlier one."""
    nodes: Sequence[TreeNode]
    """By place in the queue: where its match ends."""
    root: TreeNode
    """Of the cache's tree."""
    running: Sequence[SGLangRequest]
    num_prefilled_tokens: int
    """Prompt tokens that the engine has computed so far."""
    permutation: Permutation | None


class Policy(NamedTuple):
    """A policy and when it holds."""

    order: Callable[[Scene], list[SGLangRequest]]
    matches: bool
    """It looks every request up first. Without prefix caching such a policy is fcfs."""
    longest_queue: int | None
    """In a longer queue it is fcfs."""


QUEUE_POLICIES: dict[str, Policy] = {}
"""By the name that a user writes after --schedule-policy."""


def _policy(
    name: str, *, matches: bool = False, longest_queue: int | None = None
) -> Callable[[Callable[[Scene], list[SGLangRequest]]], Callable[[Scene], list[SGLangRequest]]]:
    def register(order: Callable[[Scene], list[SGLangRequest]]) -> Callable[[Scene], list[SGLangRequest]]:
        QUEUE_POLICIES[name] = Policy(order, matches, longest_queue)
        return order

    return register


@_policy("fcfs")
def first_come_first_served(scene: Scene) -> list[SGLangRequest]:
    """As they came."""
    return list(scene.queue)


@_policy("lof")
def longest_output_first(scene: Scene) -> list[SGLangRequest]:
    """By the output that they may make, the longest first."""
    return sorted(scene.queue, key=lambda r: -r.max_new_tokens)


@_policy("random")
def random_order(scene: Scene) -> list[SGLangRequest]:
    """Any order."""
    if scene.permutation is None:
        raise ConfigError("schedule-policy random needs a source of chance: pass permutation, e.g. that of a numpy Generator")
    return [scene.queue[int(i)] for i in scene.permutation(len(scene.queue))]


@_policy("routing-key")
def most_routed_first(scene: Scene) -> list[SGLangRequest]:
    """By how many running requests have the same routing key, then by key; those whose key does not run after them."""
    running = Counter(r.routing_key for r in scene.running if r.routing_key)
    return sorted(scene.queue, key=lambda r: (-running[r.routing_key], r.routing_key)) if running else list(scene.queue)


@_policy("lpm", matches=True, longest_queue=128)
def longest_prefix_first(scene: Scene) -> list[SGLangRequest]:
    """By what the cache has of them, the most first."""
    return sorted(scene.queue, key=lambda r: (r in scene.late, 0 if r in scene.late else -r.num_matched_tokens))


@_policy("shortest-prefill-first", matches=True)
def shortest_prefill_first(scene: Scene) -> list[SGLangRequest]:
    """By what is left to compute, the least first."""
    return sorted(scene.queue, key=lambda r: (r in scene.late, r.num_uncached_tokens, r.arrival))


@_policy("hrrn", matches=True, longest_queue=128)
def highest_response_ratio_first(scene: Scene) -> list[SGLangRequest]:
    """By how long they wait, in tokens prefilled meanwhile, for each prompt token that they need computed."""

    def rank(request: SGLangRequest) -> tuple[float, float, str]:
        uncached = request.num_prompt_tokens - request.num_matched_tokens
        if request in scene.late:
            return (2, 0.0, request.name)
        if uncached <= 0:
            return (0, 0.0, request.name)
        return (1, -max(0, scene.num_prefilled_tokens - request.prefilled_before) / uncached, request.name)

    return sorted(scene.queue, key=rank)


@_policy("dfs-weight", matches=True)
def depth_first(scene: Scene) -> list[SGLangRequest]:
    """Along the tree, so that neighbours share: the child with the most requests below first, a node's own after its children's."""
    at: dict[TreeNode, list[SGLangRequest]] = {}
    for request, node in zip(scene.queue, scene.nodes, strict=True):
        at.setdefault(node, []).append(request)
    weight = Counter[TreeNode]()
    for node, requests in at.items():
        for above in node.path():
            weight[above] += len(requests)
    order, stack = list[SGLangRequest](), [(scene.root, False)]
    while stack:
        node, done = stack.pop()
        if done:
            order += at.get(node, [])
            continue
        stack.append((node, True))
        children = sorted((child for child in node.children if weight[child]), key=lambda child: -weight[child])
        stack += [(child, False) for child in reversed(children)]
    return order


class QueueOrder(NamedTuple):
    """A sorted queue."""

    policy: str
    """The one that was really used."""
    requests: list[SGLangRequest]
    late: frozenset[SGLangRequest]


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
    asked = QUEUE_POLICIES[policy]
    if (asked.matches and tree is None) or (asked.longest_queue is not None and len(queue) > asked.longest_queue):
        policy, asked = "fcfs", QUEUE_POLICIES["fcfs"]
    root = RadixTree().root if tree is None else tree.root
    nodes, late = _match_all(queue, tree) if asked.matches and tree is not None else ([], frozenset[SGLangRequest]())
    return QueueOrder(policy, asked.order(Scene(queue, late, nodes, root, running, num_prefilled_tokens, permutation)), late)


def refresh_prompts(queue: Sequence[SGLangRequest], tree: RadixTree) -> None:
    """Let what the first of those who wait will find count as used now, so that it is there when it is their turn."""
    for request in queue[:REFRESHED_PROMPTS]:
        tree.match_prefix(request.tokens[: request.num_prompt_tokens], extra_key=request.namespace)


def _match_all(queue: Sequence[SGLangRequest], tree: RadixTree) -> tuple[list[TreeNode], frozenset[SGLangRequest]]:
    """Look every request up; return where their matches end, and which of them have an earlier twin in the queue."""
    nodes, late = list[TreeNode](), set[SGLangRequest]()
    twins = RadixTree(rules=RadixCacheRules())
    num_inserted = 0
    for request in queue:
        tokens = request.known_tokens
        hit = tree.match_prefix(tokens, extra_key=request.namespace)
        nodes.append(hit.node)
        request.num_matched_tokens = min(hit.slots.size, tokens.size - 1)
        if hit.slots.size > SHORT_MATCH:
            continue
        found = twins.match_prefix(tokens, extra_key=request.namespace).slots
        if found.size >= TWIN_MATCH:
            late.add(request)
        else:  # the scratch tree needs slots of its own for what it does not know yet
            twins.insert(tokens, _slots(found, tokens.size, num_inserted), extra_key=request.namespace, held=found.size)
            num_inserted += tokens.size - found.size
    # A later match may have split a node that an earlier one ended in: then that still is the lower part, and right to lock.
    return nodes, frozenset(late)


def _slots(found: Int32Array, num_tokens: int, first: int) -> list[int]:
    return [*found.tolist(), *range(first, first + num_tokens - found.size)]
