"""Operation by operation what SGLang 0.5.23's own radix trees did over its slot allocators: matches, splits, locks, evictions."""

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pagedkv.eviction import EVICTION_POLICIES, EvictionSettings
from pagedkv.radix_node import TreeNode
from pagedkv.radix_rules import RadixCacheRules, UnifiedRules
from pagedkv.radix_tree import RadixTree
from pagedkv.slot_allocator import SlotAllocator

Stream = dict[str, Any]
Operation = dict[str, Any]

RULES: dict[str, type[RadixCacheRules] | type[UnifiedRules]] = {"radix": RadixCacheRules, "unified": UnifiedRules}


@pytest.fixture(scope="module")
def streams(shared_data: Path) -> list[Stream]:
    with gzip.open(shared_data / "sglang_radix.jsonl.gz", "rt") as lines:
        return [json.loads(line) for line in lines]


class Replay:
    """A tree and the allocator under it, as one stream had them."""

    def __init__(self, stream: Stream) -> None:
        self.allocator = SlotAllocator(num_blocks=stream["pages"], block_size=stream["page"])
        self.tree = RadixTree(
            block_size=stream["page"],
            rules=RULES[stream["tree"]](),
            eviction=stream["policy"],
            eviction_settings=EvictionSettings(**(stream["cfg"] or {})),
        )
        self.found = self.tree.root  # where the last match or insert ended
        self.locked: dict[int, TreeNode] = {}

    def perform(self, op: Operation) -> dict[str, Any]:
        """Do what `op` says; return the results that it records."""
        match op["o"]:
            case "match":
                slots, self.found = self.tree.match_prefix(op["k"], extra_key=op["ns"])
                return {"len": slots.size, "slots": slots.tolist()}
            case "insert":
                done = self.tree.insert(
                    op["k"], op["slots"], extra_key=op["ns"], held=op["prev"], hits_beyond=op["skip"], priority=op["prio"]
                )
                self.found = done.node
                return {"len": done.num_present, "freed": self.give_back(done.duplicates)}
            case "alloc":
                taken = self.allocator.alloc(op["n"])
                return {"slots": None if taken is None else taken.tolist()}
            case "lock":
                self.locked[op["h"]] = self.found
                self.tree.inc_lock_ref(self.found)
                return {"n": self.found.depth}
            case "unlock":
                self.tree.dec_lock_ref(self.locked.pop(op["h"]))
                return {}
            case "evict":
                evicted = self.tree.evict(op["n"])
                return {"len": sum(len(slots) for slots in evicted), "freed": self.give_back(evicted)}
            case "free":
                self.give_back([np.array(op["slots"])])
                return {}
        raise AssertionError(f"unknown operation {op['o']}")

    def give_back(self, segments: list[Any]) -> list[list[int]]:
        for slots in segments:
            self.allocator.free_segment(slots)
        return [slots.tolist() for slots in segments]

    def sizes(self) -> dict[str, int]:
        tree = self.tree
        return {"e": tree.evictable_size, "p": tree.protected_size, "t": tree.total_size, "a": self.allocator.num_free_slots}

    def state(self) -> dict[str, Any]:
        nodes = [
            {
                "ns": node.namespace,
                "pre": node.depth - node.num_tokens,
                "k": tokens_to(node),
                "slots": node.slots.tolist(),
                "lock": node.lock_ref,
                "hits": node.hit_count,
                "prio": node.priority,
            }
            for node in self.tree.root.below()
        ]
        return {"nodes": sorted(nodes, key=lambda n: (n["ns"] or "", n["k"])), "free": self.allocator.free_list().tolist()}


def tokens_to(node: TreeNode) -> list[int]:
    return [] if node.parent is None else tokens_to(node.parent) + node.tokens.tolist()


def replay(stream: Stream) -> Counter[str]:
    run, seen = Replay(stream), Counter[str]()
    for i, op in enumerate(stream["ops"]):
        where = f"stream {stream['s']} ({stream['tree']}, {stream['policy']}), operation {i}: {op['o']}"
        if i == stream["end_at"]:
            assert run.state() == stream["end"], where
            seen["ends"] += 1
        got = run.perform(op) | run.sizes()
        assert got == {name: op[name] for name in got}, where
        run.tree.check_integrity()
        run.allocator.check_integrity()
        seen[op["o"]] += 1
    assert run.allocator.free_list().tolist() == stream["drained"], f"stream {stream['s']}"
    assert run.tree.total_size == 0
    return seen


RECORDED = [name for name in EVICTION_POLICIES.names() if name not in ("cost-aware", "retention")]  # those two are not SGLang's


@pytest.mark.parametrize("policy", RECORDED)
def test_every_recorded_operation_is_reproduced(streams: list[Stream], policy: str) -> None:
    chosen = [stream for stream in streams if stream["policy"] == policy]
    seen = sum((replay(stream) for stream in chosen), Counter[str]())
    assert seen.pop("ends") == len(chosen) > 20
    assert seen.total() == sum(len(stream["ops"]) for stream in chosen)
    assert min(seen[kind] for kind in ("match", "insert", "alloc", "lock", "unlock", "evict", "free")) > 50


def test_every_stream_is_of_a_known_policy(streams: list[Stream]) -> None:
    assert len(streams) == 600
    assert {stream["policy"] for stream in streams} == set(RECORDED)
