"""TensorRT-LLM: nobody starts who might have to stop, or everybody starts and some are paused; blocks reused to the token."""

from dataclasses import dataclass

from pagedkv.allocation import KVPoolSettings
from pagedkv.allocators.tensorrt_llm import TensorRTLLMAllocator
from pagedkv.hardware_spec import HardwareSpec
from pagedkv.ledgers.tensorrt_llm import TensorRTLLMLedger
from pagedkv.model_spec import ModelSpec
from pagedkv.reuse_steps import ReuseStepAllocator
from pagedkv.scheduling.scheduler_settings import SchedulerSettings
from pagedkv.scheduling.step import StepScheduler
from pagedkv.scheduling.tensorrt_llm_scheduler import TensorRTLLMScheduler, TensorRTLLMSettings
from pagedkv.sims.config import ServingConfig
from pagedkv.sims.engines import ENGINES, only_on
from pagedkv.sims.engines._shared import OneVersion, longest_request

_USUAL = TensorRTLLMSettings(max_model_len=1)


@dataclass(frozen=True, slots=True)
class TensorRTLLM(OneVersion):
    """The engine of `trtllm-serve`. Source: TensorRT-LLM's BuildConfig, KvCacheConfig and capacity scheduler."""

    name = "tensorrt-llm"
    setting = "free-gpu-memory-fraction"
    caching_allocators = ("tensorrt-llm",)

    def allocators(self, serving: ServingConfig) -> tuple[str, ...]:
        """Return its block manager."""
        del serving
        return ("tensorrt-llm",)

    def in_words(self, serving: ServingConfig, limits: SchedulerSettings, pool: KVPoolSettings) -> str:
        """Return how it batches."""
        starts = {
            "guaranteed_no_evict": "A request starts only if its prompt and all the output that it asked for fit to the end",
            "max_utilization": "A request starts if its prompt fits now",
            "static_batch": "Requests start together, when nobody runs",
        }[serving.capacity_scheduler_policy or _USUAL.capacity_policy]
        whole = (
            ""
            if serving.enable_chunked_prefill
            else f"; prompts are computed whole, so none may exceed {limits.max_num_batched_tokens:,}"
        )
        return f"{starts}, in blocks of {pool.block_size} tokens that are reused to the token{whole}."

    def at_exhaustion(self, serving: ServingConfig) -> str:
        """Return what its policy does."""
        if serving.capacity_scheduler_policy == "max_utilization":
            return "the request that started last is paused and recomputes"
        return "cannot happen to who runs: others wait"

    def scheduler_settings(self, serving: ServingConfig, model: ModelSpec, hardware: HardwareSpec) -> SchedulerSettings:
        """Return its limits, by vLLM's names: max_batch_size, max_num_tokens and max_seq_len."""
        del hardware
        seqs, tokens = serving.max_num_seqs, serving.max_num_batched_tokens
        return SchedulerSettings(
            max_num_seqs=_USUAL.max_num_seqs if seqs is None else seqs,
            max_num_batched_tokens=_USUAL.max_num_batched_tokens if tokens is None else tokens,
            max_model_len=longest_request(serving, model),
        )

    def ledger(self, serving: ServingConfig, hardware: HardwareSpec, limits: SchedulerSettings) -> TensorRTLLMLedger:
        """Return TensorRT-LLM's ledger: the KV cache takes a share of what weights and activations leave free."""
        del hardware, limits
        usual = TensorRTLLMLedger()
        share, tokens = serving.free_gpu_memory_fraction, serving.tokens_per_block
        return TensorRTLLMLedger(
            tokens_per_block=usual.tokens_per_block if tokens is None else tokens,
            free_gpu_memory_fraction=usual.free_gpu_memory_fraction if share is None else share,
        )

    def scheduler(self, serving: ServingConfig, limits: SchedulerSettings, pool: KVPoolSettings, allocator: str) -> StepScheduler:
        """Return TensorRT-LLM's scheduler over its block manager."""
        only_on(self, allocator, serving)
        settings = TensorRTLLMSettings(
            max_num_seqs=limits.max_num_seqs,
            max_num_batched_tokens=limits.max_num_batched_tokens,
            max_model_len=limits.max_model_len,
            capacity_policy=serving.capacity_scheduler_policy or _USUAL.capacity_policy,
            enable_chunked_prefill=bool(serving.enable_chunked_prefill),
            enable_block_reuse=pool.enable_prefix_caching,
        )
        return TensorRTLLMScheduler(settings, ReuseStepAllocator(TensorRTLLMAllocator(pool)))


ENGINES.register("tensorrt-llm")(TensorRTLLM())
