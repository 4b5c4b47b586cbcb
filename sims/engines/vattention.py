"""vAttention: contiguous virtual memory behind which pages are mapped as tokens come; no block tables, large pages, no sharing."""

from dataclasses import dataclass, replace

from pagedkv.allocation import KVPoolSettings
from pagedkv.hardware_spec import HardwareSpec
from pagedkv.ledgers.vllm import VLLMLedger
from pagedkv.model_spec import ModelSpec
from pagedkv.scheduling.scheduler import Scheduler
from pagedkv.scheduling.scheduler_settings import SchedulerSettings
from pagedkv.scheduling.step import StepScheduler
from pagedkv.sims.config import ServingConfig
from pagedkv.sims.engines import ENGINES, only_on
from pagedkv.sims.engines._shared import OneVersion, longest_request, vllm_ledger
from pagedkv.step_allocation import step_allocator

WATERMARK = 0.01
"""Share of the pages that an admission leaves free. Source: microsoft/vattention, its block space manager."""


@dataclass(frozen=True, slots=True)
class VAttention(OneVersion):
    """The engine of the vAttention paper, built on Sarathi-Serve: chunked prefill, preemption of the last, recompute.

    Source: Prabhu et al., ASPLOS 2025; microsoft/vattention (ef3fff2).
    """

    name = "vattention"
    setting = "gpu-memory-utilization"
    caching_allocators = ()

    def allocators(self, serving: ServingConfig) -> tuple[str, ...]:
        """Return its virtual memory."""
        del serving
        return ("vattention",)

    def in_words(self, serving: ServingConfig, limits: SchedulerSettings, pool: KVPoolSettings) -> str:
        """Return how it batches."""
        del serving, limits
        return (
            f"A request's tokens are contiguous in virtual memory, and pages of {pool.page_tokens} tokens are mapped behind them "
            "as they come: kernels need no block table, and nothing is shared."
        )

    def at_exhaustion(self, serving: ServingConfig) -> str:
        """Return what preemption does."""
        del serving
        return "pages of idle rows are taken back, then the request that came last is preempted and recomputes"

    def scheduler_settings(self, serving: ServingConfig, model: ModelSpec, hardware: HardwareSpec) -> SchedulerSettings:
        """Return vLLM's limits for this machine."""
        longest, chunked = longest_request(serving, model), serving.enable_chunked_prefill is not False
        seqs, tokens = serving.max_num_seqs, serving.max_num_batched_tokens
        if tokens is None:
            tokens = max(hardware.default_max_num_batched_tokens, 0 if chunked else longest)
        return SchedulerSettings(
            max_num_seqs=hardware.default_max_num_seqs if seqs is None else seqs,
            max_num_batched_tokens=tokens,
            max_model_len=longest,
            enable_chunked_prefill=chunked,
        )

    def ledger(self, serving: ServingConfig, hardware: HardwareSpec, limits: SchedulerSettings) -> VLLMLedger:
        """Return vLLM's ledger."""
        del limits
        return vllm_ledger(serving, self.default_utilization(hardware))

    def scheduler(self, serving: ServingConfig, limits: SchedulerSettings, pool: KVPoolSettings, allocator: str) -> StepScheduler:
        """Return its scheduler, which is of vLLM's kind, over its virtual memory."""
        only_on(self, allocator, serving)
        return Scheduler(limits, step_allocator(allocator, replace(pool, watermark=pool.watermark or WATERMARK)))


ENGINES.register("vattention")(VAttention())
