import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedkv.catalogue import load_model, model_names
from pagedkv.errors import ConfigError
from pagedkv.kv_spec import KV_CACHE_DTYPES, LayerGroup
from pagedkv.model_spec import ModelSpec
from pagedkv.weight_format import WEIGHT_FORMATS, load_weight_format

MODELS = [load_model(name) for name in model_names()]
BF16 = load_weight_format("bf16")


def llama_params(model: ModelSpec, *, intermediate: int, qkv_bias: bool = False) -> dict[str, int]:
    (group,) = model.layer_groups
    hidden, layers = model.hidden_size, model.num_layers
    q, kv = model.num_attention_heads * group.key_dim, group.num_kv_heads * group.key_dim
    linear = layers * (2 * hidden * q + 2 * hidden * kv + 3 * hidden * intermediate)
    wide = (2 * layers + 1) * hidden + (layers * (q + 2 * kv) if qkv_bias else 0)
    embedding = model.vocab_size * hidden
    return {"linear": linear, "wide": wide, "embedding": embedding, "head": embedding, "experts": 0}


def opt_params(model: ModelSpec) -> dict[str, int]:
    hidden, layers = model.hidden_size, model.num_layers
    table, positions = model.vocab_size * hidden, (model.max_context + 2) * hidden
    biases_and_norms = layers * (4 + 4 + 1 + 4) * hidden + 2 * hidden
    linear = layers * 12 * hidden**2
    return {"linear": linear, "wide": biases_and_norms, "embedding": table + positions, "head": table, "experts": 0}


def gpt_oss_params(model: ModelSpec, *, intermediate: int) -> dict[str, int]:
    hidden, layers, experts = model.hidden_size, model.num_layers, model.num_experts
    group = model.layer_groups[0]
    q, kv = model.num_attention_heads * group.key_dim, group.num_kv_heads * group.key_dim
    per_expert = 2 * intermediate * (hidden + 1) + hidden * (intermediate + 1)
    router, sinks, norms, biases = experts * (hidden + 1), model.num_attention_heads, 2 * hidden, q + 2 * kv + hidden
    return {
        "linear": layers * (2 * hidden * q + 2 * hidden * kv),
        "wide": layers * (router + sinks + norms + biases) + hidden,
        "embedding": model.vocab_size * hidden,
        "head": model.vocab_size * hidden,
        "experts": layers * experts * per_expert,
    }


RECOUNTED = {
    "llama-2-7b": llama_params(load_model("llama-2-7b"), intermediate=11_008),
    "llama-3.1-8b": llama_params(load_model("llama-3.1-8b"), intermediate=14_336),
    "llama-3.1-70b": llama_params(load_model("llama-3.1-70b"), intermediate=28_672),
    "qwen2.5-7b": llama_params(load_model("qwen2.5-7b"), intermediate=18_944, qkv_bias=True),
    "opt-13b": opt_params(load_model("opt-13b")),
    "opt-175b": opt_params(load_model("opt-175b")),
    "gpt-oss-20b": gpt_oss_params(load_model("gpt-oss-20b"), intermediate=2880),
}


@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.name)
def test_parameters_are_those_of_the_architecture(model: ModelSpec) -> None:
    parts = RECOUNTED[model.name]
    assert model.linear_params == parts["linear"]
    assert model.wide_params == parts["wide"]
    assert model.embedding_params == parts["embedding"]
    assert model.head_params == parts["head"]
    assert model.expert_params == parts["experts"]
    assert model.params_total == sum(parts.values()) - (parts["head"] if model.tied_embeddings else 0)
    idle = parts["experts"] * (1 - model.experts_per_token / model.num_experts) if model.num_experts else 0
    assert model.params_active == model.params_total - idle


@pytest.mark.parametrize(
    ("name", "published_params"),
    [
        ("llama-2-7b", 6.74e9),
        ("llama-3.1-8b", 8.03e9),
        ("llama-3.1-70b", 70.6e9),
        ("opt-13b", 12.85e9),
        ("opt-175b", 175e9),
        ("qwen2.5-7b", 7.62e9),
        ("gpt-oss-20b", 20.91e9),
    ],
)
def test_parameters_are_within_a_percent_of_the_published(name: str, published_params: float) -> None:
    assert load_model(name).params_total == pytest.approx(published_params, rel=0.01)


@pytest.mark.parametrize(
    ("name", "bytes_per_token"),
    [
        ("llama-2-7b", 524_288),
        ("llama-3.1-8b", 131_072),
        ("llama-3.1-70b", 327_680),
        ("opt-13b", 819_200),
        ("opt-175b", 4_718_592),
        ("qwen2.5-7b", 57_344),
        ("gpt-oss-20b", 24_576 + 24_576),
    ],
)
def test_kv_bytes_per_token(name: str, bytes_per_token: int) -> None:
    spec = load_model(name).kv_spec("bf16")
    assert spec.bytes_per_token == bytes_per_token
    assert spec.block_bytes(16) == 16 * bytes_per_token
    assert load_model(name).kv_spec("fp8").bytes_per_token * 2 == bytes_per_token


def test_slots_of_the_paged_attention_paper() -> None:
    gib = 2**30
    assert 12 * gib // load_model("opt-13b").kv_spec("fp16").bytes_per_token == 15_728
    assert 264 * gib // load_model("opt-175b").kv_spec("fp16").bytes_per_token == 60_074


def test_qwen_blocks_of_the_vllm_log() -> None:
    blocks = 16 * 2**30 // load_model("Qwen/Qwen2.5-7B").kv_spec("auto").block_bytes(16)
    assert (blocks, blocks * 16) == (18_724, 299_584)


def test_a_sliding_window_caps_what_is_read() -> None:
    model = load_model("gpt-oss-20b")
    full, sliding = model.layer_groups
    assert (full.num_layers, sliding.num_layers, sliding.window) == (12, 12, 128)
    assert [sliding.tokens_read(n) for n in (1, 128, 129, 10_000)] == [1, 128, 128, 128]
    assert full.tokens_read(10_000) == 10_000
    spec = model.kv_spec("auto")
    assert spec.bytes_read(100) == 100 * 49_152
    assert spec.bytes_read(10_000) == 10_000 * 24_576 + 128 * 24_576


@given(
    kind=st.sampled_from(["full", "sliding_window"]),
    sizes=st.tuples(*[st.integers(1, 512)] * 4),
    block_size=st.integers(1, 256),
    dtype=st.sampled_from(sorted(KV_CACHE_DTYPES)),
)
def test_a_block_holds_its_tokens_exactly(kind: Any, sizes: tuple[int, ...], block_size: int, dtype: str) -> None:
    layers, heads, key_dim, value_dim = sizes
    group = LayerGroup(
        kind=kind,
        num_layers=layers,
        num_kv_heads=heads,
        key_dim=key_dim,
        value_dim=value_dim,
        window=8 if kind == "sliding_window" else None,
    )
    spec = replace(MODELS[0], num_layers=layers, layer_groups=(group,)).kv_spec(dtype)
    assert spec.bytes_per_token == layers * heads * (key_dim + value_dim) * KV_CACHE_DTYPES[dtype]
    assert spec.block_bytes(block_size) == block_size * spec.bytes_per_token


@pytest.mark.parametrize(
    ("name", "fmt", "gigabytes"),
    [
        ("llama-3.1-8b", "bf16", 16.060522496),  # the run on an RTX 4090: 16.06 GB
        ("opt-13b", "fp16", 25.7),  # PagedAttention paper, table 1: 26 GB
        ("gpt-oss-20b", "mxfp4", 13.75),  # 12.8 GiB in its model card
        ("llama-3.1-70b", "nvfp4", 38.50 + 2.10 * 2),  # dgx-spark-playbooks PR 91: 38.50 GB of layers, 2.10 GB of head
    ],
)
def test_weight_bytes_of_published_checkpoints(name: str, fmt: str, gigabytes: float) -> None:
    assert load_model(name).weight_bytes(load_weight_format(fmt)) / 1e9 == pytest.approx(gigabytes, rel=2e-3)


@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.name)
def test_sixteen_bits_take_two_bytes_per_parameter(model: ModelSpec) -> None:
    assert model.weight_bytes(BF16) == 2 * model.params_total
    assert model.weight_bytes(load_weight_format("fp32")) == 4 * model.params_total


@pytest.mark.parametrize("model", MODELS, ids=lambda m: m.name)
def test_narrower_formats_take_less_but_keep_embeddings_wide(model: ModelSpec) -> None:
    sizes = [model.weight_bytes(load_weight_format(name)) for name in ("bf16", "fp8", "nvfp4", "int4")]
    assert sizes == sorted(sizes, reverse=True)
    wide = model.params_total - model.linear_params - model.expert_params
    assert sizes[1] == 2 * wide + model.linear_params + model.expert_params


@given(model=st.sampled_from(MODELS), fmt=st.sampled_from(sorted(WEIGHT_FORMATS)), tokens=st.integers(1, 10_000))
def test_a_step_reads_all_but_input_tables_and_untouched_experts(model: ModelSpec, fmt: str, tokens: int) -> None:
    weight_format = load_weight_format(fmt)
    read = model.streamed_weight_bytes(weight_format, tokens)
    resident = model.weight_bytes(weight_format)
    tables = model.embedding_params - (model.head_params if model.tied_embeddings else 0)
    untouched = 0.0
    if model.num_experts:
        untouched = model.expert_bytes(weight_format) * (1 - model.experts_per_token / model.num_experts) ** tokens
    assert read == pytest.approx(resident - tables * weight_format.wide_bits / 8 - untouched, rel=1e-9)
    assert model.streamed_weight_bytes(weight_format, tokens + 0.5) >= read


def test_one_token_of_a_mixture_reads_its_experts_only() -> None:
    model = load_model("gpt-oss-20b")
    fmt = model.native_format
    dense, experts = model.dense_streamed_bytes(fmt), model.expert_bytes(fmt)
    assert fmt.name == "mxfp4"
    assert model.streamed_weight_bytes(fmt, 1) == pytest.approx(dense + experts * 4 / 32)
    assert model.streamed_weight_bytes(fmt, 2) == pytest.approx(dense + experts * (1 - (28 / 32) ** 2))
    assert dense == 2 * (model.params_total - model.expert_params - model.embedding_params)
    assert experts == model.expert_params * 4.25 / 8


def test_arithmetic_of_a_token() -> None:
    llama = load_model("llama-3.1-8b")
    assert llama.flops_per_token == 2 * (8_030_261_248 - 525_336_576)
    assert llama.attention_flops_per_pair == 4 * 32 * 32 * 128
    opt = load_model("opt-13b")
    assert opt.flops_per_token == 2 * (opt.params_total - 2050 * 5120), "a tied head multiplies, learned positions do not"
    mixture = load_model("gpt-oss-20b")
    assert mixture.flops_per_token == pytest.approx(2 * 3.6e9, rel=0.01), "3.6 B active in its model card"
    assert mixture.group_attention_flops_per_pair == (4 * 12 * 64 * 64,) * 2


def test_models_agree_with_real_config_files(shared_data: Path) -> None:
    for repository in ("meta-llama/Meta-Llama-3.1-8B", "meta-llama/Meta-Llama-3.1-70B", "openai/gpt-oss-20b"):
        path = shared_data / "hf_configs" / f"{repository.replace('/', '--')}_config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        model = load_model(repository)
        assert model.hidden_size == config["hidden_size"]
        assert model.num_layers == config["num_hidden_layers"]
        assert model.num_attention_heads == config["num_attention_heads"]
        assert model.vocab_size == config["vocab_size"]
        assert model.max_context == config["max_position_embeddings"]
        assert model.tied_embeddings == config["tie_word_embeddings"]
        assert model.num_experts == config.get("num_local_experts", 0)
        head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        layer_types = config.get("layer_types") or ["full_attention"] * config["num_hidden_layers"]
        for group in model.layer_groups:
            name = "sliding_attention" if group.kind == "sliding_window" else "full_attention"
            assert group.num_layers == layer_types.count(name)
            assert group.num_kv_heads == config["num_key_value_heads"]
            assert group.key_dim == group.value_dim == head_dim
            assert group.window == (config["sliding_window"] if group.kind == "sliding_window" else None)


def test_weight_formats_answer_to_the_names_of_vllm() -> None:
    assert load_weight_format("AWQ").name == "int4"
    assert load_weight_format("modelopt_fp4").bits_per_weight == 4.5
    assert load_weight_format("bfloat16") is BF16
    assert 4.15 <= load_weight_format("gptq").bits_per_weight <= 4.25
    with pytest.raises(ConfigError, match=r"unknown --quantization 'nvpf4'.*nvfp4"):
        load_weight_format("nvpf4")
    assert all(fmt.source for fmt in WEIGHT_FORMATS.values())


def test_formats_state_the_bits_of_their_scales() -> None:
    bits = {name: fmt.bits_per_weight for name, fmt in WEIGHT_FORMATS.items()}
    assert bits["nvfp4"] == 4 + 8 / 16
    assert bits["mxfp4"] == 4 + 8 / 32
    assert bits["int4"] == pytest.approx(4 + (16 + 4) / 128, abs=0.01)
    assert list(bits.values()) == sorted(bits.values(), reverse=True)


def test_an_unknown_kv_cache_dtype_brings_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"unknown --kv-cache-dtype 'fp8_e4m2'.*fp8_e4m3"):
        MODELS[0].kv_spec("fp8_e4m2")


@pytest.mark.parametrize("change", [{"window": 0}, {"num_kv_heads": 0}, {"kind": "full"}, {"window": None}])
def test_impossible_layer_groups_are_refused(change: dict[str, Any]) -> None:
    group = load_model("gpt-oss-20b").layer_groups[1]
    with pytest.raises(ConfigError):
        replace(group, **change)


@given(tokens=st.integers(1, 200))
def test_the_touched_share_of_experts_is_that_of_random_routing(tokens: int) -> None:
    share = load_model("gpt-oss-20b").expert_share(tokens)
    subsets_without_one_expert = math.comb(31, 4) / math.comb(32, 4)
    assert share == pytest.approx(1 - subsets_without_one_expert**tokens)
