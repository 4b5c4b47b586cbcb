"""Layouts of layers, field by field, and quantized checkpoints."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hf_configs import LATENT, LLAMA, MIXTURE, WINDOWED, parse

from pagedkv.catalogue import load_model
from pagedkv.model_spec import ModelSpec


@pytest.mark.parametrize(
    ("base", "change", "layers"),
    [
        (LLAMA, {}, [("full", 4, None)]),
        (LLAMA, {"sliding_window": 512}, [("sliding_window", 4, 512)]),
        (LLAMA, {"sliding_window": 4096}, [("full", 4, None)]),  # never binds
        (LLAMA, {"sliding_window": 512, "use_sliding_window": False}, [("full", 4, None)]),
        (
            LLAMA,
            {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 512, "use_sliding_window": True, "max_window_layers": 3},
            [("full", 3, None), ("sliding_window", 1, 512)],
        ),
        (LLAMA, {"sliding_window": 512, "sliding_window_pattern": 2}, [("full", 2, None), ("sliding_window", 2, 512)]),
        (LLAMA, {"attention_chunk_size": 512, "no_rope_layers": [1, 1, 1, 0]}, [("full", 1, None), ("chunked", 3, 512)]),
        (LLAMA, {"attn_type_list": [1, 1, 1, 1]}, [("full", 4, None)]),
        (WINDOWED, {"layer_types": ["full_attention"] * 4}, [("full", 4, None)]),
        (MIXTURE, {}, [("full", 2, None), ("state", 6, None)]),
        (LATENT, {"index_topk_freq": 2, "index_skip_topk_offset": 2}, [("mla", 3, None), ("mla", 1, None)]),
        (LATENT, {"indexer_types": ["full", "shared", "shared", "shared"]}, [("mla", 1, None), ("mla", 3, None)]),
    ],
)
def test_layouts(base: dict[str, Any], change: dict[str, Any], layers: list[tuple[str, int, int | None]]) -> None:
    model = parse({**base, **change})
    assert [(g.kind, g.num_layers, g.window) for g in model.layer_groups] == layers


def test_a_nested_text_config_is_the_model() -> None:
    nested, flat = parse(MIXTURE), parse({**MIXTURE["text_config"], "model_type": "qwen3_5_moe_text"})
    assert nested == flat
    assert nested.tied_embeddings is False
    assert parse({**MIXTURE, "tie_word_embeddings": True}).params_total == nested.params_total - 512_000


def test_missing_heads_mean_one_per_query_head() -> None:
    config = {key: value for key, value in LLAMA.items() if key != "num_key_value_heads"}
    assert parse(config).layer_groups[0].num_kv_heads == 8


def quantized(config: dict[str, Any], **quantization: Any) -> ModelSpec:
    return parse({**config, "quantization_config": quantization})


@pytest.mark.parametrize(
    ("quantization", "name", "bits"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8", 8),
        ({"quant_method": "fbgemm_fp8"}, "fp8", 8),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, "int4", 4.16),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1}, "int8", 8),
        ({"quant_method": "gptq", "bits": 4, "group_size": 32}, "int4, groups of 32", 4 + 20 / 32),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head"]}, "nvfp4", 4.5),
        ({"quant_algo": "FP8"}, "fp8", 8),
        ({"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"num_bits": 8, "type": "float"}}}}, "fp8", 8),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"g": {"weights": {"num_bits": 4, "type": "float", "group_size": 16}}},
            },
            "nvfp4",
            4.5,
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"g": {"weights": {"num_bits": 4, "type": "int", "group_size": 128, "symmetric": True}}},
            },
            "int4, groups of 128",
            4 + 16 / 128,
        ),
    ],
)
def test_quantization_of_several_tools(quantization: dict[str, Any], name: str, bits: float) -> None:
    fmt = quantized(LLAMA, **quantization).native_format
    assert (fmt.name.removesuffix(", mixed"), fmt.bits_per_weight) == (name, bits)


def test_exempt_layers_count_at_16_bits() -> None:
    model = quantized(
        LLAMA, quant_method="modelopt", quant_algo="NVFP4", ignore=["lm_head", *(f"model.layers.{i}.self_attn*" for i in range(3))]
    )
    attention = 4 * (2 * 512 * 512 + 2 * 512 * 128)
    feed_forward = 4 * 3 * 512 * 1024
    wide = model.embedding_params + model.head_params + model.wide_params
    expected = (attention * (16 * 3 + 4.5) / 4 + feed_forward * 4.5 + wide * 16) / 8
    assert model.weight_bytes(model.native_format) == math.ceil(expected)


@pytest.mark.parametrize("names", [["re:.*self_attn.*"], ["*.self_attn.*"], ["model.layers.*.self_attn"], ["self_attn"]])
def test_a_pattern_without_a_layer_exempts_all(names: list[str]) -> None:
    model = quantized(LATENT, quant_method="modelopt", quant_algo="NVFP4", exclude_modules=names)
    assert model.native_format.dense_bits is not None
    assert 4.5 < model.native_format.dense_bits < 16
    assert model.native_format.bits_per_weight == 4.5


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.indexer.k_norm", "model.layers.9.self_attn", "lm_head", "gate"])
def test_norms_and_drafting_layers_exempt_nothing(name: str) -> None:
    assert quantized(LATENT, quant_method="modelopt", quant_algo="NVFP4", ignore=[name]).native_format.name == "nvfp4"


def test_a_mixture_of_formats_is_read_module_by_module(shared_data: Path) -> None:
    model = load_model(str(shared_data / "hf_configs" / "nvidia--Qwen3.6-35B-A3B-NVFP4_config.json"))
    fmt = model.native_format
    assert (fmt.bits_per_weight, fmt.head_bits, fmt.wide_bits, fmt.compute_dtype) == (4.5, 4.5, 16, "fp4")
    shared = 40 * 3 * 2048 * 512
    assert fmt.dense_bits == pytest.approx((8 * (model.linear_params - shared) + 4.5 * shared) / model.linear_params)
    assert model.weight_bytes(fmt) < model.weight_bytes(parse(MIXTURE).native_format) / 3


def test_mxfp4_leaves_attention_wide() -> None:
    assert parse(WINDOWED).native_format.name == "mxfp4"
    assert load_model("deepseek-v4-flash").native_format.name == "mxfp4+fp8"
    assert load_model("kimi-k2.5").native_format.name == "int4+bf16"


def test_modelopt_writes_its_format_beside_the_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA), encoding="utf-8")
    assert load_model(str(tmp_path)).native_format.name == "bf16"
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "NVFP4"}}), encoding="utf-8")
    assert load_model(str(tmp_path / "config.json")).native_format.name == "nvfp4"
