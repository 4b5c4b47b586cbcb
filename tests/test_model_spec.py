import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedkv.catalogue import load_model, model_names
from pagedkv.errors import ConfigError
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
    "gpt-oss-120b": gpt_oss_params(load_model("gpt-oss-120b"), intermediate=2880),
}


@pytest.mark.parametrize("name", RECOUNTED)
def test_parameters_are_those_of_the_architecture(name: str) -> None:
    model, parts = load_model(name), RECOUNTED[name]
    assert model.linear_params == parts["linear"]
    assert model.wide_params == parts["wide"]
    assert model.embedding_params == parts["embedding"]
    assert model.head_params == parts["head"]
    assert model.expert_params == parts["experts"]
    assert model.params_total == sum(parts.values()) - (parts["head"] if model.tied_embeddings else 0)
    idle = parts["experts"] * (1 - model.experts_per_token / model.num_experts) if model.num_experts else 0
    assert model.params_active == model.params_total - idle


def test_slots_of_the_paged_attention_paper() -> None:
    gib = 2**30
    assert 12 * gib // load_model("opt-13b").kv_spec("fp16").bytes_per_token == 15_728
    assert 264 * gib // load_model("opt-175b").kv_spec("fp16").bytes_per_token == 60_074


def test_qwen_blocks_of_the_vllm_log() -> None:
    blocks = 16 * 2**30 // load_model("Qwen/Qwen2.5-7B").kv_spec("auto").block_bytes(16)
    assert (blocks, blocks * 16) == (18_724, 299_584)


@pytest.mark.parametrize(
    ("name", "fmt", "gigabytes"),
    [
        ("llama-3.1-8b", "bf16", 16.060522496),  # the run on an RTX 4090: 16.06 GB
        ("opt-13b", "fp16", 25.7),  # PagedAttention paper, table 1: 26 GB
        ("gpt-oss-20b", "mxfp4", 13.75),  # 12.8 GiB in its model card
        ("gpt-oss-120b", "mxfp4", 65.25),  # 60.8 GiB in its model card
        ("qwen2.5-7b", "q8_0", 8.10),  # Qwen2.5-7B-Instruct-Q8_0.gguf
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
    assert sizes == sorted(set(sizes), reverse=True)
    wide = model.params_total - model.linear_params - model.expert_params
    assert sizes[1] == 2 * wide + model.linear_params + model.expert_params


@given(model=st.sampled_from(MODELS), fmt=st.sampled_from(sorted(WEIGHT_FORMATS)), tokens=st.integers(1, 10_000))
def test_a_step_reads_all_but_input_tables_and_untouched_experts(model: ModelSpec, fmt: str, tokens: int) -> None:
    weight_format = load_weight_format(fmt)
    read = model.streamed_weight_bytes(weight_format, tokens)
    resident = model.weight_bytes(weight_format)
    tables = model.embedding_params - (model.head_params if model.tied_embeddings else 0)
    table_bits = weight_format.embedding_bits or weight_format.wide_bits
    untouched = 0.0
    if model.num_experts:
        untouched = model.expert_bytes(weight_format) * (1 - model.experts_per_token / model.num_experts) ** tokens
    assert read == pytest.approx(resident - tables * table_bits / 8 - untouched, rel=1e-9, abs=1.0)  # a whole number of bytes
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
    assert bits["int4+bf16"] == 4 + 16 / 32
    assert bits["mxfp8"] == 8 + 8 / 32
    assert (bits["q8_0"], bits["q6_k"], bits["q4_0"]) == (34 * 8 / 32, 210 * 8 / 256, 18 * 8 / 32)
    assert (bits["q5_k_m"], bits["q4_k_m"]) == (5.7, 4.85)
    assert list(bits.values()) == sorted(bits.values(), reverse=True)


@given(tokens=st.integers(1, 200))
def test_the_touched_share_of_experts_is_that_of_random_routing(tokens: int) -> None:
    share = load_model("gpt-oss-20b").expert_share(tokens)
    subsets_without_one_expert = math.comb(31, 4) / math.comb(32, 4)
    assert share == pytest.approx(1 - subsets_without_one_expert**tokens)


def test_formats_say_what_each_part_takes() -> None:
    mixture, dense = load_model("qwen3-30b-a3b"), load_model("qwen3-8b")
    split = load_weight_format("nvfp4+fp8")
    assert mixture.expert_bytes(split) == mixture.expert_params * 4.5 / 8
    assert mixture.dense_streamed_bytes(split) == mixture.linear_params + 2 * (mixture.head_params + mixture.wide_params)
    assert dense.dense_streamed_bytes(split) == dense.linear_params * 4.5 / 8 + 2 * (dense.head_params + dense.wide_params)
    gguf = load_weight_format("q8_0")
    assert dense.embedding_bytes(gguf) == dense.embedding_params * 8.5 / 8
    assert dense.weight_bytes(gguf) == math.ceil((dense.params_total - dense.wide_params) * 8.5 / 8 + 4 * dense.wide_params)


def test_attention_is_counted_where_it_happens() -> None:
    shared = load_model("gemma-4-e4b")
    assert [group.num_layers + group.num_sharing_layers for group in shared.layer_groups] == [7, 35]
    assert shared.group_attention_flops_per_pair == (2 * 7 * 8 * 1024, 2 * 35 * 8 * 512)
    latent = load_model("deepseek-v3")
    assert latent.attention_flops_per_pair == 2 * 61 * 128 * (192 + 128)
    compressed = load_model("deepseek-v4-flash")
    sparse, heavy, window = compressed.group_attention_flops_per_pair
    assert (sparse, heavy, window) == (2 * 21 * 64 * 1024 / 4, 2 * 20 * 64 * 1024 / 128, 2 * 43 * 64 * 1024)
    assert load_model("qwen3.5-27b").group_attention_flops_per_pair[1] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"params_total": 10}, "params_total 10 of qwen3-30b-a3b is less"),
        ({"num_layers": 47}, "layer_groups of qwen3-30b-a3b have more"),
        ({"num_experts": 0}, "contradict"),
        ({"experts_per_token": 129}, "contradict"),
    ],
)
def test_impossible_models_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(load_model("qwen3-30b-a3b"), **change)


def test_a_block_of_nemotron_h_is_half_a_layer() -> None:
    assert load_model("nemotron-3-nano-4b").whole_layers == 21
    assert load_model("nemotron-3-nano-4b").num_layers == 42
    assert load_model("llama-3.1-8b").whole_layers == load_model("llama-3.1-8b").num_layers == 32


def test_the_experts_of_a_token_are_part_of_its_operations() -> None:
    model = load_model("gpt-oss-20b")
    assert 0 < model.expert_flops_per_token < model.flops_per_token
    assert model.expert_flops_per_token * model.num_experts == 2 * model.expert_params * model.experts_per_token
    assert load_model("llama-3.1-8b").expert_flops_per_token == 0
