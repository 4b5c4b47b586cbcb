"""The repositories that people run on a DGX Spark: each is known, or refused with flags that work."""

import re
import shlex
from pathlib import Path

import pytest

from pagedkv.catalogue import known_model, load_model, model_names, quantized_repository
from pagedkv.errors import ConfigError
from pagedkv.readable_formats import check_readable
from pagedkv.repository_name import read_repository_name
from pagedkv.sims.cli import main
from pagedkv.weight_format import load_weight_format

KNOWN = {
    "openai/gpt-oss-120b": "gpt-oss-120b",
    "openai/gpt-oss-20b": "gpt-oss-20b",
    "openai/gpt-oss-safeguard-20b": "gpt-oss-20b",
    "Qwen/Qwen3-30B-A3B": "qwen3-30b-a3b",
    "Qwen/Qwen3-30B-A3B-Instruct-2507": "qwen3-30b-a3b-2507",
    "Qwen/Qwen3-30B-A3B-Thinking-2507": "qwen3-30b-a3b-2507",
    "Qwen/Qwen3-Coder-30B-A3B-Instruct": "qwen3-coder-30b-a3b",
    "Qwen3-Coder-30B-A3B-Instruct": "qwen3-coder-30b-a3b",
    "Qwen/Qwen3-Coder-Next": "qwen3-coder-next",
    "Qwen/Qwen3-VL-30B-A3B-Instruct": "qwen3-vl-30b-a3b",
    "Qwen/Qwen3-VL-8B-Instruct": "qwen3-vl-8b",
    "Qwen/Qwen3-4B-Instruct-2507": "qwen3-4b-2507",
    "Qwen/Qwen3-235B-A22B-Instruct-2507": "qwen3-235b-a22b-2507",
    "Qwen/Qwen3-Next-80B-A3B-Instruct": "qwen3-next-80b-a3b",
    "Qwen/Qwen3.6-35B-A3B": "qwen3.6-35b-a3b",
    "Qwen/Qwen3-32B": "qwen3-32b",
    "Qwen/QwQ-32B": "qwen2.5-32b",
    "Qwen/Qwen2.5-Coder-32B-Instruct": "qwen2.5-coder-32b",
    "Qwen/Qwen2.5-VL-7B-Instruct": "qwen2.5-vl-7b",
    "deepseek-ai/DeepSeek-R1-Distill-Llama-70B": "llama-3.3-70b",
    "deepseek-ai/DeepSeek-R1-Distill-Llama-8B": "llama-3.1-8b",
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-32B": "qwen2.5-32b",
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B": "qwen2.5-14b",
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": "qwen2.5-7b",
    "deepseek-ai/DeepSeek-R1-0528-Qwen3-8B": "deepseek-r1-0528-qwen3-8b",
    "meta-llama/Llama-3.1-8B-Instruct": "llama-3.1-8b",
    "meta-llama/Llama-3.3-70B-Instruct": "llama-3.3-70b",
    "meta-llama/Meta-Llama-3-70B-Instruct": "llama-3-70b",
    "nvidia/Llama-3_3-Nemotron-Super-49B-v1_5": "llama-3.3-nemotron-super-49b",
    "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": "nemotron-3-nano-30b-a3b",
    "nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-NVFP4": "nemotron-3-super-120b-a12b",
    "google/gemma-3-27b-it": "gemma-3-27b",
    "google/gemma-4-31B-it": "gemma-4-31b",
    "zai-org/GLM-4.5-Air": "glm-4.5-air",
    "zai-org/GLM-4.7-Flash": "glm-4.7-flash",
    "mistralai/Mistral-Small-3.2-24B-Instruct-2506": "mistral-small-3.2-24b",
    "mistralai/Devstral-Small-2507": "mistral-small-3.2-24b",
    "mistralai/Mistral-7B-Instruct-v0.2": "mistral-7b-v0.2",
    "microsoft/phi-4": "phi-4",
    "microsoft/Phi-4-reasoning-plus": "phi-4-reasoning",
}
"""Repositories, and the model of the catalogue that each is."""

MEANT = {
    "Qwen/Qwen3-30B-A3B-FP8": "--model qwen3-30b-a3b --quantization fp8",
    "Qwen/Qwen3-30B-A3B-Instruct-2507-FP8": "--model qwen3-30b-a3b-2507 --quantization fp8",
    "Qwen/Qwen3-Coder-30B-A3B-Instruct-FP8": "--model qwen3-coder-30b-a3b --quantization fp8",
    "Qwen/Qwen3-Next-80B-A3B-Instruct-FP8": "--model qwen3-next-80b-a3b --quantization fp8",
    "Qwen/Qwen3-Coder-Next-FP8": "--model qwen3-coder-next --quantization fp8",
    "Qwen/Qwen3.6-35B-A3B-FP8": "--model qwen3.6-35b-a3b --quantization fp8",
    "Qwen/Qwen3-32B-AWQ": "--model qwen3-32b --quantization int4",
    "Qwen/Qwen2.5-72B-Instruct-GPTQ-Int4": "--model qwen2.5-72b --quantization int4",
    "Qwen/Qwen2.5-72B-Instruct-GPTQ-Int8": "--model qwen2.5-72b --quantization int8",
    "Qwen/Qwen3.5-122B-A10B-GPTQ-Int4": "--model qwen3.5-122b-a10b --quantization int4",
    "cpatonn/Qwen3-30B-A3B-Instruct-2507-AWQ-4bit": "--model qwen3-30b-a3b-2507 --quantization int4",
    "Intel/Qwen3-30B-A3B-Instruct-2507-int4-AutoRound": "--model qwen3-30b-a3b-2507 --quantization int4",
    "RedHatAI/Qwen3-30B-A3B-quantized.w4a16": "--model qwen3-30b-a3b --quantization int4",
    "RedHatAI/Llama-3.3-70B-Instruct-FP8-dynamic": "--model llama-3.3-70b --quantization fp8",
    "RedHatAI/DeepSeek-R1-Distill-Llama-70B-FP8-dynamic": "--model llama-3.3-70b --quantization fp8",
    "RedHatAI/Mistral-Small-3.2-24B-Instruct-2506-NVFP4": "--model mistral-small-3.2-24b --quantization nvfp4",
    "hugging-quants/Meta-Llama-3.1-70B-Instruct-AWQ-INT4": "--model llama-3.1-70b --quantization int4",
    "casperhansen/llama-3.3-70b-instruct-awq": "--model llama-3.3-70b --quantization int4",
    "nvidia/Llama-3.1-8B-Instruct-FP8": "--model llama-3.1-8b --quantization fp8",
    "nvidia/Llama-3.1-8B-Instruct-FP4": "--model llama-3.1-8b --quantization nvfp4",
    "nvidia/Llama-3.3-70B-Instruct-FP4": "--model llama-3.3-70b --quantization nvfp4",
    "nvidia/Llama-3.1-405B-Instruct-FP4": "--model llama-3.1-405b --quantization nvfp4",
    "nvidia/Llama-4-Scout-17B-16E-Instruct-FP4": "--model llama-4-scout --quantization nvfp4",
    "nvidia/Qwen3-8B-FP4": "--model qwen3-8b --quantization nvfp4",
    "nvidia/Qwen3-14B-FP8": "--model qwen3-14b --quantization fp8",
    "nvidia/Qwen3-30B-A3B-NVFP4": "--model qwen3-30b-a3b --quantization nvfp4",
    "nvidia/Qwen3-235B-A22B-FP4": "--model qwen3-235b-a22b --quantization nvfp4",
    "nvidia/Qwen2.5-VL-7B-Instruct-FP4": "--model qwen2.5-vl-7b --quantization nvfp4",
    "nvidia/Phi-4-reasoning-plus-FP8": "--model phi-4-reasoning --quantization fp8",
    "nvidia/Gemma-4-31B-IT-NVFP4": "--model gemma-4-31b --quantization nvfp4",
    "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-FP8": "--model nemotron-3-nano-30b-a3b --quantization fp8",
    "nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-FP8": "--model nemotron-3-super-120b-a12b --quantization fp8",
    "zai-org/GLM-4.5-Air-FP8": "--model glm-4.5-air --quantization fp8",
    "unsloth/Llama-3.3-70B-Instruct-bnb-4bit": "--model llama-3.3-70b --quantization int4",
    "unsloth/Llama-3.3-70B-Instruct": "--model llama-3.3-70b",
    "NousResearch/Meta-Llama-3.1-8B-Instruct": "--model llama-3.1-8b",
    "ggml-org/gpt-oss-120b-GGUF": "--model gpt-oss-120b --engine llama-cpp",
    "ggml-org/gpt-oss-20b-GGUF": "--model gpt-oss-20b --engine llama-cpp",
    "unsloth/gpt-oss-120b-GGUF": "--model gpt-oss-120b --engine llama-cpp",
    "unsloth/Qwen3-30B-A3B-Instruct-2507-GGUF": "--model qwen3-30b-a3b-2507 --engine llama-cpp --quantization q4_k_m",
    "unsloth/Qwen3-Coder-30B-A3B-Instruct-GGUF:Q8_0": "--model qwen3-coder-30b-a3b --engine llama-cpp --quantization q8_0",
    "ggml-org/Qwen3-Coder-30B-A3B-Instruct-Q8_0-GGUF": "--model qwen3-coder-30b-a3b --engine llama-cpp --quantization q8_0",
    "unsloth/Qwen3-Coder-Next-GGUF": "--model qwen3-coder-next --engine llama-cpp --quantization q4_k_m",
    "unsloth/DeepSeek-R1-Distill-Llama-70B-GGUF": "--model llama-3.3-70b --engine llama-cpp --quantization q4_k_m",
    "unsloth/Nemotron-3-Nano-30B-A3B-GGUF": "--model nemotron-3-nano-30b-a3b --engine llama-cpp --quantization q4_k_m",
    "bartowski/Meta-Llama-3.1-8B-Instruct-GGUF:Q6_K": "--model llama-3.1-8b --engine llama-cpp --quantization q6_k",
    "bartowski/Qwen_Qwen3-32B-GGUF": "--model qwen3-32b --engine llama-cpp --quantization q4_k_m",
    "google/gemma-3-27b-it-qat-q4_0-gguf": "--model gemma-3-27b --engine llama-cpp --quantization q4_0",
    "lmstudio-community/GLM-4.7-Flash-GGUF": "--model glm-4.7-flash --engine llama-cpp --quantization q4_k_m",
}
"""Copies of such repositories by others or in another format, and the flags that are meant."""


@pytest.mark.parametrize("name", KNOWN)
def test_a_repository_of_a_known_configuration_is_that_model(name: str) -> None:
    assert load_model(name).name == KNOWN[name]
    assert known_model(name)


@pytest.mark.parametrize("name", MEANT)
def test_a_copy_is_refused_with_flags_that_work(name: str) -> None:
    with pytest.raises(ConfigError, match="it looks like ") as refused:
        load_model(name)
    flags = str(refused.value).partition("it looks like ")[2]
    assert re.match(rf"{re.escape(MEANT[name])}(,|$)", flags)
    words = shlex.split(MEANT[name])
    said = dict(zip(words[::2], words[1::2], strict=True))
    assert said["--model"] in model_names()
    if "--quantization" in said:
        check_readable(load_weight_format(said["--quantization"]), said.get("--engine", "vllm"), proposed=())


@pytest.mark.parametrize("name", ["Qwen/Qwen3-30B-A3B-Instruct-2507-FP8", "ggml-org/gpt-oss-120b-GGUF", "unsloth/Qwen3-8B-GGUF"])
def test_what_is_proposed_gives_an_answer(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["budget", "--model", name])
    flags = capsys.readouterr().err.partition("it looks like ")[2].partition(",")[0].split()
    main(["budget", *flags])
    assert "KV" in capsys.readouterr().out


def test_the_dated_and_the_coder_versions_have_their_own_context() -> None:
    for name, longer in (
        ("qwen3-30b-a3b", "qwen3-30b-a3b-2507"),
        ("qwen3-30b-a3b", "qwen3-coder-30b-a3b"),
        ("qwen3-4b", "qwen3-4b-2507"),
    ):
        base, dated = load_model(name), load_model(longer)
        assert (base.max_context, dated.max_context) == (40_960, 262_144)
        for field in ("layer_groups", "params_total", "params_active", "native_format", "tied_embeddings"):
            assert getattr(base, field) == getattr(dated, field)


@pytest.mark.parametrize("name", ["Qwen/Qwen3-31B-FP8", "acme/Llama-3.3-Monster-70B-GGUF", "acme/gpt-oss-120c", "-fp8", "Q4_K_M"])
def test_no_architecture_is_guessed_from_a_similar_name(name: str) -> None:
    with pytest.raises(ConfigError, match="unknown model") as refused:
        load_model(name)
    assert "it looks like" not in str(refused.value)
    assert quantized_repository(name) is None


@pytest.mark.parametrize("name", model_names())
def test_every_repository_of_the_catalogue_is_found_by_the_names_of_its_copies(name: str) -> None:
    model = load_model(name)
    for repository in (model.hf_id, *model.aliases):
        base = read_repository_name(repository).model
        for copy, weight_format in (
            (f"acme/{base}-FP8-dynamic", "fp8"),
            (f"{base}-NVFP4", "nvfp4"),
            (f"acme/{base}-GGUF:Q8_0", "q8_0"),
        ):
            if not known_model(copy):
                assert quantized_repository(copy) == (name, weight_format)


def test_a_file_goes_before_a_repository_without_its_owner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_model("Llama-3.3-70B-Instruct").name == "llama-3.3-70b"
    (tmp_path / "Llama-3.3-70B-Instruct").write_text("{}", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"Llama-3\.3-70B-Instruct"):
        load_model("Llama-3.3-70B-Instruct")
