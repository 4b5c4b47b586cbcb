"""Groups of layers with pages of one size: against lines that vLLM logs for real models, and laws for any model."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedkv.catalogue import load_model, model_names
from pagedkv.errors import ConfigError
from pagedkv.kv_spec import KVCacheSpec, LayerGroup
from pagedkv.layer_groups import LayerGroupPlan, plan_layer_groups


def attention(kind: Any = "full", num_layers: int = 4, heads: int = 2, window: int | None = None, **more: Any) -> LayerGroup:
    return LayerGroup(kind=kind, num_layers=num_layers, num_kv_heads=heads, key_dim=64, value_dim=64, window=window, **more)


def state(num_layers: int, state_bytes: int) -> LayerGroup:
    return LayerGroup(kind="state", num_layers=num_layers, state_bytes=state_bytes)


def plan_of(model: str, kv_cache_dtype: str = "auto") -> LayerGroupPlan:
    return plan_layer_groups(load_model(model).layer_groups, block_size=16, kv_cache_dtype=kv_cache_dtype)


def summary(plan: LayerGroupPlan) -> list[tuple[str, int, int]]:
    return [(group.kind, group.num_layers, group.block_size) for group in plan.groups]


def test_one_kind_is_one_group_however_its_layers_differ() -> None:
    """MLA layers with an indexer and without keep the same tokens: one table, and a page that holds both kinds of layers."""
    for model in ("llama-3.1-8b", "deepseek-v3", "glm-5.3"):
        plan, spec = plan_of(model), load_model(model)
        assert summary(plan) == [("full", spec.num_layers, 16)]
        assert plan.wasted_share == 0
        assert plan.page_bytes == math.ceil(sum(spec.kv_spec("auto").group_bytes_per_token) * 16)


def test_gpt_oss_is_two_groups_without_waste() -> None:
    plan = plan_of("gpt-oss-20b")
    assert summary(plan) == [("full", 12, 16), ("sliding_window", 12, 16)]
    assert (plan.page_bytes, plan.layers_per_group, plan.wasted_share) == (12 * 16 * 8 * 128 * 2, 12, 0.0)


def test_gemma_3_is_filled_up_to_its_rarest_kind() -> None:
    """10 full and 52 window layers: groups of 10, the windows' as even as they get, 8 layers of 70 for nothing."""
    plan = plan_of("gemma-3-27b")
    assert [(group.kind, group.num_layers) for group in plan.groups] == [
        ("full", 10),
        *[("sliding_window", 9)] * 4,
        *[("sliding_window", 8)] * 2,
    ]
    layer_page = 16 * 16 * 256 * 2
    assert (plan.page_bytes, plan.padding_layer_bytes, plan.inflation_bytes) == (10 * layer_page, 8 * layer_page, 0)
    assert plan.wasted_share == pytest.approx(8 / 70)


def test_almost_equal_kinds_are_one_group_each() -> None:
    """12 windows and 13 full layers (a model with a drafter) become 13 and 13; at 1.5 times as many, groups of the fewer."""
    plan = plan_layer_groups([attention(num_layers=13), attention("chunked", 12, window=8)], block_size=4)
    assert (plan.layers_per_group, [group.num_layers for group in plan.groups]) == (13, [13, 12])
    plan = plan_layer_groups([attention(num_layers=4), attention("chunked", 6, window=8)], block_size=4)
    assert (plan.layers_per_group, [group.num_layers for group in plan.groups]) == (4, [4, 3, 3])


@pytest.mark.parametrize(
    ("model", "block_size", "padding_percent"),
    [
        # vLLM's logs: "Setting attention block size to 784 tokens ...", "Padding mamba page size by 0.13% ..."
        ("qwen3.5-27b", 784, 0.13),
        ("qwen3-next-80b-a3b", 544, 1.49),
    ],
)
def test_the_attention_block_grows_until_its_page_holds_a_state(model: str, block_size: int, padding_percent: float) -> None:
    plan, state_bytes = plan_of(model), load_model(model).layer_groups[1].state_bytes
    assert {group.block_size for group in plan.groups} == {block_size}
    states = [group for group in plan.groups if group.kind == "state"]
    assert len(states) == 3
    for group in states:
        assert group.inflation_bytes / (group.num_layers * state_bytes) * 100 == pytest.approx(padding_percent, abs=0.005)
    assert all(group.inflation_bytes == 0 for group in plan.groups if group.kind == "full")


def test_a_pool_has_the_tokens_and_the_concurrency_that_vllm_logs() -> None:
    """Qwen3-Next-80B, tensor-parallel-size 2, vLLM 0.10.2, "Available KV cache memory: 44.59 GiB".

    "GPU KV cache size: 973,760 tokens" and "Maximum concurrency for 262,144 tokens per request: 14.77x".
    """
    layers = load_model("qwen3-next-80b-a3b").kv_spec("auto").per_rank(2).groups
    plan = plan_layer_groups(layers, block_size=16)
    num_blocks = int(44.59 * 2**30) // plan.page_bytes
    assert num_blocks // len(plan.groups) * plan.block_size == 973_760
    rules = plan.rules(max_model_len=262_144, enable_caching=False)
    assert round(num_blocks / sum(rule.peak_blocks(262_144, 8192) for rule in rules), 2) == 14.77


def test_the_blocks_that_a_request_holds_are_those_that_vllm_logs() -> None:
    """Two logs that say tokens and concurrency, from which the blocks of a request follow.

    Gemma 3 4B at 3,072 tokens: "Add 1 padding layers", "GPU KV cache size: 317,136 tokens", "Maximum concurrency ...: 102.78x"
    (kvcached issue 215). vLLM's figure has a block more for each of the six windowed groups, where a request is too short for it.
    Qwen3.5 27B at 32,768 tokens, vLLM 0.19: "290,864 tokens", "33.04x" (vLLM issue 40691).
    """
    for model, longest, batched, logged_tokens, concurrency, more in (
        ("gemma-3-4b", 3_072, 8_192, 317_136, 102.78, 6),
        ("qwen3.5-27b", 32_768, 16_384, 290_864, 33.04, 0),
    ):
        plan = plan_of(model)
        rules = plan.rules(max_model_len=longest, enable_caching=False)
        blocks = sum(rule.peak_blocks(longest, batched) for rule in rules) + more
        least = logged_tokens // plan.block_size * len(plan.groups)  # the log rounds down to whole blocks in all groups
        assert least / blocks - 0.005 <= concurrency <= (least + len(plan.groups) - 1) / blocks + 0.005


def test_smaller_elements_need_longer_blocks_for_the_same_state() -> None:
    assert plan_of("qwen3.5-27b", "fp8").block_size == 1568


def test_a_smaller_page_takes_longer_blocks_if_it_divides_the_larger() -> None:
    """Gemma 4: a token of a full layer takes half the bytes of a window layer's, or twice; vLLM doubles the other's block."""
    assert {(group.kind, group.block_size) for group in plan_of("gemma-4-26b-a4b").groups} == {
        ("full", 32),
        ("sliding_window", 16),
    }
    assert {(group.kind, group.block_size) for group in plan_of("gemma-4-e4b").groups} == {("full", 16), ("sliding_window", 32)}
    plan = plan_layer_groups([attention(heads=3), attention("sliding_window", heads=2, window=8)], block_size=4)
    full, window = plan.groups
    assert (full.block_size, full.inflation_bytes, window.block_size) == (4, 0, 4)
    assert window.inflation_bytes == plan.page_bytes // 3


def test_layers_that_read_the_cache_of_others_have_no_page() -> None:
    sharing = load_model("gemma-4-e4b").layer_groups
    assert sum(group.num_sharing_layers for group in sharing) == 18
    assert sum(group.num_layers for group in plan_of("gemma-4-e4b").groups) == 24


def test_a_layer_with_tokens_and_a_state_is_in_two_groups() -> None:
    plan = plan_layer_groups([attention(num_layers=3, compression=8, state_bytes=100)], block_size=4)
    assert summary(plan) == [("full", 3, 8), ("state", 3, 8)]  # blocks hold whole entries


def test_states_are_kept_per_request_or_per_boundary() -> None:
    plan = plan_of("qwen3-next-80b-a3b")
    assert {rule.block_size for rule in plan.rules(max_model_len=4096, enable_caching=True)} == {544}
    assert [rule.block_size for rule in plan.rules(max_model_len=4096, enable_caching=False)] == [544, 4096, 4096, 4096]


@pytest.mark.parametrize("model", model_names())
def test_all_groups_of_a_model_have_the_same_page(model: str) -> None:
    for rank in (1, 2):
        layers = load_model(model).kv_spec("auto").per_rank(rank).groups
        check(plan_layer_groups(layers, block_size=16), layers, 16)


LAYERS = st.one_of(
    st.builds(
        attention, st.sampled_from(["full", "mla"]), st.integers(1, 60), st.integers(1, 9), compression=st.sampled_from([1, 4])
    ),
    st.builds(attention, st.sampled_from(["sliding_window", "chunked"]), st.integers(1, 60), st.integers(1, 9), st.integers(1, 99)),
    st.builds(state, st.integers(1, 60), st.integers(1, 5_000_000)),
)


@given(layers=st.lists(LAYERS, min_size=1, max_size=4), block_size=st.sampled_from([1, 16, 24]))
def test_all_groups_of_any_model_have_the_same_page(layers: list[LayerGroup], block_size: int) -> None:
    check(plan_layer_groups(layers, block_size=block_size), layers, block_size)


def check(plan: LayerGroupPlan, layers: Any, block_size: int) -> None:
    """Every cache has its place in one group, every page the same bytes, and what is not used is told."""
    assert len({group.page_bytes for group in plan.groups}) == 1
    assert max(group.num_layers for group in plan.groups) <= plan.layers_per_group
    assert all(group.block_size % block_size == 0 for group in plan.groups)
    caches = sum(layer.num_layers * ((layer.kind != "state") + (layer.state_bytes > 0)) for layer in layers)
    assert sum(group.num_layers for group in plan.groups) == caches
    assert all(min(group.used_bytes, group.padding_layer_bytes + 1, group.inflation_bytes + 1) > 0 for group in plan.groups)
    assert 0 <= plan.wasted_share < 1
    stored = sum(group.used_bytes for group in plan.groups if group.kind == "state")
    assert stored == sum(layer.num_layers * layer.state_bytes for layer in layers)
    per_token = sum(group.used_bytes / group.block_size for group in plan.groups if group.kind != "state")
    expected = sum(KVCacheSpec(groups=tuple(layers), dtype_name="auto").group_bytes_per_token)
    assert per_token == pytest.approx(expected, rel=0.01)


def test_what_cannot_be_planned_is_refused() -> None:
    with pytest.raises(ConfigError, match="0 kinds of caches"):
        plan_layer_groups([], block_size=16)
    with pytest.raises(ConfigError, match="block size 0"):
        plan_layer_groups([attention()], block_size=0)
    with pytest.raises(ConfigError, match="kv-cache-dtype"):
        plan_layer_groups([attention()], block_size=16, kv_cache_dtype="fp7")
