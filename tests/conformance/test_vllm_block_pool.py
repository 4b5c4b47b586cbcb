"""Operation by operation what vLLM 0.33.0's own cache manager did: block ids, hits, the free queue, keys and reference counts."""

import gzip
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pagedkv.allocation import KVPoolSettings
from pagedkv.arrays import Int64Array
from pagedkv.block_hash import BlockHashChain
from pagedkv.kv_cache_manager import KVCacheManager
from pagedkv.kv_request import KVRequest

Op = dict[str, Any]


@pytest.fixture(scope="module")
def streams(shared_data: Path) -> list[dict[str, Any]]:
    with gzip.open(shared_data / "vllm_block_pool.jsonl.gz", "rt") as lines:
        next(lines)
        return [json.loads(line) for line in lines]


def tokens(segments: list[list[int]]) -> Int64Array:
    return np.concatenate([np.arange(first, first + count) for first, count in segments])


class Replay:
    """Issues the recorded operations and tells, in the file's words, what came of each."""

    def __init__(self, stream: dict[str, Any]) -> None:
        self.block_size = stream["block_size"]
        settings = KVPoolSettings(
            num_blocks=stream["usable"] + 1,
            block_size=self.block_size,
            max_num_seqs=stream["usable"],
            max_model_len=100_000,
            watermark=stream["watermark"],
        )
        self.manager = KVCacheManager(settings, enable_caching=stream["enable_caching"])
        self.requests: dict[int, tuple[KVRequest, BlockHashChain]] = {}

    def request(self, op: Op) -> tuple[KVRequest, BlockHashChain]:
        chain = BlockHashChain(block_size=self.block_size, salt=op.get("salt", ""))
        chain.extend(tokens(op["t"]))
        return KVRequest(request_id=op.get("r", "look"), num_tokens=chain.num_tokens, block_keys=chain.keys), chain

    def perform(self, op: Op) -> Op:
        kind = op["o"]
        if kind == "look":
            return self.hits(self.request(op)[0])
        if kind == "reset":
            return {"ok": self.manager.reset_prefix_cache()}
        if kind == "add":
            self.requests[op["r"]] = self.request(op)
        request, chain = self.requests[op["r"]]
        if kind == "free":
            self.manager.free(request)
            del self.requests[op["r"]]
            return {}
        if kind == "pre":
            self.manager.preempt(request)
            return {}
        if kind in ("add", "res"):
            came = self.admit(request, op)
            if kind == "add" and came["ids"] is None:
                del self.requests[op["r"]]
            return came
        if kind == "app":
            chain.extend(tokens(op["t"]))
            request.update(chain)
        return self.allocate(request, op["n"])

    def hits(self, request: KVRequest) -> Op:
        blocks, num_tokens = self.manager.get_computed_blocks(request)
        return {"h": num_tokens, "hb": blocks.tolist()}

    def admit(self, request: KVRequest, op: Op) -> Op:
        found = self.hits(request) if op.get("look", True) else {}
        came = self.allocate(
            request, op["n"], found.get("hb", []), has_scheduled_reqs=op["busy"], full_sequence_must_fit=op["full"]
        )
        return found | came

    def allocate(self, request: KVRequest, num_new_tokens: int, hits: list[int] | None = None, **flags: bool) -> Op:
        ids = self.manager.allocate_slots(request, num_new_tokens, hits or [], **flags)
        if ids is None:
            return {"ids": None}
        request.num_computed_tokens += len(hits or []) * self.block_size + num_new_tokens
        return {"ids": ids.tolist()}

    def state(self) -> Op:
        manager = self.manager
        ref_cnt = manager.pool.ref_cnt
        cached = manager.pool.cache.blocks().tolist()
        shared = [[block, int(ref_cnt[block])] for block in np.flatnonzero(ref_cnt >= 2).tolist()]
        return {"q": manager.free_queue().tolist(), "k": cached, "ref": shared}


RESULTS = ("h", "hb", "ids", "ok")


def differences(stream: dict[str, Any]) -> Iterator[str]:
    replay = Replay(stream)
    state = {"q": list(range(1, stream["usable"] + 1)), "k": [], "ref": []}
    for i, op in enumerate(stream["ops"]):
        state |= {name: op[name] for name in state if name in op}
        expected = {name: op[name] for name in RESULTS if name in op} | state
        came = replay.perform(op) | replay.state()
        replay.manager.check_integrity()
        if came != expected:
            yield f"stream {stream['id']}, operation {i}: {op} gave {came}, not {expected}"
            return


def test_every_recorded_operation_is_reproduced(streams: list[dict[str, Any]]) -> None:
    wrong = [difference for stream in streams for difference in differences(stream)]
    assert not wrong, f"{len(wrong)} of {len(streams)} streams differ; the first: {wrong[0]}"


def test_the_streams_cover_what_they_are_for(streams: list[dict[str, Any]]) -> None:
    ops = [op for stream in streams for op in stream["ops"]]
    assert len(streams) == 300
    assert len(ops) == 18_000
    kinds = Counter(op["o"] for op in ops)
    assert set(kinds) == {"add", "app", "free", "grow", "look", "pre", "res", "reset"}
    assert sum(op.get("h", 0) > 0 for op in ops) > 100
    assert sum(op.get("ids", []) is None for op in ops) > 100
    assert {op["ok"] for op in ops if op["o"] == "reset"} == {True, False}
