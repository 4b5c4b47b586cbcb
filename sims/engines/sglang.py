"""SGLang: a radix tree of prefixes, prefill before decode, admission by expected outputs, retraction where that was too hopeful."""

from dataclasses import dataclass, replace

import numpy as np

from pagedkv.allocation import KVPoolSettings
from pagedkv.errors import ConfigError
from pagedkv.hardware_spec import HardwareSpec
from pagedkv.ledgers.sglang import SGLangLedger, default_chunked_prefill_size
from pagedkv.model_spec import ModelSpec
from pagedkv.scheduling.radix_rows import RadixRows
from pagedkv.scheduling.scheduler_settings import SchedulerSettings
from pagedkv.scheduling.sglang_scheduler import SGLangScheduler
from pagedkv.scheduling.sglang_settings import SGLangSettings
from pagedkv.scheduling.step import StepScheduler
from pagedkv.sims.config import ServingConfig
from pagedkv.sims.engines import ENGINES, only_on
from pagedkv.sims.engines._shared import OneVersion, longest_request

MAX_RUNNING_REQUESTS = 2048
"""The least that SGLang comes to: 512 per context that the pool holds, within 2,048 and 4,096. Source: its ModelRunner."""


@dataclass(frozen=True, slots=True)
class SGLang(OneVersion):
    """The engine of `sglang.launch_server`. Source: SGLang 0.5.23, server_args and scheduler."""

    name = "sglang"
    setting = "mem-fraction-static"
    caching_allocators = ("radix",)

    def allocators(self, serving: ServingConfig) -> tuple[str, ...]:
        """Return the radix tree."""
        del serving
        return ("radix",)

    def in_words(self, serving: ServingConfig, limits: SchedulerSettings, pool: KVPoolSettings) -> str:
        """Return how it batches."""
        del pool
        alone = "beside decoding" if serving.enable_mixed_chunk else "alone: who decodes waits meanwhile, so ITL has long tails"
        return (
            f"A request starts if its prompt and a share of all outputs (70 % at first, less as steps go by) fit; prompts, up to "
            f"{limits.max_num_batched_tokens:,} tokens a step, are computed {alone}. Prefixes are shared in a tree, to the token."
        )

    def at_exhaustion(self, serving: ServingConfig) -> str:
        """Return what retraction does."""
        del serving
        return "leaves of the tree are evicted, then requests with the fewest outputs are retracted and recompute"

    def scheduler_settings(self, serving: ServingConfig, model: ModelSpec, hardware: HardwareSpec) -> SchedulerSettings:
        """Return its limits: max-running-requests, and chunked-prefill-size by the size of the device."""
        chunk = serving.max_num_batched_tokens
        return SchedulerSettings(
            max_num_seqs=MAX_RUNNING_REQUESTS if serving.max_num_seqs is None else serving.max_num_seqs,
            max_num_batched_tokens=default_chunked_prefill_size(hardware.visible_bytes) if chunk is None else chunk,
            max_model_len=longest_request(serving, model),
            num_speculative_tokens=serving.num_speculative_tokens or 0,
        )

    def ledger(self, serving: ServingConfig, hardware: HardwareSpec, limits: SchedulerSettings) -> SGLangLedger:
        """Return SGLang's ledger: weights and pool share a part of what is free before loading."""
        del hardware, limits
        page_size = 1 if serving.page_size is None else serving.page_size
        if page_size < 1:
            raise ConfigError(f"page-size is {page_size}: needs 1 or more")
        return SGLangLedger(page_size=page_size, mem_fraction_static=serving.mem_fraction_static)

    def scheduler(self, serving: ServingConfig, limits: SchedulerSettings, pool: KVPoolSettings, allocator: str) -> StepScheduler:
        """Return SGLang's scheduler over its radix tree."""
        only_on(self, allocator, serving)
        conservativeness = serving.schedule_conservativeness
        settings = SGLangSettings(
            max_running_requests=limits.max_num_seqs,
            max_model_len=limits.max_model_len,
            schedule_policy=serving.schedule_policy or "fcfs",
            chunked_prefill_size=None if serving.enable_chunked_prefill is False else limits.max_num_batched_tokens,
            enable_mixed_chunk=bool(serving.enable_mixed_chunk),
            num_speculative_tokens=limits.num_speculative_tokens,
            schedule_conservativeness=1.0 if conservativeness is None else conservativeness,
        )
        memory = RadixRows(replace(pool, eviction=serving.radix_eviction_policy or pool.eviction))
        return SGLangScheduler(settings, memory, permutation=np.random.default_rng(0).permutation)


ENGINES.register("sglang")(SGLang())
