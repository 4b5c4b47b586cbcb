"""Which allocator an engine's blocks come from, and how long a request can be there."""

from dataclasses import replace

from pagedkv.allocation import KVPoolSettings
from pagedkv.errors import ConfigError
from pagedkv.hybrid_steps import HybridStepAllocator
from pagedkv.paged_steps import PagedStepAllocator
from pagedkv.runtime.model_pair import ModelPair


def engine_memory(
    models: ModelPair,
    *,
    block_size: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    max_model_len: int | None,
    enable_prefix_caching: bool | None,
    watermark: float,
    lookahead_slots: int,
) -> PagedStepAllocator | HybridStepAllocator:
    """Return the allocator of the blocks of `models.storage`: the one that the simulator has for such a model.

    Args:
        models: What computes over them.
        block_size: Tokens per block, as it was asked for.
        max_num_seqs: Most requests that run at once.
        max_num_batched_tokens: Most tokens of a step.
        max_model_len: Longest prompt + output; None: what the models take, and the pool holds.
        enable_prefix_caching: None: yes, where no layer keeps a state of each sequence.
        watermark: Share of the blocks that an admission must leave free while something runs.
        lookahead_slots: Slots for drafts.

    Raises:
        ConfigError: With what would work.
    """
    if enable_prefix_caching and models.has_states:
        raise ConfigError(
            f"enable_prefix_caching with {models.runner.model.config.model_type}: blocks keep no state of linear attention, so "
            "nobody could go on from them; leave it out"
        )
    if max_model_len is not None and models.max_positions is not None and max_model_len > models.max_positions:
        who = "the model takes" if models.drafter is None else "the model and its draft model take"
        raise ConfigError(f"max_model_len is {max_model_len}: {who} {models.max_positions} tokens at most")
    storage = models.storage
    longest = models.max_positions or storage.num_blocks * max(storage.layout.block_sizes)
    settings = KVPoolSettings(
        num_blocks=storage.num_blocks,
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        max_model_len=longest if max_model_len is None else max_model_len,
        watermark=watermark,
        lookahead_slots=lookahead_slots,
        enable_prefix_caching=not models.has_states if enable_prefix_caching is None else enable_prefix_caching,
        layer_groups=models.layers if models.layers_apart else (),
        max_num_batched_tokens=max_num_batched_tokens,
    )
    memory = HybridStepAllocator if settings.layer_groups else PagedStepAllocator
    allocator = memory(settings)
    if max_model_len is not None:
        return allocator
    room = allocator.most_tokens(settings.num_blocks - 1)
    room += not lookahead_slots  # the last token needs no slot, but drafts behind it do
    return memory(replace(settings, max_model_len=min(longest, room)))
