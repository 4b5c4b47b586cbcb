"""What the same prompts take in a paged and in two contiguous caches, measured; and how many sequences fit in the same memory.

python -m pagedkv.runtime.memory_study
"""

import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers

from pagedkv.errors import ConfigError
from pagedkv.runtime.attention import use_paged_attention
from pagedkv.runtime.cache_meter import CacheMeter
from pagedkv.runtime.paged_cache import PagedCache
from pagedkv.runtime.study_command import run_study, study_parser
from pagedkv.units import parse_bytes

CACHES = ("PagedCache", "DynamicCache", "StaticCache")


class Usage(NamedTuple):
    """What one run took, in bytes."""

    peak_bytes: int
    """At the worst moment, tensors that a cache makes to write included."""
    held_bytes: int
    """Most between two writes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheRow:
    """What one cache took."""

    cache: str
    """Its class."""
    peak_bytes: int
    """For all prompts, at the worst moment."""
    held_bytes: int
    """For all prompts, most between two writes."""
    max_seqs: int
    """Of the same prompts, in order, as many as fit in the budget: that many were run, and one more took more."""
    max_seqs_bytes: int
    """What they took at the worst moment."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryStudy:
    """Prompts for a model, generated over each cache."""

    model: str
    """The model's type."""
    lengths: tuple[int, ...]
    """Tokens of each prompt."""
    new_tokens: int
    """Tokens generated after each."""
    block_size: int
    """Tokens per block."""
    budget_bytes: int
    """For `max_seqs`."""
    token_bytes: int
    """Keys and values of all tokens of all sequences, in all layers: the floor, but for windows."""
    rows: tuple[CacheRow, ...]
    """By cache."""

    def table(self) -> str:
        """Return it for a reader."""
        tokens = f"{min(self.lengths)} to {max(self.lengths)} tokens, mean {np.mean(self.lengths):.0f}"
        lines = [
            f"{self.model}: {len(self.lengths)} prompts of {tokens}, {self.new_tokens} new ones each; "
            f"blocks of {self.block_size}; tokens alone {self.token_bytes / 1024:,.0f} KiB",
            f"{'':14}{'peak':>13}{'between':>13}   sequences in {self.budget_bytes / 1024:,.0f} KiB",
        ]
        for row in self.rows:
            sizes = f"{row.peak_bytes / 1024:9,.0f} KiB{row.held_bytes / 1024:9,.0f} KiB"
            lines.append(f"{row.cache:14}{sizes}{row.max_seqs:6} (peak {row.max_seqs_bytes / 1024:,.0f} KiB)")
        return "\n".join(lines)


def study_memory(
    model: Any, lengths: Sequence[int], *, new_tokens: int = 32, budget_bytes: int, block_size: int = 16, seed: int = 0
) -> MemoryStudy:
    """Generate after random prompts of these lengths over each cache, and measure.

    StaticCache is made for the longest sequence of the run, as `generate` makes it. PagedCache's pool has as many blocks as a run
    before held at most, and the null block; all its bytes count, from the beginning.

    Args:
        model: A model of transformers that `use_paged_attention` takes; its attention is eager afterwards.
        lengths: Tokens of each prompt.
        new_tokens: Tokens to generate after each, 2 or more.
        budget_bytes: For how many sequences fit: as many as stay within it at the worst moment.
        block_size: Tokens per block.
        seed: Of the prompts.

    Raises:
        ConfigError: If there is nothing to generate, or not one sequence fits.
    """
    if new_tokens < 2 or not lengths or min(lengths) < 1:
        raise ConfigError(f"{len(lengths)} prompts and {new_tokens} new tokens: needs prompts of 1 token or more, 2 new ones")
    inputs, rows = _prompts(lengths, model.config.vocab_size, seed), []
    for name in CACHES:

        def run(count: int, name: str = name) -> Usage:
            return _measure(model, name, {key: tensor[:count] for key, tensor in inputs.items()}, new_tokens, block_size)

        usage = run(len(lengths))
        max_seqs, within = _most(run, len(lengths), usage, budget_bytes, name)
        rows.append(
            CacheRow(
                cache=name,
                peak_bytes=usage.peak_bytes,
                held_bytes=usage.held_bytes,
                max_seqs=max_seqs,
                max_seqs_bytes=within.peak_bytes,
            )
        )
    token_slots = sum(lengths) + len(lengths) * (new_tokens - 1)  # the last token is never cached
    one_token = PagedCache(model, num_blocks=2, block_size=1, allocator="paged").storage.block_bytes
    return MemoryStudy(
        model=model.config.model_type,
        lengths=tuple(lengths),
        new_tokens=new_tokens,
        block_size=block_size,
        budget_bytes=budget_bytes,
        token_bytes=token_slots * one_token,
        rows=tuple(rows),
    )


def ragged_lengths(count: int, *, median: int = 48, longest: int = 256, seed: int = 0) -> tuple[int, ...]:
    """Return `count` lengths, lognormal around `median` with sigma 1, from 1 to `longest`."""
    drawn = np.random.default_rng(seed).lognormal(np.log(median), 1.0, count)
    return tuple(np.clip(drawn, 1, longest).astype(int).tolist())


def _prompts(lengths: Sequence[int], vocab_size: int, seed: int) -> dict[str, torch.Tensor]:
    """Return random prompts, padded on the left."""
    longest = max(lengths)
    mask = np.arange(longest) >= longest - np.array(lengths)[:, None]
    ids = np.random.default_rng(seed).integers(2, vocab_size, mask.shape) * mask
    return {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask.astype(np.int64))}


def _measure(model: Any, name: str, inputs: dict[str, torch.Tensor], new_tokens: int, block_size: int) -> Usage:
    longest = int(inputs["attention_mask"].sum(1).max())
    inputs = {key: tensor[:, -longest:] for key, tensor in inputs.items()}  # no padding that all have
    if name == "PagedCache":
        use_paged_attention(model)
        num_blocks = 1 + _blocks_held(model, inputs, new_tokens, block_size)
    else:
        model.set_attn_implementation("eager")
    with CacheMeter() as meter:
        if name == "PagedCache":
            cache: Any = PagedCache(model, num_blocks=num_blocks, block_size=block_size)
        elif name == "StaticCache":
            cache = transformers.StaticCache(model.config, max_cache_len=longest + new_tokens - 1)
        else:
            cache = transformers.DynamicCache(config=model.config)
    meter.watch(cache)
    _generate(model, inputs, cache, new_tokens)
    model.set_attn_implementation("eager")
    return Usage(meter.peak_bytes, max(meter.held_bytes, meter.live_bytes))


def _blocks_held(model: Any, inputs: dict[str, torch.Tensor], new_tokens: int, block_size: int) -> int:
    """Return the most blocks that a run holds."""
    batch, longest = inputs["input_ids"].shape
    per_sequence = len(model.config.per_layer_config) * -(-(longest + new_tokens) // block_size)
    cache = PagedCache(model, num_blocks=1 + batch * per_sequence, block_size=block_size)
    _generate(model, inputs, cache, new_tokens)
    return cache.peak_blocks_held


def _generate(model: Any, inputs: dict[str, torch.Tensor], cache: Any, new_tokens: int) -> None:
    more = {"min_new_tokens": new_tokens, "max_new_tokens": new_tokens, "do_sample": False, "disable_compile": True}
    model.generate(**inputs, past_key_values=cache, **more)


def _most(run: Callable[[int], Usage], count: int, usage: Usage, budget_bytes: int, name: str) -> tuple[int, Usage]:
    """Return the largest number of sequences, up to `count`, that stays within the budget, and what it took; bisected."""
    if usage.peak_bytes <= budget_bytes:
        raise ConfigError(f"{count} sequences fit in {budget_bytes} bytes over {name}: give more prompts, or a smaller budget")
    fits, exceeds, within = 0, count, Usage(0, 0)
    while exceeds - fits > 1:
        middle = (fits + exceeds) // 2
        taken = run(middle)
        if taken.peak_bytes <= budget_bytes:
            fits, within = middle, taken
        else:
            exceeds = middle
    if not fits:
        raise ConfigError(f"not one sequence fits in {budget_bytes} bytes over {name}: give a larger budget")
    return fits, within


def study_models() -> dict[str, Any]:
    """Return two small random models: one whose layers keep all tokens, one with three layers of four behind a window of 32."""
    sizes: dict[str, Any] = {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 1024,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    kinds = ["sliding_attention"] * 3 + ["full_attention"]
    torch.manual_seed(0)
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    gemma = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**sizes, sliding_window=32, layer_types=kinds))
    return {"llama": llama.eval(), "gemma3": gemma.eval()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the study of `study_models` and print it."""
    parser = study_parser("memory_study", __doc__, budget="memory for the question how many sequences fit")
    parser.add_argument("--num-prompts", type=int, default=48)

    def studies(given: Namespace) -> list[MemoryStudy]:
        budget_bytes = parse_bytes(given.budget, name="--budget")
        lengths = ragged_lengths(given.num_prompts, seed=given.seed)
        more = {"new_tokens": given.new_tokens, "block_size": given.block_size, "budget_bytes": budget_bytes}
        return [study_memory(model, lengths, seed=given.seed, **more) for model in study_models().values()]

    return run_study(parser, arguments, studies)


if __name__ == "__main__":
    sys.exit(main())
