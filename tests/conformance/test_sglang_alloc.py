"""Operation by operation what SGLang 0.5.23's own slot allocators did: slots, free lists and their order."""

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pagedkv.slot_allocator import SlotAllocator

Stream = dict[str, Any]
Operation = dict[str, Any]


@pytest.fixture(scope="module")
def streams(shared_data: Path) -> list[Stream]:
    with gzip.open(shared_data / "sglang_alloc.jsonl.gz", "rt") as lines:
        return [json.loads(line) for line in lines]


def perform(allocator: SlotAllocator, op: Operation) -> Any:
    """Do what `op` says; return the slots it gave."""
    match op["o"]:
        case "alloc":
            return allocator.alloc(op["n"])
        case "extend":
            return allocator.alloc_extend(pre=op["pre"], seq=op["seq"], last=op["last"])
        case "decode":
            return allocator.alloc_decode(seq=op["seq"], last=op["last"])
        case "free":
            return allocator.free(op["slots"])
        case "free_segment":
            return allocator.free_segment(op["slots"])
        case "group":
            parts = list(zip(op["kinds"], op["batch"], strict=True))
            return allocator.free_group(
                whole=[slots for kind, slots in parts if kind == "free"],
                segments=[slots for kind, slots in parts if kind == "free_segment"],
            )
    raise AssertionError(f"unknown operation {op['o']}")


def replay(stream: Stream) -> Counter[str]:
    allocator = SlotAllocator(num_blocks=stream["pages"], block_size=stream["page"], need_sort=stream["need_sort"])
    seen: Counter[str] = Counter()
    for i, op in enumerate(stream["ops"]):
        where = f"stream {stream['s']}, operation {i}: {op['o']}"
        result = perform(allocator, op)
        if op["o"] in ("alloc", "extend", "decode"):
            assert (None if result is None else result.tolist()) == op["slots"], where
            seen["refused"] += result is None
        ready = allocator.ready_list()
        assert (ready[:8].tolist(), ready.size, allocator.num_free_slots) == (op["front"], op["nfront"], op["a"]), where
        allocator.check_integrity()
        seen[op["o"]] += 1
    assert np.array_equal(allocator.free_list(), stream["free"]), f"stream {stream['s']}"
    return seen


def test_every_recorded_operation_is_reproduced(streams: list[Stream]) -> None:
    seen = sum((replay(stream) for stream in streams), Counter[str]())
    assert len(streams) == 150
    assert seen.total() - seen["refused"] == sum(len(stream["ops"]) for stream in streams)
    assert min(seen[kind] for kind in ("alloc", "extend", "decode", "free", "free_segment", "group", "refused")) > 100
