"""The peak of temporary memory in a forward pass, as an engine's profile run finds it. Estimated, fitted to what vLLM logged."""

from pagedkv.model_spec import ModelSpec

SAMPLER_BYTES_PER_LOGIT = 33
"""Sampling over `max_num_seqs` rows of logits. Source: vLLM 0.19 on an RTX 4090 (Llama-3.1-8B, 256 rows, 2,588 blocks),
less 0.13 GiB of libraries. An older vLLM took 38 on an H100 with 1,024 rows (llm-d-benchmark: 4.76 GiB for
Llama-3.1-8B, 7.38 GiB for gpt-oss-20b)."""
DENSE_PEAK_WIDTH = 14
"""Hidden states' worth of 16-bit activations at the widest point of a layer. Source: Llama-3.1-8B, where 3 of them live
beside gate, up and their product, 3 * 14,336 / 4,096."""
EXPERT_PEAK_WIDTH = 83
"""The same with routed experts. Source: DeepSeek-V4-Flash on a Spark, one sequence, took 1.39 GiB at 2,048 tokens and
5.30 GiB at 8,224: 3.91 GiB for 6,176 tokens of 4,096 elements."""


def activation_bytes(model: ModelSpec, *, max_num_batched_tokens: int, max_num_seqs: int) -> int:
    """Return the peak of a profile run: the widest layer or the sampler, whichever is larger.

    layer = tokens x hidden x 2 bytes x width; sampler = sequences x vocabulary x 33 bytes + tokens x hidden x 2 bytes.
    """
    hidden_states = 2 * max_num_batched_tokens * model.hidden_size
    layer = hidden_states * (EXPERT_PEAK_WIDTH if model.num_experts else DENSE_PEAK_WIDTH)
    return max(layer, hidden_states + max_num_seqs * model.vocab_size * SAMPLER_BYTES_PER_LOGIT)
