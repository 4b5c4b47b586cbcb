"""What layers cache: laws over the one description of layers, and exact figures of real models."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedkv.catalogue import load_model
from pagedkv.errors import ConfigError
from pagedkv.kv_spec import KV_CACHE_DTYPES, KVCacheSpec, LayerGroup, kv_element_bytes, kv_element_pair_bytes

FULL = LayerGroup(kind="full", num_layers=4, num_kv_heads=8, key_dim=64, value_dim=64)
SLIDING = replace(FULL, kind="sliding_window", window=128)
CHUNKED = replace(FULL, kind="chunked", window=128)
LATENT = LayerGroup(kind="mla", num_layers=61, num_kv_heads=1, key_dim=576, attention_dim=320)
STATE = LayerGroup(kind="state", num_layers=3, state_bytes=1000, state_heads=8)


def spec(*groups: LayerGroup, dtype: str = "bf16") -> KVCacheSpec:
    return KVCacheSpec(groups=groups, dtype_name=dtype)


@st.composite
def layer_groups(draw: st.DrawFn) -> LayerGroup:
    kind = draw(st.sampled_from(["full", "sliding_window", "chunked", "mla", "state"]))
    num_layers = draw(st.integers(1, 40))
    if kind == "state":
        return LayerGroup(kind=kind, num_layers=num_layers, state_bytes=draw(st.integers(1, 10**6)))
    index_key_dim = draw(st.sampled_from([0, 128]))
    return LayerGroup(
        kind=kind,
        num_layers=num_layers,
        num_kv_heads=draw(st.integers(1, 64)),
        key_dim=32 * draw(st.integers(1, 16)),
        value_dim=32 * draw(st.integers(0, 16)),
        window=draw(st.integers(1, 300)) if kind in ("sliding_window", "chunked") else None,
        compression=draw(st.sampled_from([1, 1, 4, 128])),
        index_key_dim=index_key_dim,
        index_topk=draw(st.sampled_from([None, 16])) if index_key_dim else None,
        state_bytes=draw(st.sampled_from([0, 64])),
    )


dtypes = st.sampled_from(sorted(KV_CACHE_DTYPES)) | st.builds(
    "{}/{}".format, st.sampled_from(sorted(KV_CACHE_DTYPES)), st.sampled_from(sorted(KV_CACHE_DTYPES))
)


@given(kind=st.sampled_from(["full", "sliding_window", "chunked"]), window=st.integers(1, 40), context=st.integers(1, 130))
def test_tokens_kept_are_those_that_the_newest_query_sees(kind: Any, window: int, context: int) -> None:
    query = context - 1
    sees = {
        "full": lambda key: True,
        "sliding_window": lambda key: query - key < window,
        "chunked": lambda key: key // window == query // window,
    }
    group = replace(FULL, kind=kind, window=None if kind == "full" else window)
    assert group.tokens_kept(context) == group.tokens_read(context) == sum(sees[kind](key) for key in range(context))
    assert group.tokens_kept(0) == 0


@given(groups=st.lists(layer_groups(), min_size=1, max_size=4), dtype=dtypes, block_size=st.integers(1, 300))
def test_a_block_holds_its_tokens(groups: list[LayerGroup], dtype: str, block_size: int) -> None:
    kv = spec(*groups, dtype=dtype)
    assert kv.bytes_per_token - 1 < sum(kv.group_bytes_per_token) <= kv.bytes_per_token
    assert 0 <= kv.block_bytes(block_size) - block_size * sum(kv.group_bytes_per_token) < 1
    assert len(kv.group_bytes_per_token) == len(groups)


@given(groups=st.lists(layer_groups(), min_size=1, max_size=4), dtype=dtypes, context=st.integers(0, 3000))
def test_a_sequence_takes_no_more_than_all_its_tokens(groups: list[LayerGroup], dtype: str, context: int) -> None:
    kv = spec(*groups, dtype=dtype)
    state = sum(group.num_layers * group.state_bytes for group in groups)
    assert kv.state_bytes_per_sequence == state
    whole = max(group.compression for group in groups)
    rounded = -(-context // whole) * whole
    assert state <= kv.sequence_bytes(context) <= sum(kv.group_bytes_per_token) * rounded + state + 1
    if all(group.window is None for group in groups):
        assert kv.sequence_bytes(rounded) == pytest.approx(sum(kv.group_bytes_per_token) * rounded + state, abs=1)
    if all(group.kind != "chunked" for group in groups):
        assert kv.sequence_bytes(context) <= kv.sequence_bytes(context + 1)
    assert kv.bytes_read(context) <= kv.sequence_bytes(context) + 1, "a step reads what is kept, if nobody shares it"


@given(groups=st.lists(layer_groups(), min_size=1, max_size=3), exponent=st.integers(0, 8), dtype=dtypes)
def test_ranks_hold_the_whole_cache_and_replicate_what_they_cannot_divide(
    groups: list[LayerGroup], exponent: int, dtype: str
) -> None:
    ranks = 2**exponent
    powers = [replace(g, num_kv_heads=1 << (g.num_kv_heads.bit_length() - 1) if g.num_kv_heads else 0) for g in groups]
    kv = spec(*powers, dtype=dtype)
    rank = kv.per_rank(ranks)
    assert rank.bytes_per_token == kv.kv_bytes_per_token(ranks) <= kv.bytes_per_token
    assert ranks * sum(rank.group_bytes_per_token) >= sum(kv.group_bytes_per_token) * (1 - 1e-12)
    if all(g.kind != "state" and g.num_kv_heads % ranks == 0 and not g.index_key_dim for g in powers):
        assert ranks * sum(rank.group_bytes_per_token) == pytest.approx(sum(kv.group_bytes_per_token))
    assert kv.per_rank(1) == kv


def test_heads_are_divided_then_replicated() -> None:
    assert [spec(FULL).kv_bytes_per_token(n) for n in (1, 2, 4, 8, 16, 64)] == [8192, 4096, 2048, 1024, 1024, 1024]
    assert spec(LATENT).kv_bytes_per_token(8) == spec(LATENT).bytes_per_token, "every rank has the latent whole"
    assert [spec(STATE).per_rank(n).state_bytes_per_sequence for n in (1, 2, 8, 16)] == [3000, 1500, 375, 375]
    with pytest.raises(ConfigError, match=r"tensor-parallel-size 3 does not divide 8 num_kv_heads: use 1, 2, 4, 8"):
        spec(FULL).per_rank(3)
    with pytest.raises(ConfigError, match="must be 1 or more"):
        spec(FULL).kv_bytes_per_token(0)


def test_minimax_on_two_ranks() -> None:
    kv = load_model("MiniMaxAI/MiniMax-M2").kv_spec("auto")
    assert kv.kv_bytes_per_token(2) == 126_976
    assert 196_608 * kv.kv_bytes_per_token(2) == 23.25 * 2**30


@pytest.mark.parametrize(
    ("name", "unbounded", "windowed", "state"),
    [
        ("llama-3.1-8b", 131_072, 0, 0),
        ("llama-3.1-70b", 327_680, 0, 0),
        ("llama-3.1-405b", 516_096, 0, 0),
        ("llama-2-7b", 524_288, 0, 0),
        ("llama-2-13b", 819_200, 0, 0),
        ("qwen3-8b", 147_456, 0, 0),
        ("qwen3-32b", 262_144, 0, 0),
        ("qwen3-30b-a3b", 98_304, 0, 0),
        ("qwen2.5-7b", 57_344, 0, 0),
        ("mixtral-8x7b", 131_072, 0, 0),
        ("gpt-oss-20b", 24_576, 24_576, 0),
        ("gpt-oss-120b", 36_864, 36_864, 0),
        ("gemma-3-27b", 81_920, 425_984, 0),
        ("deepseek-v3", 70_272, 0, 0),
        ("kimi-k2", 70_272, 0, 0),
        ("opt-13b", 819_200, 0, 0),
        ("opt-175b", 4_718_592, 0, 0),
        ("nemotron-3-nano-30b-a3b", 6_144, 0, 49_082_368),
        ("qwen3.5-27b", 65_536, 0, 153_944_064),
        ("qwen3.5-35b-a3b", 20_480, 0, 64_389_120),
    ],
)
def test_bytes_of_real_models(name: str, unbounded: int, windowed: int, state: int) -> None:
    """Source: KV bytes per token in bf16, computed from public config.json files."""
    model = load_model(name)
    kv = model.kv_spec("bf16")
    parts = list(zip(model.layer_groups, kv.group_bytes_per_token, strict=True))
    assert sum(size for group, size in parts if group.window is None) == unbounded
    assert sum(size for group, size in parts if group.window is not None) == windowed
    assert kv.bytes_per_token == unbounded + windowed
    assert kv.state_bytes_per_sequence == state
    assert model.kv_spec("fp8").bytes_per_token * 2 == kv.bytes_per_token


def test_a_window_caps_what_is_kept_and_read() -> None:
    kv = spec(FULL, SLIDING)
    assert kv.sequence_bytes(100) == kv.bytes_read(100) == 100 * kv.bytes_per_token
    assert kv.sequence_bytes(10_000) == kv.bytes_read(10_000) == (10_000 + 128) * 8192
    assert [CHUNKED.tokens_kept(n) for n in (1, 128, 129, 256, 257)] == [1, 128, 1, 128, 1]


def test_a_latent_is_key_and_value_at_once() -> None:
    assert spec(LATENT).bytes_per_token == 61 * 576 * 2
    assert spec(LATENT, dtype="q8_0/q4_0").bytes_per_token == 61 * 576 * 34 // 32, "stored once, as a key"
    assert LATENT.query_dim == 320
    assert replace(LATENT, attention_dim=0).query_dim == 2 * 576
    assert FULL.query_dim == 128


def test_an_indexer_adds_keys_and_saves_reads() -> None:
    indexed = replace(LATENT, index_key_dim=128, index_topk=2048)
    assert spec(indexed).bytes_per_token == 61 * (1152 + 132)
    assert spec(indexed, dtype="fp8").bytes_per_token == 61 * (576 + 132), "its keys are FP8 already"
    assert spec(indexed).bytes_read(100_000) == 61 * (2048 * 1152 + 100_000 * 132)
    assert spec(indexed).bytes_read(1000) == 1000 * spec(indexed).bytes_per_token


def test_compressed_entries_take_a_share_per_token() -> None:
    entries = replace(FULL, compression=4)
    assert spec(entries).bytes_per_token * 4 == spec(FULL).bytes_per_token
    assert [spec(entries).sequence_bytes(n) for n in (1, 4, 5)] == [8192, 8192, 16_384], "an entry under construction has its place"
    assert replace(entries, index_topk=16).tokens_read(1000) == 64


def test_layers_that_share_a_cache_read_it_without_storing() -> None:
    shared = replace(FULL, num_sharing_layers=4)
    assert spec(shared).sequence_bytes(1000) == spec(FULL).sequence_bytes(1000)
    assert spec(shared).bytes_read(1000) == 2 * spec(FULL).bytes_read(1000)


def test_a_state_costs_its_sequence_but_no_token() -> None:
    assert spec(FULL, STATE).bytes_per_token == spec(FULL).bytes_per_token
    assert spec(FULL, STATE).sequence_bytes(7) == 7 * 8192 + 3000
    assert spec(STATE).bytes_read(10**6) == 3000


@pytest.mark.parametrize(
    ("name", "bits"), [("f16", 16), ("q8_0", 8.5), ("q5_1", 6), ("q5_0", 5.5), ("q4_1", 5), ("q4_0", 4.5), ("fp8", 8), ("auto", 16)]
)
def test_element_types(name: str, bits: float) -> None:
    assert kv_element_bytes(name) * 8 == bits
    assert spec(FULL, dtype=name).bytes_per_token == spec(FULL, dtype=f"{name}/{name.upper()}").bytes_per_token == 512 * bits


def test_keys_and_values_may_differ() -> None:
    assert kv_element_pair_bytes("q8_0/q4_0") == (34 / 32, 18 / 32)
    assert spec(FULL, dtype="Q8_0/q4_0").bytes_per_element == 26 / 32
    half = replace(FULL, value_dim=32)
    assert spec(half, dtype="q8_0/q4_0").bytes_per_token == 4 * 8 * (64 * 34 + 32 * 18) / 32


@pytest.mark.parametrize("name", ["fp8_e4m2", "", "q8_0/", "/q4_0", "q8_0/q4_0/q4_0", "f16/fp9"])
def test_an_unknown_element_type_brings_the_nearest(name: str) -> None:
    with pytest.raises(ConfigError, match=r"unknown --kv-cache-dtype .* as in q8_0/q4_0"):
        load_model("qwen3-8b").kv_spec(name)


@pytest.mark.parametrize(
    ("group", "change"),
    [
        (FULL, {"kind": "sliding"}),
        (FULL, {"window": 8}),
        (FULL, {"num_layers": 0}),
        (FULL, {"num_kv_heads": 0}),
        (FULL, {"key_dim": 0}),
        (FULL, {"value_dim": -1}),
        (FULL, {"compression": 0}),
        (FULL, {"index_topk": 0}),
        (FULL, {"index_key_dim": -1}),
        (FULL, {"state_bytes": -1}),
        (SLIDING, {"window": None}),
        (SLIDING, {"window": 0}),
        (CHUNKED, {"window": None}),
        (STATE, {"state_bytes": 0}),
        (STATE, {"num_kv_heads": 8}),
        (STATE, {"state_heads": 0}),
    ],
)
def test_impossible_groups_are_refused(group: LayerGroup, change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        replace(group, **change)
