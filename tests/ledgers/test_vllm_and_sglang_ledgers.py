"""vLLM's start check and SGLang's rules, in the numbers of the machine."""

import pytest
from asked_budgets import GIB, MIB, budget, suggestions

from pagedkv.errors import ConfigError
from pagedkv.ledgers.sglang import (
    default_chunked_prefill_size,
    default_cuda_graph_max_bs,
    reserved_bytes,
)


def test_vllm_explains_its_gate_with_the_numbers_of_the_machine() -> None:
    assert budget("vllm").gate == (
        "start check: 0.8 × 121.69 = 97.35 GiB must be free, and 117.69 GiB are free (121.69 visible less 4.00 of the operating "
        "system and 0.00 of other programs); 20.34 GiB stay free, and the machine's floor is 8.00 GiB"
    )
    by_hand = budget("vllm", kv_cache_memory_bytes=16 * GIB)
    assert by_hand.equation == f"KV cache = --kv-cache-memory-bytes {16 * GIB} = 16.00 GiB"
    held = by_hand.free_at_start - by_hand.unassigned
    assert f"the engine's {held / GIB:.2f} GiB must be free" in by_hand.gate


@pytest.mark.parametrize(
    ("gib", "chunk", "batch"),
    [
        (15.6, 2048, 8),
        (23.5, 4096, 48),
        (31.4, 4096, 48),
        (39.4, 4096, 32),
        (79.2, 8192, 256),
        (121.7, 8192, 256),
        (178.4, 16384, 512),
    ],
)
def test_sglang_chooses_by_the_size_of_the_device(gib: float, chunk: int, batch: int) -> None:
    assert default_chunked_prefill_size(int(gib * GIB)) == chunk
    assert default_cuda_graph_max_bs(int(gib * GIB)) == batch


@pytest.mark.parametrize(
    ("gib", "chunk", "batch", "eager", "mib"),
    [
        (80, 8192, 256, False, 512 + 12_288 + 128 + 512 + 8 * 58),
        (80, 8192, 256, True, 512 + 12_288 + 128),
        (80, 2048, 8, False, 10_240),
        (24, 1024, 8, True, 512 + 3072 + 128),
        (24, 512, 8, False, 512 + 3072 + 128 + 16 + 8 * 30),
    ],
)
def test_sglang_reserves_by_its_formula(gib: int, chunk: int, batch: int, eager: bool, mib: int) -> None:
    reserved = reserved_bytes(visible_bytes=gib * GIB, chunked_prefill_size=chunk, cuda_graph_max_bs=batch, enforce_eager=eager)
    assert reserved == mib * MIB


def test_sglang_gives_weights_and_pool_a_share_of_what_is_free() -> None:
    divided = budget("sglang", hardware="h100", mem_fraction_static=0.8, page_size=16)
    static = 0.8 * (divided.free_at_start - divided.engine_overhead)
    assert divided.requested == int(static)
    assert divided.usable_blocks == (static - divided.weights) // divided.block_bytes
    assert divided.num_blocks == divided.usable_blocks + 1
    assert budget("sglang", hardware="h100").utilization == 0.829
    capped = budget("sglang", hardware="h100", max_total_tokens=10_000, page_size=16)
    assert capped.usable_blocks * 16 == 10_000


def test_sglang_refuses_a_share_that_leaves_no_room_for_activations() -> None:
    with pytest.raises(ConfigError, match=r"GiB are free: .* of KV cache at --mem-fraction-static 0\.99") as caught:
        budget("sglang", hardware="h100", mem_fraction_static=0.99)
    lower, *_ = suggestions(caught.value)
    assert lower == {"mem_fraction_static": 0.94}
    with pytest.raises(ConfigError):
        budget("sglang", hardware="h100", mem_fraction_static=0.95)


def test_a_pool_that_the_user_made_too_small_is_enlarged() -> None:
    for engine, setting in (("sglang", "max_total_tokens"), ("tensorrt-llm", "max_tokens")):
        with pytest.raises(ConfigError, match=f"--{setting.replace('_', '-')} 1000 is less than one request") as caught:
            budget(engine, **{setting: 1000})
        assert suggestions(caught.value)[0] == {setting: 2048}
