"""What differs between SGLang's two radix trees: when a node counts as used, and how duplicate slots come back."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Protocol, TypeAlias

from pagedkv.radix_node import TreeNode

Clock: TypeAlias = Callable[[], float]
"""Returns a larger number each time."""

CHILD_IS_NEWER = 1e-5
"""How much later than its parent a matched node counts as used, in the unified tree. Far less than one reading of the clock."""


class TreeRules(Protocol):
    """`path` is always the nodes that a walk met from the top, the last of them perhaps only in part."""

    def met_by_match(self, path: Sequence[TreeNode], clock: Clock) -> None:
        """Stamp what a lookup met, before the last node is split."""

    def met_by_insert(self, path: Sequence[TreeNode], clock: Clock) -> None:
        """Stamp what an insertion met, before the last node is split."""

    def was_split(self, upper: TreeNode, lower: TreeNode, clock: Clock) -> None:
        """Stamp the two parts of a node; `upper` is new and a copy of what the node was."""

    def matched(self, path: Sequence[TreeNode], clock: Clock) -> None:
        """Stamp what a lookup found, all of it whole."""

    def duplicate_spans(self, held: int, ends: Sequence[int]) -> list[tuple[int, int]]:
        """Return the pieces [start, end) of a sequence whose slots its caller gets back, in order.

        Args:
            held: Leading tokens that use the tree's slots already.
            ends: Where the nodes end that were present, each within the next.
        """


class RadixCacheRules:
    """RadixCache: one reading stamps all that a walk meets, and a new upper part is newer than that. Duplicates are one piece."""

    def met_by_match(self, path: Sequence[TreeNode], clock: Clock) -> None:
        """Stamp all with one time, also the part of a run that did not match."""
        now = clock()
        for node in path:
            node.last_access = now

    def met_by_insert(self, path: Sequence[TreeNode], clock: Clock) -> None:
        """As for a lookup."""
        self.met_by_match(path, clock)

    def was_split(self, upper: TreeNode, lower: TreeNode, clock: Clock) -> None:
        """The upper part is created now."""
        upper.last_access = upper.created = clock()

    def matched(self, path: Sequence[TreeNode], clock: Clock) -> None:
        """Nothing is left to do."""

    def duplicate_spans(self, held: int, ends: Sequence[int]) -> list[tuple[int, int]]:
        """All in one."""
        return [(held, ends[-1])] if ends and held < ends[-1] else []


class UnifiedRules:
    """UnifiedRadixCache, the server's tree: the deepest is the newest. Duplicates come node by node."""

    def met_by_match(self, path: Sequence[TreeNode], clock: Clock) -> None:
        """Nothing yet: a lookup stamps at its end."""

    def met_by_insert(self, path: Sequence[TreeNode], clock: Clock) -> None:
        """Stamp from the top down."""
        for node in path:
            node.last_access = clock()

    def was_split(self, upper: TreeNode, lower: TreeNode, clock: Clock) -> None:
        """Both parts are used now, the lower one later; both keep their time of creation."""
        upper.last_access = clock()
        lower.last_access = clock()

    def matched(self, path: Sequence[TreeNode], clock: Clock) -> None:
        """Stamp from the bottom up, each a little older than its child."""
        now = clock()
        for node in reversed(path):
            node.last_access = now
            now -= CHILD_IS_NEWER

    def duplicate_spans(self, held: int, ends: Sequence[int]) -> list[tuple[int, int]]:
        """One piece per node."""
        return [(max(held, start), end) for start, end in pairwise((0, *ends)) if held < end]
