"""Pass by pass what SGLang 0.5.23's own scheduler decided: 301 prefill passes and 99 decode steps."""

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pagedkv.radix_cache import RadixCache
from pagedkv.radix_node import TreeNode
from pagedkv.scheduling.sglang_prefill import PassLimits, Prefill, PrefillPass, Verdict
from pagedkv.scheduling.sglang_queue import QUEUE_POLICIES, sort_queue
from pagedkv.scheduling.sglang_request import SGLangRequest
from pagedkv.scheduling.sglang_retraction import retract, slots_for_decode

Record = dict[str, Any]


@pytest.fixture(scope="module")
def records(shared_data: Path) -> list[Record]:
    with gzip.open(shared_data / "sglang_schedule.jsonl.gz", "rt") as lines:
        return [json.loads(line) for line in lines]


class Cache(RadixCache):
    """A tree over its slots, as operations left it that are recorded as in sglang_radix.jsonl.gz."""

    def __init__(self, record: Record) -> None:
        super().__init__(num_blocks=record["pages"], block_size=record["page"])
        self.locked: dict[int, TreeNode] = {}
        self.freed: list[list[int]] = []
        """What came back to the free list after the set-up, in order."""
        self.found = self.tree.root
        for op in record["setup"]:
            self.perform(op)
        assert self.sizes() == record["before"]
        self._nodes = self._stored()

    def _stored(self) -> dict[TreeNode, list[int]]:
        return {node: node.slots.tolist() for node in self.tree.root.below()}

    def note_evicted(self) -> None:
        """Write down what has come from the tree to the free list since this was last called, leaf by leaf."""
        stored, free = self._stored(), self.slots.free_list().tolist()
        gone = [slots for node, slots in self._nodes.items() if node not in stored]
        kept = {slot for slots in stored.values() for slot in slots}
        pieces = [[slot for slot in slots if slot not in kept] for slots in gone]
        first_come = self.block_size == 1  # else whoever came last is in front
        self.freed += sorted(pieces, key=lambda slots: free.index(slots[0] // self.block_size), reverse=not first_come)
        self._nodes = stored

    def perform(self, op: Record) -> None:
        match op["o"]:
            case "match":
                self.found = self.tree.match_prefix(op["k"], extra_key=op["ns"]).node
            case "insert":
                done = self.tree.insert(
                    op["k"], op["slots"], extra_key=op["ns"], held=op["prev"], hits_beyond=op["skip"], priority=op["prio"]
                )
                self.found = done.node
                for slots in done.duplicates:
                    self.slots.free_segment(slots)
            case "alloc":
                self.slots.alloc(op["n"])
            case "lock":
                self.locked[op["h"]] = self.found
                self.tree.inc_lock_ref(self.found)
            case "unlock":
                self.tree.dec_lock_ref(self.locked.pop(op["h"]))
            case "free":
                self.slots.free_segment(np.array(op["slots"]))
            case "evict":
                for slots in self.tree.evict(op["n"]):
                    self.slots.free_segment(slots)
            case unknown:
                raise AssertionError(f"unknown operation {unknown}")

    def sizes(self) -> dict[str, int]:
        return {"a": self.slots.num_free_slots, "e": self.tree.evictable_size, "p": self.tree.protected_size}


def request(index: int, fields: Record) -> SGLangRequest:
    return SGLangRequest(
        index=index,
        name=fields["rid"],
        tokens=np.array(fields["in"] + fields["out"], np.int32),
        num_prompt_tokens=len(fields["in"]),
        num_output_tokens=len(fields["out"]),
        max_new_tokens=fields["max_new"],
        ignore_eos=fields.get("ignore_eos", False),
        namespace=fields.get("ns"),
        arrival=fields.get("t", 0),
        prefilled_before=fields.get("seen", 0),
    )


def budgets(one: PrefillPass) -> dict[str, float | None]:
    return {"total": one.total_left, "cur": one.current_left, "input": one.input_left, "chunk": one.chunk_left}


def outcome(before: int, one: PrefillPass) -> Prefill | None:
    return one.admitted[-1] if len(one.admitted) > before else None


def replay_prefill(record: Record) -> Counter[str]:
    cache, params = Cache(record), record["params"]
    running = [request(i, fields) for i, fields in enumerate(record["running"])]
    waiting = [request(i, fields) for i, fields in enumerate(record["waiting"])]
    tree = cache.tree if params["cache"] else None
    order = sort_queue(params["policy"], waiting, tree, running=running, num_prefilled_tokens=params["processed"])
    where = f"record {record['s']}"
    assert order.policy == record["active"], where
    assert sorted(r.name for r in order.late) == sorted(record["late"]), where
    assert [[r.name, r.num_matched_tokens] for r in order.requests] == record["order"], where
    limits = PassLimits(
        max_prefill_tokens=params["max_prefill_tokens"],
        chunk_tokens=params["chunk"],
        max_requests=params["max_requests"],
        num_mixed=params["mixed"],
        new_token_ratio=params["ratio"],
        caches_prefixes=params["cache"],
        shortest_first=params["policy"] == "shortest-prefill-first",
    )
    one, got, verdict = PrefillPass(cache, running, limits), list[Record](), Verdict.CONTINUE
    got.append({"do": "start", "left": budgets(one)})
    if (fields := record["continuing"]) is not None:
        one.resume(request(-1, fields), fields["done"], order.requests)
        last = one.admitted[-1]
        got.append({"do": "continue", "rid": fields["rid"], "start": last.start, "end": last.end, "unfinished": last.chunked})
        got[-1]["left"] = budgets(one)
        if order.requests and one.is_spent:
            got.append({"do": "stop", "why": Verdict.OTHER.name})
            verdict = Verdict.OTHER
    for candidate in order.requests:
        if verdict is not Verdict.CONTINUE:
            break
        before, known = len(one.admitted), candidate.known_tokens[:-1]
        hit = cache.tree.match_prefix(known).slots.size
        verdict = one.add(candidate)
        taken = outcome(before, one)
        got.append({"do": "add", "rid": candidate.name, "hit": hit, "res": verdict.name, "took": taken is not None})
        start, end, chunked = (taken.start, taken.end, taken.chunked) if taken else (None, None, False)
        got[-1] |= {"start": start, "end": end, "chunked": chunked, "left": budgets(one)}
    assert got == record["steps"], where
    assert cache.sizes() == record["after"], where
    cache.tree.check_integrity()
    cache.slots.check_integrity()
    return Counter(passes=1, steps=len(got), admissions=len(one.admitted), places=len(order.requests), late=len(order.late))


def replay_retraction(record: Record) -> Counter[str]:
    cache, fields, result = Cache(record), record["running"], record["result"]
    prompt = np.array([len(r["in"]) for r in fields])
    output = np.array([len(r["out"]) for r in fields])
    max_new = np.array([r["max_new"] for r in fields])

    def release(place: int) -> None:
        one = fields[place]
        cache.note_evicted()
        own = one["row"][len(one["in"]) // record["page"] * record["page"] :]
        if own:
            cache.freed.append(own)
        cache.slots.free_segment(np.array(own, np.int32))
        cache.tree.dec_lock_ref(cache.locked.pop(one["h"]))

    needed = slots_for_decode(prompt + output - 1, record["page"])
    got: Record = {"need": needed, "fits": cache.make_room(needed)}
    cache.note_evicted()
    got["freed_by_check"] = cache.freed.copy()
    got["a"] = cache.slots.num_free_slots
    seen = Counter(checks=1)
    if not got["fits"]:
        cache.freed.clear()
        done = retract(cache, num_prompt=prompt, num_output=output, max_new=max_new, release=release)
        cache.note_evicted()
        for name, places in (("retracted", done.retracted), ("aborted", done.aborted), ("kept", done.kept)):
            got[name] = [fields[place]["rid"] for place in places]
            seen[name] += len(places)
        got |= {"ratio": done.new_token_ratio, "freed": cache.freed}
    assert got == result, f"record {record['s']}"
    after = cache.sizes() | ({"free": cache.slots.free_list().tolist()} if "free" in record["after"] else {})
    assert after == record["after"], f"record {record['s']}"
    cache.tree.check_integrity()
    cache.slots.check_integrity()
    return seen


@pytest.mark.parametrize("policy", ["dfs-weight", "fcfs", "hrrn", "lof", "lpm", "shortest-prefill-first"])
def test_every_recorded_admission_is_reproduced(records: list[Record], policy: str) -> None:
    chosen = [record for record in records if record["kind"] == "prefill" and record["params"]["policy"] == policy]
    seen = sum((replay_prefill(record) for record in chosen), Counter[str]())
    assert seen["passes"] == len(chosen) > 30
    assert seen["steps"] == sum(len(record["steps"]) for record in chosen)
    assert seen["admissions"] > 30
    assert policy in QUEUE_POLICIES


def test_every_recorded_retraction_is_reproduced(records: list[Record]) -> None:
    chosen = [record for record in records if record["kind"] == "retract"]
    seen = sum((replay_retraction(record) for record in chosen), Counter[str]())
    assert (seen["checks"], seen["retracted"], seen["aborted"]) == (99, 75, 4)


def test_every_record_is_replayed(records: list[Record]) -> None:
    assert Counter(record["kind"] for record in records) == {"prefill": 301, "retract": 99}
    policies = Counter(record["params"]["policy"] for record in records if record["kind"] == "prefill")
    assert policies == {"fcfs": 68, "lpm": 67, "dfs-weight": 67, "lof": 33, "hrrn": 33, "shortest-prefill-first": 33}
    assert sum(len(record["steps"]) for record in records if record["kind"] == "prefill") == 1217
