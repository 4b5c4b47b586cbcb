"""Naive serving: `generate` of Hugging Face's transformers, one request at a time or one padded batch after another."""

from dataclasses import dataclass, replace

from pagedkv.allocation import KVPoolSettings
from pagedkv.hardware_spec import HardwareSpec
from pagedkv.ledgers.transformers import TransformersLedger
from pagedkv.model_spec import ModelSpec
from pagedkv.scheduling.naive_scheduler import NaiveScheduler, NaiveSettings
from pagedkv.scheduling.scheduler_settings import SchedulerSettings
from pagedkv.scheduling.step import StepScheduler
from pagedkv.sims.config import ServingConfig
from pagedkv.sims.engines import ENGINES, only_on
from pagedkv.sims.engines._shared import OneVersion, longest_request
from pagedkv.step_allocation import step_allocator

HEAP = "first-fit"
"""Torch cuts a tensor from free memory to its size; it does not round to powers of two, as a buddy heap does."""


@dataclass(frozen=True, slots=True)
class Naive(OneVersion):
    """A loop around `model.generate` that serves in order of arrival. Source: transformers 5, GenerationMixin and cache_utils.

    The dynamic cache is `contiguous-growing`, the static one `contiguous-max`. The time that a dynamic cache takes to copy itself
    at every token is not charged.
    """

    name = "naive"
    setting = None
    caching_allocators = ()

    def allocators(self, serving: ServingConfig) -> tuple[str, ...]:
        """Return its dynamic cache, which is the default of `generate`, and its static one."""
        del serving
        return ("contiguous-growing", "contiguous-max")

    def runs_eagerly(self, serving: ServingConfig) -> bool:
        """Return that it does: `generate` captures no CUDA graphs unless a model is compiled."""
        del serving
        return True

    def in_words(self, serving: ServingConfig, limits: SchedulerSettings, pool: KVPoolSettings) -> str:
        """Return how it batches."""
        del serving, pool
        cache = (
            "its cache grows token by token, copied each time (contiguous-growing), or is made for "
            f"{limits.max_model_len:,} tokens at once (contiguous-max)."
        )
        if limits.max_num_seqs == 1:
            return f"One request at a time, while all others wait; {cache}"
        return (
            f"Batches of {limits.max_num_seqs} or fewer, padded to the longest prompt and held until the longest output ends; all "
            f"others wait. For each row {cache}"
        )

    def at_exhaustion(self, serving: ServingConfig) -> str:
        """Return what torch does."""
        del serving
        return "torch raises out of memory, and all of the batch fails"

    def scheduler_settings(self, serving: ServingConfig, model: ModelSpec, hardware: HardwareSpec) -> SchedulerSettings:
        """Return its limits: one request at a time, and no limit to what a step computes but the longest batch there could be."""
        del hardware
        longest, tokens = longest_request(serving, model), serving.max_num_batched_tokens
        seqs = 1 if serving.max_num_seqs is None else serving.max_num_seqs
        return SchedulerSettings(
            max_num_seqs=seqs,
            max_num_batched_tokens=max(seqs * longest, 1) if tokens is None else tokens,
            max_model_len=longest,
            enable_chunked_prefill=False,
        )

    def ledger(self, serving: ServingConfig, hardware: HardwareSpec, limits: SchedulerSettings) -> TransformersLedger:
        """Return the rule of transformers: KV gets what is free after weights, overhead and the activations of whole prompts."""
        del serving, hardware, limits
        return TransformersLedger()

    def scheduler(self, serving: ServingConfig, limits: SchedulerSettings, pool: KVPoolSettings, allocator: str) -> StepScheduler:
        """Return static batches over one of its caches."""
        only_on(self, allocator, serving)
        heap = HEAP if pool.contiguous_heap == ServingConfig().contiguous_heap else pool.contiguous_heap
        settings = NaiveSettings(
            max_num_seqs=limits.max_num_seqs,
            max_model_len=limits.max_model_len,
            max_num_batched_tokens=limits.max_num_batched_tokens,
        )
        return NaiveScheduler(settings, step_allocator(allocator, replace(pool, contiguous_heap=heap)))


ENGINES.register("naive")(Naive())
