"""What differs between SGLang's two radix trees: when a node counts as used, and how duplicate slots come back.

Each is a kind: functions for compiled code, whose path is always `tree.path[:num_path]`, the nodes that a walk met from the top,
the last of them perhaps only in part.
"""

from typing import Any, NamedTuple, TypeAlias

from pagedkv.jit import by_kind, lean_jit
from pagedkv.radix_arrays import RadixArrays, tick

CHILD_IS_NEWER = 1e-5
"""How much later than its parent a matched node counts as used, in the unified tree. Far less than one reading of the clock."""


@by_kind
def met_by_match(stamps: Any, tree: RadixArrays, num_path: int) -> Any:
    """Stamp what a lookup met, before the last node is split."""


@by_kind
def met_by_insert(stamps: Any, tree: RadixArrays, num_path: int) -> Any:
    """Stamp what an insertion met, before the last node is split."""


@by_kind
def was_split(stamps: Any, tree: RadixArrays, upper: int, lower: int) -> Any:
    """Stamp the two parts of a node; `upper` is new and a copy of what the node was."""


@by_kind
def matched(stamps: Any, tree: RadixArrays, num_path: int) -> Any:
    """Stamp what a lookup found, all of it whole."""


class RadixCacheRules(NamedTuple):
    """RadixCache: one reading stamps all that a walk meets, and a new upper part is newer than that."""

    node_by_node: bool = False
    """Whether an insertion gives duplicate slots back node by node; else they are one piece."""


class UnifiedRules(NamedTuple):
    """UnifiedRadixCache, the server's tree: the deepest is the newest."""

    node_by_node: bool = True
    """See `RadixCacheRules`."""


TreeRules: TypeAlias = RadixCacheRules | UnifiedRules


@met_by_match.register(RadixCacheRules)
@lean_jit
def _met_by_match(stamps: RadixCacheRules, tree: RadixArrays, num_path: int) -> None:
    """Stamp all with one time, also the part of a run that did not match."""
    now = tick(tree)
    for i in range(num_path):
        tree.nodes["last_access"][tree.path[i]] = now


@met_by_insert.register(RadixCacheRules)
@lean_jit
def _met_by_insert(stamps: RadixCacheRules, tree: RadixArrays, num_path: int) -> None:
    """As for a lookup."""
    met_by_match(stamps, tree, num_path)


@was_split.register(RadixCacheRules)
@lean_jit
def _was_split(stamps: RadixCacheRules, tree: RadixArrays, upper: int, lower: int) -> None:
    """The upper part is created now."""
    now = tick(tree)
    tree.nodes["last_access"][upper] = tree.nodes["created"][upper] = now


@matched.register(RadixCacheRules)
@lean_jit
def _matched(stamps: RadixCacheRules, tree: RadixArrays, num_path: int) -> None:
    """Nothing is left to do."""


@met_by_match.register(UnifiedRules)
@lean_jit
def _met_by_unified_match(stamps: UnifiedRules, tree: RadixArrays, num_path: int) -> None:
    """Nothing yet: a lookup stamps at its end."""


@met_by_insert.register(UnifiedRules)
@lean_jit
def _met_by_unified_insert(stamps: UnifiedRules, tree: RadixArrays, num_path: int) -> None:
    """Stamp from the top down."""
    for i in range(num_path):
        tree.nodes["last_access"][tree.path[i]] = tick(tree)


@was_split.register(UnifiedRules)
@lean_jit
def _was_split_in_unified(stamps: UnifiedRules, tree: RadixArrays, upper: int, lower: int) -> None:
    """Both parts are used now, the lower one later; both keep their time of creation."""
    tree.nodes["last_access"][upper] = tick(tree)
    tree.nodes["last_access"][lower] = tick(tree)


@matched.register(UnifiedRules)
@lean_jit
def _matched_in_unified(stamps: UnifiedRules, tree: RadixArrays, num_path: int) -> None:
    """Stamp from the bottom up, each a little older than its child."""
    now = tick(tree)
    for i in range(num_path - 1, -1, -1):
        tree.nodes["last_access"][tree.path[i]] = now
        now -= CHILD_IS_NEWER
