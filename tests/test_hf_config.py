"""Files of real repositories, bad files, and mutated ones."""

import copy
import csv
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pagedkv.catalogue import load_model, model_names
from pagedkv.errors import ConfigError
from pagedkv.hf_config import model_from_config
from pagedkv.hf_family import family_of
from pagedkv.hf_fields import ConfigFields
from pagedkv.model_spec import ModelSpec

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "max_position_embeddings": 4096,
    "attention_dropout": 0.0,
    "use_cache": True,
    "torch_dtype": "bfloat16",
}
MIXTURE: dict[str, Any] = {
    "architectures": ["Qwen3_5MoeForConditionalGeneration"],
    "image_token_index": 9,
    "text_config": {
        **{key: LLAMA[key] for key in ("hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size")},
        "head_dim": 64,
        "num_hidden_layers": 8,
        "max_position_embeddings": 4096,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 32,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 8,
        "linear_value_head_dim": 32,
        "mamba_ssm_dtype": "float32",
        "moe_intermediate_size": 128,
        "num_experts": 16,
        "num_experts_per_tok": 2,
        "shared_expert_intermediate_size": 128,
        "dtype": "bfloat16",
    },
}
LATENT: dict[str, Any] = {
    "model_type": "deepseek_v32",
    **{key: LLAMA[key] for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")},
    "max_position_embeddings": 4096,
    "kv_lora_rank": 64,
    "q_lora_rank": 96,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "index_head_dim": 128,
    "index_n_heads": 4,
    "index_topk": 256,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}
WINDOWED: dict[str, Any] = {
    **LLAMA,
    "architectures": ["GptOssForCausalLM"],
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 128,
    "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]},
}
SHIPPED = {"llama": LLAMA, "mixture": MIXTURE, "latent": LATENT, "windowed": WINDOWED}


def parse(config: dict[str, Any]) -> ModelSpec:
    return model_from_config(config, name="m", title="M", source="a test")


def real_configs(folder: Path) -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


# What real files say


def test_all_real_files_are_understood_and_agree_with_the_catalogue(shared_data: Path) -> None:
    files = sorted((shared_data / "hf_configs").glob("*.json"))
    assert len(files) == 16
    for path in files:
        model = load_model(str(path))
        repository = path.name.removesuffix("_config.json").replace("--", "/")
        known = load_model(repository.replace("nvidia/Qwen3.6-35B-A3B-NVFP4", "Qwen/Qwen3.6-35B-A3B"))
        for field in ModelSpec.__dataclass_fields__:
            if field not in ("name", "title", "hf_id", "source", "aliases", "native_format"):
                assert getattr(model, field) == getattr(known, field), (repository, field)
        assert model.name == str(path)
        if not repository.endswith("NVFP4"):
            assert model.native_format == known.native_format


NOT_WITHIN_A_PERCENT = {
    ("deepseek-v3.2", "kv"): "with index keys",
    ("deepseek-v3.2", "active"): "input table and indexers",
    ("deepseek-v3", "active"): "input table",
    ("deepseek-r1", "active"): "input table",
    ("kimi-k2", "active"): "input table",
    ("nemotron-3-nano-30b-a3b", "active"): "input table",
    ("nemotron-3-super-120b-a12b", "active"): "input table",
    ("qwen3.5-35b-a3b", "active"): "nominal",
    ("qwen3.5-122b-a10b", "active"): "nominal",
    ("gemma-4-26b-a4b", "total"): "nominal",
    ("gemma-4-26b-a4b", "active"): "nominal",
    ("llama-4-scout", "total"): "with its vision tower",
    ("llama-4-scout", "active"): "nominal",
    ("mistral-large-2411", "context"): "128k in its model card",
}
"""Where the published table differs: docs/models.md says which figure is right, and why."""


def test_every_row_of_the_published_table_agrees_or_is_explained(shared_data: Path) -> None:
    with (shared_data / "models.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 59
    differing = set()
    for row in rows:
        model = load_model(row["hf_id"])
        kv = model.kv_spec("bf16")
        parts = list(zip(model.layer_groups, kv.group_bytes_per_token, strict=True))
        assert sum(size for group, size in parts if group.window) == int(row["swa_bytes_per_token_bf16_capped"]), model.name
        assert kv.state_bytes_per_sequence == int(row["per_seq_state_bytes"] or 0), model.name
        shape = (model.num_layers, model.hidden_size, model.num_attention_heads, model.vocab_size, int(model.tied_embeddings))
        assert shape == tuple(int(row[column]) for column in ("layers", "hidden", "heads", "vocab", "tied_embeddings")), model.name
        figures = {
            "kv": (sum(size for group, size in parts if not group.window), row["kv_bytes_per_token_bf16"]),
            "total": (model.params_total, row["params_total"]),
            "active": (model.params_active, row["params_active"]),
            "context": (model.max_context, row["max_ctx"]),
        }
        differing |= {
            (model.name, what) for what, (ours, theirs) in figures.items() if abs(ours - int(theirs)) > 0.01 * int(theirs)
        }
    assert differing == set(NOT_WITHIN_A_PERCENT)


@pytest.mark.parametrize(
    ("name", "total", "experts"),
    [
        ("llama-2-7b", 6_738_415_616, 0),
        ("llama-3.1-405b", 405_853_388_800, 0),
        ("llama-4-maverick", 400_711_848_960, 386_547_056_640),
        ("llama-4-scout", 107_769_861_120, 96_636_764_160),
        ("mistral-nemo-12b", 12_247_782_400, 0),
        ("mixtral-8x22b", 140_620_634_112, 135_291_469_824),
        ("qwen2.5-0.5b", 494_032_768, 0),
        ("qwen3-0.6b", 596_049_920, 0),
        ("qwen3-235b-a22b", 235_093_634_560, 227_096_395_776),
        ("qwen3-next-80b-a3b", 79_674_391_296, 77_309_411_328),
        ("qwen3.5-27b", 26_895_998_464, 0),
        ("qwen3.5-397b-a17b", 396_346_350_336, 386_547_056_640),
        ("gemma-2-9b", 9_241_705_984, 0),
        ("gemma-3-1b", 999_885_952, 0),
        ("gemma-3-27b", 27_009_002_240, 0),
        ("gemma-4-26b-a4b", 25_233_141_760, 22_837_985_280),
        ("gemma-4-31b", 30_697_345_280, 0),
        ("gemma-4-e4b", 7_463_013_376, 0),
        ("gpt-oss-120b", 116_829_156_672, 114_701_598_720),
        ("phi-4-mini", 3_836_021_760, 0),
        ("opt-66b", 65_719_701_504, 0),
        ("deepseek-v3", 671_026_404_352, 653_908_770_816),
        ("deepseek-v3.2", 671_877_929_216, 653_908_770_816),
        ("deepseek-v4-flash", 284_332_230_231, 277_025_390_592),
        ("deepseek-v4-pro", 1_572_997_179_491, 1_547_396_186_112),
        ("kimi-k2", 1_026_408_209_408, 1_014_686_023_680),
        ("glm-4.5-air", 106_852_245_504, 99_656_663_040),
        ("glm-4.7-flash", 29_943_390_976, 27_783_069_696),
        ("glm-5", 743_911_199_232, 724_775_731_200),
        ("glm-5.3", 743_377_000_704, 724_775_731_200),
        ("minimax-m2.7", 228_689_748_992, 224_680_476_672),
        ("nemotron-3-nano-30b-a3b", 31_577_937_344, 29_374_808_064),
        ("nemotron-3-ultra-550b-a55b", 549_308_968_960, 515_396_075_520),
    ],
)
def test_parameters_are_those_of_the_modules(name: str, total: int, experts: int) -> None:
    """Source: parameters of the language model's modules in transformers 5.24, built from the same config.json."""
    model = load_model(name)
    assert (model.params_total, model.expert_params) == (total, experts)


def test_searched_blocks_have_their_own_heads_and_widths() -> None:
    model = load_model("nvidia/Llama-3_3-Nemotron-Super-49B-v1")
    assert model.params_total == pytest.approx(49.87e9, rel=1e-3)
    assert [(g.num_layers, g.num_kv_heads) for g in model.layer_groups] == [(49, 8)]


def test_layers_are_told_apart() -> None:
    flash = {(g.kind, g.num_layers, g.compression, g.index_topk) for g in load_model("deepseek-v4-flash").layer_groups}
    assert flash == {("sliding_window", 43, 1, None), ("full", 21, 4, 512), ("full", 20, 128, None)}
    glm = [(g.num_layers, g.index_key_dim, g.index_topk) for g in load_model("glm-5.3").layer_groups]
    assert glm == [(21, 128, 2048), (57, 0, 2048)], "three of four layers take the selection of another"
    assert [(g.kind, g.num_layers, g.window) for g in load_model("llama-4-scout").layer_groups] == [
        ("full", 12, None),
        ("chunked", 36, 8192),
    ]
    assert [(g.num_layers, g.num_sharing_layers) for g in load_model("gemma-4-e4b").layer_groups] == [(4, 3), (20, 15)]


# Layouts, field by field


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


# Quantized checkpoints


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


# Files


def test_a_file_or_its_folder_is_a_model(tmp_path: Path) -> None:
    folder = tmp_path / "my-llama"
    folder.mkdir()
    path = folder / "config.json"
    path.write_text(json.dumps(LLAMA), encoding="utf-8")
    model = load_model(str(path))
    assert (model.name, model.title, model.source) == (str(path), "my-llama", str(path))
    assert load_model(str(folder)).layer_groups == model.layer_groups
    assert load_model(model.name) == model, "its name can be given to --model again"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{'hidden_size': 8}", r"is not JSON: .*line 1 column 2"),
        ("", r"is not JSON"),
        ("[1, 2]", r"holds \[1, 2\]: needs an object"),
        ("[" * 100_000, r"is not JSON"),
        ('{"hidden_size": ' + "9" * 5000 + "}", r"is not JSON"),
        ("{}", r"architectures and model_type are missing: needs one of .*LlamaForCausalLM"),
        ('{"text_config": 5, "model_type": "llama"}', r"text_config is 5: needs an object"),
        ('{"architectures": "LlamaForCausalLM"}', r"architectures is 'LlamaForCausalLM': needs a list"),
        ("\x00\x01", r"is not JSON"),
    ],
)
def test_a_file_that_describes_no_model_says_why(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message) as caught:
        load_model(str(path))
    assert str(path) in str(caught.value)


def test_files_that_cannot_be_read_say_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*missing\.json"):
        load_model(str(tmp_path / "missing.json"))
    with pytest.raises(ConfigError, match=r"the folder .* has no config\.json"):
        load_model(str(tmp_path))
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"cannot read"):
        load_model(str(tmp_path / "config.json"))
    (tmp_path / "config.json").write_bytes(b" " * (2**24 + 1))
    with pytest.raises(ConfigError, match=r"is larger than"):
        load_model(str(tmp_path / "config.json"))
    for name in ("a" * 5000, "nul\0byte", "", "no/such/repository"):
        with pytest.raises(ConfigError, match="unknown model"):
            load_model(name)


# Fields


@pytest.mark.parametrize(
    ("base", "change", "message"),
    [
        (LLAMA, {"hidden_size": ...}, r"m, config\.json: hidden_size is missing: needs a whole number from 1"),
        (LLAMA, {"num_hidden_layers": -3}, r"num_hidden_layers is -3: needs a whole number from 1 to 10,000"),
        (LLAMA, {"num_hidden_layers": 0}, r"num_hidden_layers is 0"),
        (LLAMA, {"num_hidden_layers": 10**9}, r"num_hidden_layers is 1000000000"),
        (LLAMA, {"hidden_size": 512.0}, r"hidden_size is 512\.0: needs a whole number"),
        (LLAMA, {"hidden_size": True}, r"hidden_size is True"),
        (LLAMA, {"hidden_size": "512"}, r"hidden_size is '512'"),
        (LLAMA, {"hidden_size": 10**40}, r"hidden_size is 1000\S*0000: needs a whole number"),
        (LLAMA, {"hidden_size": 10**9, "intermediate_size": 10**9}, r"parameters, more than 1e\+15"),
        (LLAMA, {"vocab_size": None}, r"vocab_size is missing"),
        (LLAMA, {"max_position_embeddings": ...}, r"max_position_embeddings is missing"),
        (LLAMA, {"num_key_value_heads": 3}, r"num_attention_heads is 8: needs a multiple of the 3 num_key_value_heads"),
        (LLAMA, {"num_attention_heads": 7, "num_key_value_heads": 7}, r"hidden_size of 512 does not divide into 7 parts"),
        (LLAMA, {"tie_word_embeddings": 1}, r"tie_word_embeddings is 1: needs true or false"),
        (LLAMA, {"torch_dtype": "int3"}, r"torch_dtype is 'int3': needs bfloat16"),
        (LLAMA, {"architectures": ["MambaForCausalLM"]}, r"\['MambaForCausalLM'\], which is not supported: needs one"),
        (LLAMA, {"architectures": ..., "model_type": "rwkv7"}, r"model_type is 'rwkv7', which is not supported: .*llama"),
        (LLAMA, {"layer_types": ["full_attention"]}, r"layer_types has 1 entries: needs one for each of 4 layers"),
        (LLAMA, {"layer_types": ["lightning"] * 4}, r"layer_types has 'lightning': needs one of full_attention"),
        (LLAMA, {"layer_types": ["sliding_attention"] * 4}, r"sliding_window is missing: 4 layers need it"),
        (LLAMA, {"sliding_window": -1}, r"sliding_window is -1"),
        (LLAMA, {"attn_type_list": [1, 0, 1, 0]}, r"attn_type_list .*only 1, full attention"),
        (LLAMA, {"quantization_config": {"quant_method": "quip"}}, r"quantization_config: quant_method is 'quip': .*awq"),
        (LLAMA, {"quantization_config": {"quant_method": "awq"}}, r"bits or w_bit is missing"),
        (LLAMA, {"quantization_config": []}, r"quantization_config is \[\]: needs an object"),
        (LLAMA, {"attention_chunk_size": 512}, r"no_rope_layer_interval is missing"),
        (LLAMA, {"num_kv_shared_layers": 4}, r"num_kv_shared_layers is 4: needs a whole number from 0 to 3"),
        (MIXTURE, {"num_experts_per_tok": 17}, r"text_config: num_experts_per_tok is 17: needs a whole number from 1 to 16"),
        (MIXTURE, {"linear_num_value_heads": ...}, r"text_config: linear_num_value_heads is missing"),
        (MIXTURE, {"mamba_ssm_dtype": "int8"}, r"mamba_ssm_dtype .* is 'int8'"),
        (LATENT, {"q_lora_rank": None}, r"q_lora_rank is missing: the indexer"),
        (LATENT, {"qk_head_dim": 7}, r"qk_head_dim is 7, but qk_nope_head_dim \+ qk_rope_head_dim is 48"),
        (LATENT, {"sliding_window": 64}, r"kv_lora_rank does not go with sliding_window layers"),
        (LATENT, {"indexer_types": ["full"] * 3}, r"indexer_types has 3 entries"),
        (LATENT, {"index_topk_pattern": "FSSF"}, r"index_topk_pattern is not understood"),
        (WINDOWED, {"sliding_window": None}, r"sliding_window is missing: 2 layers need it"),
    ],
)
def test_a_bad_field_is_named_with_what_it_needs(base: dict[str, Any], change: dict[str, Any], message: str) -> None:
    config = copy.deepcopy(base)
    inner = config.get("text_config", config)
    inner.update(change)
    for key in [key for key, value in inner.items() if value is ...]:
        del inner[key]
    with pytest.raises(ConfigError, match=message):
        parse(config)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("kv_compression", 4),
        ("swa_num_key_value_heads", 8),
        ("attn_output_gate", True),
        ("sparse_attention_config", {"sparse_block_size": 128}),
        ("linear_attn_config", {"num_heads": 8}),
        ("index_topk", 2048),
        ("index_topk_freq", 4),
        ("indexer_types", ["full"] * 4),
        ("mamba_num_heads", 8),
        ("conv_kernel", 4),
        ("attention_sink_size", 4),
        ("v_head_dim", 128),
        ("qk_rope_head_dim", 64),
        ("cross_attention_layers", [3]),
        ("compress_ratios", [4, 4, 4, 4]),
        ("latent_size", 8),
        ("cache_every_n_layers", 2),
        ("num_memory_blocks", 2),
    ],
)
def test_a_field_about_attention_that_is_not_understood_is_named(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"{name} is .*: a field about attention that is not understood"):
        parse({**LLAMA, name: value})
    nested = {**MIXTURE, "text_config": {**MIXTURE["text_config"], f"new_{name}": value}}
    with pytest.raises(ConfigError, match=rf"text_config: new_{name} is"):
        parse(nested)
    parse({**LLAMA, name: None})
    parse({**LLAMA, name: False})


@pytest.mark.parametrize(
    "name", ["attention_dropout", "attn_implementation", "final_logit_softcapping", "rope_theta", "hidden_act", "head_token_id"]
)
def test_fields_about_other_things_are_not_in_the_way(name: str) -> None:
    assert parse({**LLAMA, name: 0.5}) == parse(LLAMA)


def test_every_catalogue_model_is_of_a_family() -> None:
    assert len(model_names()) >= 45
    for model_type in ("llama", "qwen3_5_text", "gemma4", "deepseek_v4", "nemotron_h"):
        assert model_type in family_of(ConfigFields({"model_type": model_type}, where="a test")).model_types


# Mutations

JUNK: tuple[Callable[[random.Random], object], ...] = (
    lambda rng: None,
    lambda rng: rng.choice([0, -1, -(10**9), 10**9, 2**63, 10**60]),
    lambda rng: rng.choice([0.0, -0.5, 2.5, 1e308, math.inf, math.nan]),
    lambda rng: rng.choice([True, False]),
    lambda rng: rng.choice(["", "x", "full_attention", "fp8", "∞" * 500, "bfloat16"]),
    lambda rng: rng.choice([[], [[]], [None], [1] * 70, ["full_attention"] * 4, [{}], [-1]]),
    lambda rng: rng.choice([{}, {"x": {"y": []}}, {"weights": 4}, {"quant_method": "awq", "bits": 4}]),
    lambda rng: rng.randint(1, 300),
)
NEW_KEYS = ("sliding_window", "kv_lora_rank", "index_topk", "layer_types", "num_experts", "text_config", "block_configs")


def mutate(node: Any, rng: random.Random) -> None:
    """Change one place somewhere in a tree of objects and lists."""
    while True:
        inner = [value for value in (node.values() if isinstance(node, dict) else node) if isinstance(value, dict | list) and value]
        if not inner or rng.random() < 0.6:
            break
        node = rng.choice(inner)
    if isinstance(node, list):
        place: Any = rng.randrange(len(node))
        change = rng.choice(["junk", "drop", "repeat"])
        if change == "repeat":
            node.append(node[place])
            return
    else:
        place = rng.choice([*node, rng.choice(NEW_KEYS)])
        change = rng.choice(["junk", "junk", "drop", "swap", "rename"]) if place in node else "junk"
    if change == "junk":
        node[place] = rng.choice(JUNK)(rng)
    elif change == "drop":
        del node[place]
    elif change == "swap":
        other = rng.choice(list(node))
        node[place], node[other] = node[other], node[place]
    else:
        node[f"{place}_{rng.randrange(10)}"] = node.pop(place)


def check_sane(model: ModelSpec) -> None:
    kv = model.kv_spec("auto")
    positive = (
        model.num_layers,
        model.params_total,
        model.params_active,
        model.flops_per_token,
        model.weight_bytes(model.native_format),
        kv.sequence_bytes(1000),
        kv.bytes_read(1000),
        model.max_context,
    )
    assert all(math.isfinite(figure) and figure > 0 for figure in positive), positive
    assert math.isfinite(model.attention_flops_per_pair)
    assert 0 < model.params_active <= model.params_total
    assert model.linear_params >= 0
    assert kv.block_bytes(16) >= kv.bytes_per_token >= 0
    assert 0 < model.native_format.bits_per_weight <= 32


@pytest.fixture(scope="module")
def fuzz_configs() -> list[dict[str, Any]]:
    """The real files where they lie beside the checkout; small ones of four kinds otherwise."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data" / "hf_configs"
    return [*SHIPPED.values(), *real_configs(folder).values()]


def outcome(attempt: Callable[[], ModelSpec]) -> str | None:
    """Return why there is no model, None if there is a sane one; any other error fails the test."""
    try:
        check_sane(attempt())
    except ConfigError as error:
        return str(error)
    return None


def test_ten_thousand_mutated_files_give_a_model_or_a_reason(fuzz_configs: list[dict[str, Any]]) -> None:
    reasons = []
    for seed in range(10_000):
        rng = random.Random(seed)
        config = copy.deepcopy(fuzz_configs[seed % len(fuzz_configs)])
        for _ in range(rng.randint(1, 3)):
            if config:
                mutate(config, rng)
        reasons.append(outcome(lambda config=config: parse(config)))  # type: ignore[misc]
    refused = [reason for reason in reasons if reason is not None]
    assert all(reason.startswith("m, config.json") and len(reason) < 1500 for reason in refused)
    assert 2000 < len(refused) < 9000, "mutations neither always break a file nor never do"


def test_mutated_bytes_give_a_model_or_a_reason(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    texts = [json.dumps(config).encode() for config in SHIPPED.values()]
    for seed in range(600):
        rng = random.Random(seed)
        text = bytearray(texts[seed % len(texts)])
        for _ in range(rng.randint(1, 3)):
            text[rng.randrange(len(text))] = rng.choice(b'0-9.{}[]",:\x00\xff enu')
        path.write_bytes(text[: rng.choice([len(text), rng.randrange(len(text))])])
        assert str(path) in (outcome(lambda: load_model(str(path))) or str(path))
