"""Ollama: llama.cpp's server, a whole context reserved at load for every slot, of which there is one by default; a short queue."""

from dataclasses import dataclass, replace

from pagedkv.allocation import KVPoolSettings
from pagedkv.allocators import ALLOCATORS
from pagedkv.allocators.llama_cpp_split import SplitStreams
from pagedkv.errors import ConfigError
from pagedkv.hardware_spec import HardwareSpec
from pagedkv.ledgers.llama_cpp import DEFAULT_CHECKPOINTS, LlamaCppLedger, padded
from pagedkv.model_spec import ModelSpec
from pagedkv.scheduling.llama_cpp_scheduler import OLLAMA, LlamaCppScheduler
from pagedkv.scheduling.scheduler_settings import SchedulerSettings
from pagedkv.scheduling.step import StepScheduler
from pagedkv.sims.config import ServingConfig
from pagedkv.sims.engines import ENGINES, only_on
from pagedkv.sims.engines._shared import OneVersion
from pagedkv.units import GIB

_CONTEXT_BY_MEMORY = ((47, 262_144), (23, 32_768), (0, 4_096))
"""(GiB from which it holds, context). Source: Ollama's defaults by VRAM; a model's own limit cuts it."""
DEFAULT_PARALLEL = 1
"""Source: OLLAMA_NUM_PARALLEL."""


@dataclass(frozen=True, slots=True)
class Ollama(OneVersion):
    """The engine of `ollama serve`. Source: Ollama, August 2026 (fb30760)."""

    name = "ollama"
    setting = None
    caching_allocators = ("ollama",)

    def allocators(self, serving: ServingConfig) -> tuple[str, ...]:
        """Return a whole context per slot."""
        del serving
        return ("ollama",)

    def in_words(self, serving: ServingConfig, limits: SchedulerSettings, pool: KVPoolSettings) -> str:
        """Return how it batches."""
        del pool
        slots = f"{limits.max_num_seqs} slot{'s' if limits.max_num_seqs > 1 else ''}"
        most = OLLAMA.max_queue if serving.max_queue is None else serving.max_queue
        return (
            f"{slots} of {limits.max_model_len:,} tokens, reserved at load whatever the prompts need; everybody else waits, "
            f"{most:,} at most, and more get status 503."
        )

    def at_exhaustion(self, serving: ServingConfig) -> str:
        """Return why it does not come to that."""
        del serving
        return "cannot happen: all is reserved at load"

    def scheduler_settings(self, serving: ServingConfig, model: ModelSpec, hardware: HardwareSpec) -> SchedulerSettings:
        """Return its limits: OLLAMA_NUM_PARALLEL slots of one context each, by the size of the memory unless given."""
        slots, tokens = _slots(serving), serving.max_num_batched_tokens
        context = serving.ctx_size or serving.max_model_len or default_context(hardware.visible_bytes)
        return SchedulerSettings(
            max_num_seqs=slots,
            max_num_batched_tokens=max(OLLAMA.n_batch, slots) if tokens is None else tokens,
            max_model_len=min(context, model.max_context),
        )

    def ledger(self, serving: ServingConfig, hardware: HardwareSpec, limits: SchedulerSettings) -> LlamaCppLedger:
        """Return llama.cpp's ledger for context × parallel cells, all reserved at load."""
        del hardware
        return LlamaCppLedger(
            ctx_size=padded(limits.max_model_len) * limits.max_num_seqs,
            parallel=limits.max_num_seqs,
            kv_unified=False,
            ubatch_size=OLLAMA.n_ubatch if serving.ubatch_size is None else serving.ubatch_size,
            swa_full=bool(serving.swa_full),
            ctx_checkpoints=DEFAULT_CHECKPOINTS if serving.ctx_checkpoints is None else serving.ctx_checkpoints,
        )

    def scheduler(self, serving: ServingConfig, limits: SchedulerSettings, pool: KVPoolSettings, allocator: str) -> StepScheduler:
        """Return the server's scheduler over one context per slot, with Ollama's limit of the queue."""
        only_on(self, allocator, serving)
        settings = replace(
            OLLAMA,
            n_batch=limits.max_num_batched_tokens,
            n_ubatch=OLLAMA.n_ubatch if serving.ubatch_size is None else serving.ubatch_size,
            cache_prompt=pool.enable_prefix_caching,
            max_queue=OLLAMA.max_queue if serving.max_queue is None else serving.max_queue,
        )
        memory = ALLOCATORS.load(allocator)(pool)
        assert isinstance(memory, SplitStreams)
        return LlamaCppScheduler(settings, memory)


def lower_context(context: int) -> int | None:
    """Return the next lower of the contexts that Ollama chooses by itself; None below the lowest."""
    return next((lower for _, lower in _CONTEXT_BY_MEMORY[1:] if lower < context), None)


def default_context(visible_bytes: int) -> int:
    """Return the context of a slot that Ollama chooses for a device of this size."""
    return next(context for from_gib, context in _CONTEXT_BY_MEMORY if visible_bytes >= from_gib * GIB)


def _slots(serving: ServingConfig) -> int:
    """Return the server slots; --max-num-seqs is --parallel by vLLM's name."""
    slots = serving.max_num_seqs if serving.parallel is None else serving.parallel
    if slots is not None and slots < 1:
        raise ConfigError(f"parallel is {slots}: needs 1 or more")
    return DEFAULT_PARALLEL if slots is None else slots


ENGINES.register("ollama")(Ollama())
