"""Orca: requests join and leave the batch at every step, but each reserves its memory in one contiguous piece at admission."""

from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True)
class Orca(OneVersion):
    """Orca as PagedAttention's paper compares with it: what it reserves differs, the rest is vLLM's.

    Max reserves the model maximum, Pow2 the prompt and the next power of two of the output, Oracle the true length; a buddy heap
    places them. Source: Kwon et al., SOSP 2023, section 6.1; Yu et al., OSDI 2022.
    """

    name = "orca"
    setting = "gpu-memory-utilization"
    caching_allocators = ()

    def allocators(self, serving: ServingConfig) -> tuple[str, ...]:
        """Return its three variants."""
        del serving
        return ("contiguous-max", "contiguous-pow2", "contiguous-oracle")

    def in_words(self, serving: ServingConfig, limits: SchedulerSettings, pool: KVPoolSettings) -> str:
        """Return how it batches."""
        del serving
        return (
            f"A request joins the running batch at any step, with memory in one piece from a {pool.contiguous_heap} heap: for "
            f"{limits.max_model_len:,} tokens (max), for the next power of two of its output (pow2), or for what it will really be "
            "(oracle, which no server knows)."
        )

    def at_exhaustion(self, serving: ServingConfig) -> str:
        """Return what waits."""
        del serving
        return "cannot happen to who runs: others wait until a piece is large enough"

    def scheduler_settings(self, serving: ServingConfig, model: ModelSpec, hardware: HardwareSpec) -> SchedulerSettings:
        """Return its limits: vLLM's for this machine, but prompts are computed whole."""
        longest = longest_request(serving, model)
        seqs, tokens = serving.max_num_seqs, serving.max_num_batched_tokens
        return SchedulerSettings(
            max_num_seqs=hardware.default_max_num_seqs if seqs is None else seqs,
            max_num_batched_tokens=max(hardware.default_max_num_batched_tokens, longest) if tokens is None else tokens,
            max_model_len=longest,
            enable_chunked_prefill=False,
        )

    def ledger(self, serving: ServingConfig, hardware: HardwareSpec, limits: SchedulerSettings) -> VLLMLedger:
        """Return vLLM's ledger: the comparison is about what happens within the KV cache."""
        del limits
        return vllm_ledger(serving, self.default_utilization(hardware))

    def scheduler(self, serving: ServingConfig, limits: SchedulerSettings, pool: KVPoolSettings, allocator: str) -> StepScheduler:
        """Return iteration-level scheduling over a contiguous heap."""
        only_on(self, allocator, serving)
        return Scheduler(limits, step_allocator(allocator, pool))


ENGINES.register("orca")(Orca())
