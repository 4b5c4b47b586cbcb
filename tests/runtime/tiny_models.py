"""Small random models of the families that are served, ragged prompts for them, and what a contiguous cache answers."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from pagedkv.runtime import PagedCache, use_paged_attention

VOCAB = 97
PAD = 0
WINDOW = 9
"""Of sliding layers: shorter than most prompts."""
TIE = 1e-4
"""Two logits this close may change places: float32 sums come in another order."""

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.35,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}
SLIDING_AND_FULL = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"]


def llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**COMMON))


def qwen3() -> Any:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**COMMON))


def gemma2() -> Any:
    more = {"sliding_window": WINDOW, "layer_types": SLIDING_AND_FULL, "attn_logit_softcapping": 3.0, "query_pre_attn_scalar": 16}
    return transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**COMMON | more))


def gemma3() -> Any:
    more = {"sliding_window": WINDOW, "layer_types": SLIDING_AND_FULL, "query_pre_attn_scalar": 24}
    return transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**COMMON | more))


def gpt_oss() -> Any:
    more = {"sliding_window": WINDOW, "layer_types": SLIDING_AND_FULL[2:] * 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    model = transformers.GptOssForCausalLM(transformers.GptOssConfig(**COMMON | more, experts_implementation="eager"))
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks, mean=1.0)
    return model


def mixtral() -> Any:
    more = {"num_local_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "eager"}
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**COMMON | more))


def qwen3_next() -> Any:
    """Three layers of linear attention, one of full attention."""
    more = {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_conv_kernel_dim": 4,
        "num_experts": 0,
        "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
    }
    return transformers.Qwen3NextForCausalLM(transformers.Qwen3NextConfig(**COMMON | more))


HYBRIDS: dict[str, Callable[[], Any]] = {"qwen3_next": qwen3_next}
"""With layers that keep states."""
MODELS: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "qwen3": qwen3,
    "gemma2": gemma2,
    "gemma3": gemma3,
    "gpt_oss": gpt_oss,
    "mixtral": mixtral,
}


def build(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """Return a model whose own attention is eager."""
    torch.manual_seed(sum(name.encode()))
    model = (MODELS | HYBRIDS)[name]().to(dtype).eval()
    model.set_attn_implementation("eager")
    return model


def draft_of(model: Any, noise: float = 0.03, seed: int = 0) -> Any:
    """Return the same model with its weights shaken: of one mind with it for a while."""
    draft = copy.deepcopy(model)
    torch.manual_seed(seed)
    with torch.no_grad():
        for weight in draft.parameters():
            weight.add_(torch.randn_like(weight) * noise * weight.std())
    return draft


def prompts(count: int = 16, *, longest: int = 23, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return `count` prompts of 1 to `longest` tokens, padded on the left."""
    rng = np.random.default_rng(seed)
    lengths = np.append(rng.integers(1, longest, count - 1), longest)
    mask = torch.from_numpy(np.arange(longest) >= longest - lengths[:, None]).long()
    ids = torch.from_numpy(rng.integers(2, VOCAB, (count, longest)))
    return {"input_ids": torch.where(mask > 0, ids, PAD), "attention_mask": mask}


class Answer(NamedTuple):
    tokens: torch.Tensor
    """New tokens [batch, steps]."""
    logits: torch.Tensor
    """[batch, steps, vocabulary]."""


def generate(model: Any, inputs: dict[str, torch.Tensor], *, steps: int = 24, **options: Any) -> Answer:
    options = {"do_sample": False, "max_new_tokens": steps, "return_dict_in_generate": True, "output_logits": True} | options
    given = model.generate(**inputs, **options)
    return Answer(given.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(given.logits, 1))


def paged(model: Any, inputs: dict[str, torch.Tensor], cache: PagedCache, **options: Any) -> Answer:
    """Generate over `cache`, whose whole memory is NaN before."""
    poison(cache)
    use_paged_attention(model)
    return generate(model, inputs, past_key_values=cache, **options)


def poison(cache: PagedCache) -> None:
    for tensor in cache.storage._tensors:
        tensor.fill_(torch.nan)


def shuffle(cache: PagedCache, seed: int = 0) -> None:
    """Leave the free blocks of a `PagedCache` in random order."""
    pool = cache.allocator.manager.pool
    blocks = pool.get_new_blocks(pool.num_free_blocks)
    assert blocks is not None
    np.random.default_rng(seed).shuffle(blocks)
    for block in blocks:
        pool.free_blocks(np.array([block], np.int32))


def ties(expected: Answer, given: Answer) -> int:
    """Return how many rows part ways at a tie; fail if one does for another reason, or logits differ before it does."""
    different = (expected.tokens != given.tokens).numpy()
    assert torch.isfinite(given.logits).all()
    parted = 0
    for row, places in enumerate(different):
        first = int(places.argmax()) if places.any() else len(places) - 1
        torch.testing.assert_close(given.logits[row, : first + 1], expected.logits[row, : first + 1], rtol=1e-3, atol=2e-3)
        if places.any():
            best = expected.logits[row, first].topk(2).values
            assert best[0] - best[1] < TIE, f"row {row} differs at step {first}, where the best logits are {best.tolist()}"
            parted += 1
    return parted


def distinct(tokens: torch.Tensor) -> NDArray[np.int64]:
    """Return how many different tokens each row has: a model that repeats itself proves little."""
    return np.array([len(set(row.tolist())) for row in tokens])
