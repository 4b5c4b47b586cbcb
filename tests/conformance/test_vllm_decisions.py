"""Step by step the decisions that vLLM 0.33.0's own scheduler took: recorded workloads without prefix caching, under fcfs."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from pagedkv.allocation import KVPoolSettings
from pagedkv.scheduling.scheduler import Scheduler, SchedulerSettings
from pagedkv.step_allocation import step_allocator

Workload = dict[str, Any]


@pytest.fixture(scope="module")
def workloads(shared_data: Path) -> list[Workload]:
    with gzip.open(shared_data / "vllm_decisions.jsonl.gz", "rt") as lines:
        next(lines)
        loaded = [json.loads(line) for line in lines]
    return [w for w in loaded if supported(w["config"])]


def supported(config: dict[str, Any]) -> bool:
    return (
        config["policy"] == "fcfs" and not config["enable_prefix_caching"] and not config["long_prefill_token_threshold_adaptive"]
    )


def replay(workload: Workload) -> int:
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
        ),
    )
    scheduler = Scheduler(
        SchedulerSettings(
            max_num_seqs=config["max_num_seqs"],
            max_num_batched_tokens=config["max_num_batched_tokens"],
            max_model_len=config["max_model_len"],
            enable_chunked_prefill=config["enable_chunked_prefill"],
            long_prefill_token_threshold=config["long_prefill_token_threshold"],
        ),
        allocator,
    )
    ids: list[int] = []
    pending = sorted(workload["requests"], key=lambda r: (r["arrival_step"], r["id"]))
    preemptions = 0
    for i, recorded in enumerate(workload["steps"]):
        while pending and pending[0]["arrival_step"] <= i:
            request = pending.pop(0)
            length = sum(count for _, count in request["prompt"])
            scheduler.add(prompt_tokens=length, output_tokens=request["max_tokens"])
            ids.append(request["id"])
        held = scheduler.allocator.units_held.copy()
        step = scheduler.schedule()
        entries = range(step.num_entries)
        where = f"workload {workload['id']}, step {i}"
        scheduled = [[ids[step.batch["request"][e]], int(step.batch["num_scheduled_tokens"][e])] for e in entries]
        assert scheduled == recorded.get("s", []), where
        assert step.num_preempted == len(recorded.get("p", [])), where
        preemptions += step.num_preempted
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
    return preemptions


def test_every_recorded_step_is_reproduced(workloads: list[Workload]) -> None:
    preemptions = sum(replay(workload) for workload in workloads)
    assert len(workloads) >= 20
    assert preemptions > 100
