"""llama.cpp's server: a fixed cache of cells, a few slots, no preemption; when the cells run out, everybody gets an error."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pagedkv.allocation import KVPoolSettings
from pagedkv.allocators.llama_cpp_split import LlamaCppSplit
from pagedkv.allocators.llama_cpp_unified import LlamaCppUnified
from pagedkv.hardware_spec import HardwareSpec
from pagedkv.ledgers.llama_cpp import LlamaCppLedger, padded
from pagedkv.model_spec import ModelSpec
from pagedkv.scheduling.llama_cpp_scheduler import LlamaCppScheduler, LlamaCppSettings
from pagedkv.scheduling.scheduler_settings import SchedulerSettings
from pagedkv.scheduling.step import StepScheduler
from pagedkv.sims.config import ServingConfig
from pagedkv.sims.engines import ENGINES, only_on
from pagedkv.sims.engines._shared import OneVersion

_USUAL = LlamaCppSettings()


@dataclass(frozen=True, slots=True)
class LlamaCpp(OneVersion):
    """The engine of `llama-server`. Source: llama.cpp as of mid-2026, its server and common_params."""

    name = "llama-cpp"
    setting = None
    caching_allocators = ("llama-cpp-unified", "llama-cpp-split")

    def allocators(self, serving: ServingConfig) -> tuple[str, ...]:
        """Return one stream of cells for all slots, or one for each."""
        return ("llama-cpp-unified" if _ledger(serving).unified else "llama-cpp-split",)

    def in_words(self, serving: ServingConfig, limits: SchedulerSettings, pool: KVPoolSettings) -> str:
        """Return how it batches."""
        unified = _ledger(serving).unified
        cells = f"share {pool.num_blocks:,} cells" if unified else f"have {pool.num_blocks // limits.max_num_seqs:,} cells each"
        return (
            f"{limits.max_num_seqs} server slots {cells}, all allocated at the start; everybody else waits for a slot, however "
            "much memory is left. A slot keeps its last prompt, which nobody else's slot can share."
        )

    def at_exhaustion(self, serving: ServingConfig) -> str:
        """Return what an error does."""
        if not _ledger(serving).unified:
            return "cannot happen: a slot has its own cells"
        return "idle slots are purged, the batch is halved, and at last all slots end with an error"

    def scheduler_settings(self, serving: ServingConfig, model: ModelSpec, hardware: HardwareSpec) -> SchedulerSettings:
        """Return its limits: server slots, --batch-size, and the cells that a slot may use."""
        del hardware
        ledger, tokens = _ledger(serving), serving.max_num_batched_tokens
        cells = padded(ledger.ctx_size or model.max_context)
        slot_cells = cells if ledger.unified else padded(cells // max(ledger.num_slots, 1))
        longest = min(slot_cells, model.max_context)
        return SchedulerSettings(
            max_num_seqs=ledger.num_slots,
            max_num_batched_tokens=max(_USUAL.n_batch, ledger.num_slots) if tokens is None else tokens,
            max_model_len=longest if serving.max_model_len is None else serving.max_model_len,
        )

    def derived_settings(self, serving: ServingConfig) -> Mapping[str, Any]:
        """Return whether slots share their cells: by default only if nobody says how many slots there are."""
        return {"kv_unified": _ledger(serving).unified}

    def ledger(self, serving: ServingConfig, hardware: HardwareSpec, limits: SchedulerSettings) -> LlamaCppLedger:
        """Return llama.cpp's ledger: --ctx-size cells, allocated at the start."""
        del hardware, limits
        return _ledger(serving)

    def scheduler(self, serving: ServingConfig, limits: SchedulerSettings, pool: KVPoolSettings, allocator: str) -> StepScheduler:
        """Return the server's scheduler over its cells."""
        only_on(self, allocator, serving)
        settings = LlamaCppSettings(
            n_batch=limits.max_num_batched_tokens,
            n_ubatch=_USUAL.n_ubatch if serving.ubatch_size is None else serving.ubatch_size,
            cache_prompt=pool.enable_prefix_caching,
        )
        return LlamaCppScheduler(settings, LlamaCppUnified(pool) if allocator == "llama-cpp-unified" else LlamaCppSplit(pool))


def _ledger(serving: ServingConfig) -> LlamaCppLedger:
    """Return the memory rule; --max-num-seqs is --parallel by vLLM's name."""
    usual = LlamaCppLedger()
    asked = LlamaCppLedger(
        parallel=serving.max_num_seqs if serving.parallel is None else serving.parallel, kv_unified=serving.kv_unified
    )
    return LlamaCppLedger(
        ctx_size=usual.ctx_size if serving.ctx_size is None else serving.ctx_size,
        parallel=asked.num_slots,
        kv_unified=asked.unified,
        ubatch_size=usual.ubatch_size if serving.ubatch_size is None else serving.ubatch_size,
        swa_full=bool(serving.swa_full),
        ctx_checkpoints=usual.ctx_checkpoints if serving.ctx_checkpoints is None else serving.ctx_checkpoints,
    )


ENGINES.register("llama-cpp")(LlamaCpp())
