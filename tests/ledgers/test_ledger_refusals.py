"""Values that cannot work are named, whatever the engine, and every ledger can be asked."""

from dataclasses import replace
from typing import Any

import pytest
from asked_budgets import GIB, ask, budget

from pagedkv.errors import ConfigError
from pagedkv.ledgers.llama_cpp import LlamaCppLedger
from pagedkv.ledgers.sglang import (
    SGLangLedger,
)
from pagedkv.ledgers.tensorrt_llm import TensorRTLLMLedger
from pagedkv.ledgers.transformers import TransformersLedger
from pagedkv.memory_plan import plan


@pytest.mark.parametrize(
    ("engine", "own", "message"),
    [
        ("sglang", {"mem_fraction_static": 1.2}, r"--mem-fraction-static 1\.2 must be above 0 and at most 1"),
        ("sglang", {"page_size": 0}, r"--page-size 0 must be at least 1"),
        ("sglang", {"kv_cache_dtype": "q8_0"}, r"--kv-cache-dtype q8_0 is not for this engine: use auto, .*fp8"),
        ("tensorrt-llm", {"free_gpu_memory_fraction": 0.0}, r"--free-gpu-memory-fraction 0\.0 must be"),
        ("tensorrt-llm", {"tokens_per_block": 24}, r"--tokens-per-block 24 must be a power of two above 1"),
        ("tensorrt-llm", {"tokens_per_block": 1}, r"--tokens-per-block 1 must be a power of two above 1"),
        ("tensorrt-llm", {"max_tokens": 0}, r"--max-tokens 0 must be"),
        ("llama-cpp", {"ctx_size": -1}, r"--ctx-size -1 must be at least 0"),
        ("llama-cpp", {"parallel": 0}, r"--parallel 0 must be"),
        ("llama-cpp", {"ubatch_size": 0}, r"--ubatch-size 0 must be"),
        ("llama-cpp", {"ctx_checkpoints": -1}, r"--ctx-checkpoints -1 must be at least 0, which turns them off"),
        ("llama-cpp", {"kv_cache_dtype": "fp8"}, r"--kv-cache-dtype fp8 is not for this engine: use auto, .*q8_0"),
        ("transformers", {"kv_cache_dtype": "fp8"}, r"--kv-cache-dtype fp8 is not for this engine: use auto, .*float16"),
    ],
)
def test_values_that_cannot_work_are_named(engine: str, own: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        budget(engine, **own)


def test_a_request_can_be_asked_of_every_engine() -> None:
    request = ask("vllm")
    ledgers = (request.ledger, SGLangLedger(), TensorRTLLMLedger(), LlamaCppLedger(ctx_size=4096), TransformersLedger())
    assert len({plan(replace(request, ledger=ledger)).kv_cache for ledger in ledgers}) == 5


def test_a_warning_that_nothing_gentler_avoids_ends_there() -> None:
    least = budget("llama-cpp", ctx_size=256, max_model_len=256, free_memory_bytes=18 * GIB)
    assert "the machine may freeze" in least.warnings[0]
    assert "leaves enough" not in least.warnings[0]
