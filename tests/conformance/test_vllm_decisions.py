"""Step by step the decisions that vLLM 0.33.0's own scheduler took: 300 recorded workloads."""

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pagedkv.allocation import KVPoolSettings
from pagedkv.block_hash import BlockHashChain, BlockKeys
from pagedkv.scheduling.scheduler import Scheduler
from pagedkv.scheduling.scheduler_settings import SchedulerSettings
from pagedkv.step_allocation import step_allocator

Workload = dict[str, Any]


@pytest.fixture(scope="module")
def workloads(shared_data: Path) -> list[Workload]:
    with gzip.open(shared_data / "vllm_decisions.jsonl.gz", "rt") as lines:
        next(lines)
        return [json.loads(line) for line in lines]


OUTPUT_TOKEN = 1_000_000
"""The token at position p of request r is OUTPUT_TOKEN + 10,000 r + p."""


def keys_of(request: dict[str, Any], block_size: int) -> BlockKeys:
    """The keys of all the blocks that a request will ever fill, its outputs included."""
    chain = BlockHashChain(block_size=block_size, salt=request.get("salt", ""))
    prompt = np.concatenate([np.arange(first, first + count) for first, count in request["prompt"]])
    positions = np.arange(prompt.size, prompt.size + request["max_tokens"])
    chain.extend(np.concatenate((prompt, OUTPUT_TOKEN + 10_000 * request["id"] + positions)))
    return chain.keys


def replay(workload: Workload) -> Counter[str]:
    config = workload["config"]
    allocator = step_allocator(
        "paged",
        KVPoolSettings(
            num_blocks=config["num_gpu_blocks"],
            block_size=config["block_size"],
            max_num_seqs=config["max_num_seqs"],
            max_model_len=config["max_model_len"],
            watermark=config["watermark"],
            reserve_full_isl=config["scheduler_reserve_full_isl"],
            enable_prefix_caching=config["enable_prefix_caching"],
        ),
    )
    scheduler = Scheduler(
        SchedulerSettings(
            max_num_seqs=config["max_num_seqs"],
            max_num_batched_tokens=config["max_num_batched_tokens"],
            max_model_len=config["max_model_len"],
            enable_chunked_prefill=config["enable_chunked_prefill"],
            long_prefill_token_threshold=config["long_prefill_token_threshold"],
            adaptive_long_prefill_threshold=config["long_prefill_token_threshold_adaptive"],
            policy=config["policy"],
        ),
        allocator,
    )
    ids: list[int] = []
    pending = sorted(workload["requests"], key=lambda r: (r["arrival_step"], r["id"]))
    known: dict[int, int] = {}
    """By request: prompt and outputs so far, as what is recorded tells."""
    computed: dict[int, int] = {}
    queried: Counter[int] = Counter()
    hit: Counter[int] = Counter()
    seen: Counter[str] = Counter()
    for i, recorded in enumerate(workload["steps"]):
        while pending and pending[0]["arrival_step"] <= i:
            request = pending.pop(0)
            length = sum(count for _, count in request["prompt"])
            scheduler.add(
                prompt_tokens=length,
                output_tokens=request["max_tokens"],
                priority=request["priority"],
                keys=keys_of(request, config["block_size"]) if config["enable_prefix_caching"] else None,
            )
            ids.append(request["id"])
            known[request["id"]] = length
        held = scheduler.allocator.units_held.copy()
        step = scheduler.schedule()
        entries = range(step.num_entries)
        where = f"workload {workload['id']}, step {i}"
        scheduled = [[ids[step.batch["request"][e]], int(step.batch["num_scheduled_tokens"][e])] for e in entries]
        assert scheduled == recorded.get("s", []), where
        assert [ids[r] for r in scheduler.preempted] == recorded.get("p", []), where
        admitted = step.batch[step.num_running_before : step.num_entries]
        cached = admitted["num_slots_needed"] - admitted["num_scheduled_tokens"]
        assert [[ids[r], c] for r, c in zip(admitted["request"], cached, strict=True)] == recorded.get("c", []), where
        seen["preemptions"] += step.num_preempted
        for request_id, cached in recorded.get("c", []):
            computed[request_id] = cached
            queried[request_id] += known[request_id]
            hit[request_id] += cached
            seen["hits"] += cached > 0
        for request_id, tokens in recorded.get("s", []):
            computed[request_id] += tokens
            known[request_id] += computed[request_id] == known[request_id]
        for request_id, blocks in recorded.get("nb", []):
            entry = next(e for e in entries if ids[step.batch["request"][e]] == request_id)
            row = int(step.batch["row"][entry])
            already = held[row] if entry < step.num_running_before else 0
            assert allocator.tables.of(row)[already:].tolist() == blocks, where
        scheduler.complete()
        assert [ids[r] for r in scheduler.finished] == recorded.get("f", []), where
        assert allocator.pool.num_free_blocks == recorded["free"], where
        assert (scheduler.num_running, scheduler.num_waiting) == (recorded["run"], recorded["wait"]), where
    assert allocator.pool.free_queue().tolist() == workload["summary"]["free_queue"]
    counts = scheduler.requests.arrays[: len(ids)]
    assert counts["num_queried_tokens"].tolist() == [queried[request_id] for request_id in ids]
    assert counts["num_hit_tokens"].tolist() == [hit[request_id] for request_id in ids]
    seen["hit tokens"], seen["queried tokens"] = sum(hit.values()), sum(queried.values())
    scheduler.check_integrity()
    return seen


def test_every_recorded_step_is_reproduced(workloads: list[Workload]) -> None:
    seen = sum((replay(workload) for workload in workloads), Counter[str]())
    assert len(workloads) == 300
    assert seen["preemptions"] == 2_764
    assert seen["hits"] == 3_942
    assert (seen["hit tokens"], seen["queried tokens"]) == (465_728, 1_386_651)
