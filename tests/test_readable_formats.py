"""Which weight formats an engine reads: the others are refused, with those that would work."""

import re
from dataclasses import replace

import pytest

from pagedkv.catalogue import load_model, model_names
from pagedkv.errors import ConfigError
from pagedkv.ledgers import LEDGERS
from pagedkv.readable_formats import ENGINE_CONTAINERS, as_gguf, default_format
from pagedkv.sims.config import ServingConfig
from pagedkv.sims.deployment import deploy, memory_request
from pagedkv.sims.engines import ENGINES
from pagedkv.weight_format import WEIGHT_FORMATS, WeightFormat


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


@pytest.mark.parametrize("engine", [*ENGINES.names(), "vllm@0.19"])
def test_what_an_engine_has_by_default_it_reads(engine: str) -> None:
    containers = ENGINE_CONTAINERS.get(engine, ("any", "safetensors"))
    natives = {model.native_format.name: model.native_format for model in map(load_model, model_names())}
    odd = replace(WEIGHT_FORMATS["int4"], name="int4, groups of 32", bits_per_weight=4.625)
    for native in (
        *natives.values(),
        *WEIGHT_FORMATS.values(),
        odd,
        replace(WEIGHT_FORMATS["fp8"], name="fp8, mixed", dense_bits=11),
    ):
        usual = default_format(engine, native)
        assert usual.container in containers or usual == native
        assert usual.name in WEIGHT_FORMATS or usual == native, "what is proposed can be written after --quantization"
        if "safetensors" in containers:
            assert usual == native
        else:
            assert usual.container in containers


@pytest.mark.parametrize("native", WEIGHT_FORMATS.values(), ids=WEIGHT_FORMATS)
def test_a_gguf_of_the_own_weights_is_as_wide_but_for_what_is_wider_than_8_bits_beside_them(native: WeightFormat) -> None:
    here = as_gguf(native)
    assert here.container in ("any", "gguf")
    assert here.bits_per_weight >= native.bits_per_weight
    if native.container != "safetensors" and native.name != "mxfp4":
        assert here == native
    assert as_gguf(here).container == here.container, "once is enough"


@pytest.mark.parametrize(
    ("engine", "model", "name", "gigabytes"),
    [
        ("ollama", "gpt-oss-20b", "mxfp4", 14),  # as its library says
        ("ollama", "gpt-oss-120b", "mxfp4", 65),
        ("ollama", "llama-3.1-8b", "q4_k_m", 4.9),
        ("ollama", "deepseek-r1", "q4_k_m", 404),
        ("ollama", "qwen3-32b", "q4_k_m", 20),
        ("llama-cpp", "gpt-oss-20b", "mxfp4+q8_0", 12.1),
        ("llama-cpp", "deepseek-v3", "q8_0", 713),
        ("llama-cpp", "kimi-k2.5", "q4_0+q8_0", 584),
        ("llama-cpp", "llama-3.1-8b", "bf16", 16.1),
        ("vllm", "deepseek-v3", "fp8", 671),
    ],
)
def test_weights_without_a_format(engine: str, model: str, name: str, gigabytes: float) -> None:
    request = memory_request(ServingConfig(engine=engine, model=model, hardware="dgx-spark"))
    assert request.weight_format.name == name
    assert request.weight_bytes / 1e9 == pytest.approx(gigabytes, rel=0.025)


def test_a_format_of_pytorch_is_refused_even_if_it_is_the_models_own() -> None:
    with pytest.raises(ConfigError, match=r"--quantization fp8: llama-cpp does not read it.*It reads .*q8_0"):
        memory_request(ServingConfig(engine="llama-cpp", model="deepseek-v3", quantization="fp8"))
    assert memory_request(ServingConfig(engine="vllm", model="deepseek-v3", quantization="fp8")).weight_format.name == "fp8"
