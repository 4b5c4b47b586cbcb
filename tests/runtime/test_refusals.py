"""What cannot be served is refused before anything is computed, with what works."""

from typing import Any

import pytest

from pagedkv.errors import ConfigError

torch = pytest.importorskip("torch", reason="the runtime needs torch")
pytest.importorskip("pagedkv.runtime")
transformers = pytest.importorskip("transformers", reason="the runtime's models are transformers'")

from tiny_models import COMMON, SLIDING_AND_FULL, build, generate, paged, prompts, ties

from pagedkv.runtime import PagedCache, use_paged_attention
from pagedkv.runtime.model_layers import model_layers


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("DeepseekV3Config", {}, "latent attention"),
        ("MambaConfig", {}, "linear_attention|no attention|mamba"),
        ("Qwen3NextConfig", {}, "linear_attention"),
        ("BartConfig", {}, "encoder"),
        ("Llama4TextConfig", {}, "chunked_attention"),
        ("Gemma3Config", {}, "ForCausalLM"),
        ("Gemma3TextConfig", {"use_bidirectional_attention": True}, "both directions"),
        ("FalconConfig", {"alibi": True}, "biases"),
        ("LlamaConfig", {"head_dim": 2}, "or more work here"),
    ],
)
def test_models_that_cache_something_else_are_refused(name: str, options: dict[str, Any], message: str) -> None:
    config = getattr(transformers, name)(**options)
    with pytest.raises(ConfigError, match=message):
        model_layers(config)


def test_a_model_with_attention_of_its_own_is_refused_and_stays_as_it_was() -> None:
    config = transformers.BloomConfig(vocab_size=50, hidden_size=32, n_layer=1, n_head=2)
    model = transformers.BloomForCausalLM(config)
    before = model.config._attn_implementation
    with pytest.raises(ConfigError, match="such as Llama"):
        use_paged_attention(model)
    assert model.config._attn_implementation == before


def test_windows_are_the_configurations() -> None:
    config = transformers.Gemma3TextConfig(**COMMON, sliding_window=9, layer_types=SLIDING_AND_FULL)
    assert [layer.window for layer in model_layers(config)] == [9, 9, 9, None]
    assert {layer.window for layer in model_layers(transformers.MistralConfig(**COMMON, sliding_window=7))} == {7}


def call(model: Any, cache: PagedCache | None, **options: Any) -> Any:
    with torch.no_grad():
        return model(**(prompts(2, longest=6) | options), past_key_values=cache)


def test_misuse_says_what_works() -> None:
    model = build("llama")
    cache = PagedCache(model, num_blocks=20)
    with pytest.raises(ConfigError, match="use_paged_attention"):
        call(model, cache)
    use_paged_attention(model)
    with pytest.raises(ConfigError, match="PagedCache"):
        call(model, None)
    for given in (cache, None):  # gradient checkpointing takes the cache away
        with pytest.raises(ConfigError, match="no_grad"):
            model(**prompts(2, longest=6), past_key_values=given)
    with pytest.raises(ConfigError, match="attention mask"):
        call(model, cache, attention_mask=torch.ones(2, 2, 6, 6))
    with pytest.raises(ConfigError, match="attention mask"):
        call(model, cache, attention_mask=torch.ones(2, 5))
    assert cache.num_blocks_held == 0
    call(model, cache)
    with pytest.raises(ConfigError, match="for a cache of 2 sequences"):
        call(model, cache, **prompts(3, longest=12))
    with pytest.raises(ConfigError, match="what it was in the first 6"):
        call(model, cache, attention_mask=torch.ones(2, 12))
    with pytest.raises(ConfigError, match=r"reset\(\) it for another batch"):
        call(model, cache)
    with pytest.raises(ConfigError, match="0 to -6"):
        cache.crop(-7)
    cache.reset()
    assert cache.num_blocks_held == cache.get_seq_length() == 0
    call(model, cache)


def test_a_prompt_beyond_the_pool_and_one_beyond_max_model_len_are_told_apart() -> None:
    model = build("llama")
    use_paged_attention(model)
    inputs = prompts(1, longest=30)
    with pytest.raises(ConfigError, match="num_blocks=9 "):
        call(model, PagedCache(model, num_blocks=4, block_size=4), **inputs)
    with pytest.raises(ConfigError, match="max_model_len 20"):
        call(model, PagedCache(model, num_blocks=9, block_size=4, max_model_len=20), **inputs)


def test_a_model_of_windows_alone_goes_beyond_its_pool() -> None:
    config = transformers.MistralConfig(**COMMON, sliding_window=9)
    torch.manual_seed(0)
    model = transformers.MistralForCausalLM(config).eval()
    model.set_attn_implementation("eager")
    inputs = prompts(2, longest=6)
    expected = generate(model, inputs, steps=60)
    cache = PagedCache(model, num_blocks=10, block_size=4)
    ties(expected, paged(model, inputs, cache, steps=60))
    assert cache.get_seq_length() > 9 * 4


def test_other_masks_and_settings_are_refused() -> None:
    model = build("gemma3")
    with pytest.raises(ConfigError, match="unknown allocator"):
        PagedCache(model, num_blocks=20, allocator="radix")
    use_paged_attention(model)
    model.model.layers[0].self_attn.sliding_window = 5
    with pytest.raises(ConfigError, match="layer 0 attends to a window of 5, and its cache keeps a window of 9"):
        call(model, PagedCache(model, num_blocks=60))
    with pytest.raises(ConfigError, match="holds 0 blocks"):
        PagedCache(model, budget_bytes=100)
    with pytest.raises(ConfigError, match="max-model-len is 0"):
        PagedCache(model, num_blocks=20, max_model_len=0)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("DiffLlama", {}, "attends twice"),
        ("JetMoe", {"kv_channels": 16, "num_local_experts": 4, "num_experts_per_tok": 2}, "changes keys after"),
        ("MiMoV2Flash", {"n_routed_experts": 4, "v_head_dim": 32}, "values of 2 of 32; its cache was made for 2 heads of 16"),
        ("Llama", {"sliding_window": 9}, "layer 0 attends to all tokens, and its cache keeps a window of 9"),
    ],
)
def test_what_a_configuration_does_not_say_is_found_out_in_the_first_pass(name: str, options: dict[str, Any], message: str) -> None:
    config = getattr(transformers, f"{name}Config")(**COMMON | options)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    use_paged_attention(model)
    with pytest.raises(ConfigError, match=message):
        call(model, PagedCache(model, num_blocks=40))


@pytest.mark.parametrize(
    ("made_for", "message"),
    [
        ("gemma3", "attends to all tokens, and its cache keeps a window of 9"),
        ({"num_key_value_heads": 4}, "keys of 2 heads of 16 .* made for 4 heads of 16"),
        ({"head_dim": 32}, "keys of 2 heads of 16 .* made for 2 heads of 32"),
        ({"num_hidden_layers": 2}, "layer 2 of a model, in a cache made for 2 layers"),
    ],
)
def test_the_cache_of_another_model_is_refused(made_for: str | dict[str, int], message: str) -> None:
    model, config = build("llama"), transformers.LlamaConfig
    other = build(made_for) if isinstance(made_for, str) else transformers.LlamaForCausalLM(config(**COMMON | made_for))
    use_paged_attention(model)
    use_paged_attention(other)
    with pytest.raises(ConfigError, match=f"{message}.* of this very model"):
        call(model, PagedCache(other, num_blocks=60))


def test_a_layer_that_attends_past_the_cache_is_found_out_at_the_next_token() -> None:
    model = build("llama")
    use_paged_attention(model)
    cache, new = PagedCache(model, num_blocks=20), torch.ones(1, 2, 3, 16)
    cache.update(new, new, 0)
    with pytest.raises(ConfigError, match="layer 0 attends in code of its own"):
        cache.update(new, new, 0)
    cache.reset()
    call(model, cache)


def test_a_sequence_may_be_all_padding() -> None:
    model = build("llama")
    use_paged_attention(model)
    inputs = prompts(3, longest=6)
    inputs["attention_mask"][0] = 0
    cache = PagedCache(model, num_blocks=20)
    logits = call(model, cache, **inputs).logits
    assert torch.isfinite(logits).all()
    assert cache.allocator.num_slots_held(cache.sequences.requests[0]) == 0
