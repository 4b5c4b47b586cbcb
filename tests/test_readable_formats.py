"""Which weight formats an engine reads: the others are refused, with those that would work."""

import re

import pytest

from pagedkv.errors import ConfigError
from pagedkv.ledgers import LEDGERS
from pagedkv.sims.config import ServingConfig
from pagedkv.sims.deployment import deploy, memory_request
from pagedkv.sims.engines import ENGINES
from pagedkv.weight_format import ENGINE_CONTAINERS, WEIGHT_FORMATS


@pytest.mark.parametrize("engine", ENGINES.names())
@pytest.mark.parametrize("name", WEIGHT_FORMATS)
def test_a_format_is_read_or_refused_with_formats_that_are_read(engine: str, name: str) -> None:
    serving = ServingConfig(engine=engine, model="qwen3-0.6b", quantization=name, max_model_len=1024)
    try:
        assert memory_request(serving).weight_format.name == name
    except ConfigError as error:
        said = re.search(r"It reads (.*?); ", str(error))
        assert said is not None
        assert name not in said[1].split(", ")
        for other in said[1].split(", "):
            assert deploy(ServingConfig(engine=engine, model="qwen3-0.6b", quantization=other, max_model_len=1024)).weight_format


@pytest.mark.parametrize(
    ("engine", "name", "reads"),
    [
        ("vllm", "q4_k_m", False),
        ("vllm@0.19", "q4_k_m", True),
        ("vllm", "awq", True),
        ("vllm", "nvfp4", True),
        ("sglang", "q4_k_m", True),
        ("tensorrt-llm", "q8_0", False),
        ("naive", "q4_0", False),
        ("llama-cpp", "fp8", False),
        ("llama-cpp", "awq", False),
        ("llama-cpp", "q4_k_m", True),
        ("llama-cpp", "nvfp4", True),
        ("ollama", "fp8", False),
        ("ollama", "bf16", True),
    ],
)
def test_what_engines_are_known_to_read(engine: str, name: str, *, reads: bool) -> None:
    serving = ServingConfig(engine=engine, model="qwen3-8b", quantization=name, max_model_len=1024)
    if reads:
        assert deploy(serving)
        return
    with pytest.raises(ConfigError, match=f"{engine} does not read it"):
        deploy(serving)


def test_engines_with_files_of_their_own_are_engines_and_propose_what_they_read() -> None:
    assert {name.partition("@")[0] for name in ENGINE_CONTAINERS} <= set(ENGINES.names())
    for ledger in LEDGERS.names():
        proposed = LEDGERS.load(ledger)().weight_formats
        containers = ENGINE_CONTAINERS.get(ledger, ("any", "safetensors"))
        assert all(WEIGHT_FORMATS[name].container in containers for name in proposed)
