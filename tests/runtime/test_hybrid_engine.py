"""A model with linear attention in the engine: one state per row, through chunks, preemptions and rows that change hands."""

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the runtime needs torch")
pytest.importorskip("pagedkv.runtime")
transformers = pytest.importorskip("transformers", reason="the runtime's models are transformers'")

from tiny_models import COMMON, HYBRIDS, TIE, VOCAB, build, draft_of, generate

from pagedkv.errors import ConfigError
from pagedkv.runtime.engine import LLMEngine
from pagedkv.runtime.state_layers import mixers, state_bytes

STEPS = 20


def ragged_prompts(count: int = 16) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(2, VOCAB, int(rng.integers(1, 34))).tolist() for _ in range(count)]


def alone(model: Any, prompt: list[int], steps: int = STEPS) -> Any:
    """What transformers answers a prompt that it has to itself, without padding."""
    ids = torch.tensor([prompt])
    model.set_attn_implementation("eager")
    return generate(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, steps=steps)


def tight(model: Any, **options: Any) -> LLMEngine:
    engine = LLMEngine(model, **{"num_blocks": 26, "block_size": 4, "max_num_seqs": 6, "max_num_batched_tokens": 16} | options)
    for tensor in engine.storage._tensors:
        tensor.fill_(torch.nan)
    return engine


def ties(expected: list[Any], given: list[list[int]]) -> int:
    """Return how many texts part ways at a tie; fail if one does for another reason."""
    parted = 0
    for answer, tokens in zip(expected, given, strict=True):
        right = answer.tokens[0].tolist()
        if tokens != right:
            first = next(i for i, pair in enumerate(zip(tokens, right, strict=True)) if pair[0] != pair[1])
            best = answer.logits[0, first].topk(2).values
            assert best[0] - best[1] < TIE, f"differs at token {first}, where the best logits are {best.tolist()}"
            parted += 1
    return parted


@pytest.mark.parametrize("name", HYBRIDS)
@pytest.mark.parametrize("most_tokens", [7, 16, 200])
def test_greedy_tokens_are_those_of_the_contiguous_cache(name: str, most_tokens: int) -> None:
    model, prompts = build(name), ragged_prompts()
    expected = [alone(model, prompt) for prompt in prompts]
    assert len({token for answer in expected for token in answer.tokens[0].tolist()}) > 30
    engine = tight(model, max_num_batched_tokens=most_tokens)
    given = engine.generate(prompts, max_tokens=STEPS)
    preemptions = int(engine.scheduler.requests.arrays["num_preemptions"][: len(prompts)].sum())
    parted = ties(expected, [text.tokens for text in given])
    print(f"{name}, {most_tokens} tokens a step: {preemptions} preemptions, {parted} texts part at a tie")  # noqa: T201
    assert preemptions > 2
    assert parted <= 1
    assert not engine.scheduler.caches_prefixes
    assert engine.allocator.free_slots == engine.allocator.usable_slots
    engine.scheduler.check_integrity()


def test_mamba_layers_beside_attention_are_layers_with_states() -> None:
    more = {
        "layer_types": ["mamba", "attention"],
        "num_hidden_layers": 2,
        "mamba_n_heads": 8,
        "mamba_d_state": 16,
        "num_local_experts": 0,
    }
    torch.manual_seed(0)
    model = transformers.GraniteMoeHybridForCausalLM(transformers.GraniteMoeHybridConfig(**COMMON | more)).eval()
    model.set_attn_implementation("eager")
    prompts = ragged_prompts(6)
    expected = [alone(model, prompt, 6).tokens[0].tolist() for prompt in prompts]
    given = tight(model, max_num_batched_tokens=7).generate(prompts, max_tokens=6)
    assert [text.tokens for text in given] == expected
    assert len({token for tokens in expected for token in tokens}) > 10


def test_whoever_leaves_leaves_no_state_to_the_next_in_the_row() -> None:
    model, prompts = build("qwen3_next"), ragged_prompts(8)
    expected = [alone(model, prompt, 6).tokens[0].tolist() for prompt in prompts]
    engine = tight(model, max_num_seqs=1)
    first = engine.add_request(prompts[0], max_tokens=30)
    for _ in range(5):
        engine.step()
    assert first is not None
    assert engine.abort(first)
    assert [text.tokens for text in engine.generate(prompts, max_tokens=6)] == expected


def test_the_model_serves_its_own_cache_again_afterwards() -> None:
    model, prompt = build("qwen3_next"), ragged_prompts()[3]
    before = alone(model, prompt).tokens.tolist()
    tight(model).generate([prompt], max_tokens=4)
    tight(model).generate([prompt], max_tokens=4)  # packed twice
    assert alone(model, prompt).tokens.tolist() == before


def test_states_count_in_the_budget() -> None:
    model = build("qwen3_next")
    config = model.config
    convolved = (
        2 * config.linear_num_key_heads * config.linear_key_head_dim + config.linear_num_value_heads * config.linear_value_head_dim
    )
    recurrent = config.linear_num_value_heads * config.linear_key_head_dim * config.linear_value_head_dim
    each = 3 * 4 * (convolved * config.linear_conv_kernel_dim + recurrent)
    assert state_bytes(model) == each
    budget = 400_000
    engine = LLMEngine(model, budget_bytes=budget, block_size=4, max_num_seqs=6)
    assert engine.storage.num_blocks == (budget - 6 * each) // engine.storage.block_bytes
    engine.generate(ragged_prompts(12), max_tokens=5)
    kept = engine.models.runner._cache.state_bytes
    assert kept == 6 * each
    assert kept + engine.storage.num_bytes <= budget
    assert len(mixers(model)) == 3
    with pytest.raises(ConfigError, match=r"the states of max_num_seqs 6 sequences take .* needs fewer, or more memory"):
        LLMEngine(model, budget_bytes=6 * each, block_size=4, max_num_seqs=6)


def test_what_a_state_cannot_do_is_refused() -> None:
    model = build("qwen3_next")
    with pytest.raises(ConfigError, match="enable_prefix_caching with qwen3_next: blocks keep no state"):
        tight(model, enable_prefix_caching=True)
    with pytest.raises(ConfigError, match="cannot take rejected drafts back"):
        tight(model, speculative_model=draft_of(model), num_speculative_tokens=2)
    experts = {"attn_layer_period": 4, "attn_layer_offset": 2, "num_experts": 2, "num_experts_per_tok": 1, "mamba_d_state": 8}
    jamba = transformers.JambaForCausalLM(transformers.JambaConfig(**COMMON | experts | {"use_mamba_kernels": False}))
    with pytest.raises(ConfigError, match="has another output in pieces than at once"):
        tight(jamba)
    only = transformers.Qwen3NextConfig(**COMMON | {"num_experts": 0, "layer_types": ["linear_attention"] * 4})
    with pytest.raises(ConfigError, match="has no layer of attention"):
        tight(transformers.Qwen3NextForCausalLM(only))
