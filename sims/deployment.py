"""A model on a machine under an engine: everything about a simulation but its load. Built once."""

from dataclasses import dataclass, replace
from typing import Any

from pagedkv.allocation import KVPoolSettings
from pagedkv.catalogue import load_hardware, load_model
from pagedkv.errors import ConfigError, unknown_name
from pagedkv.hardware_spec import HardwareSpec
from pagedkv.heaps import HEAPS
from pagedkv.kv_spec import KVCacheSpec, kv_element_pair_bytes
from pagedkv.memory_budget import MemoryBudget
from pagedkv.model_spec import ModelSpec
from pagedkv.scheduling.scheduler import SchedulerSettings
from pagedkv.sims.config import ServingConfig
from pagedkv.sims.engines import ENGINES
from pagedkv.sims.step_time import RooflineStepTime
from pagedkv.weight_format import WeightFormat, load_weight_format

PAGE_BYTES = 2 << 20
"""A page of virtual memory that stock CUDA maps. Source: Prabhu et al., vAttention, ASPLOS 2025."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """What serves."""

    config: ServingConfig
    """As asked for; a setting that says what would be so anyway is left out."""
    model: ModelSpec
    hardware: HardwareSpec
    weight_format: WeightFormat
    budget: MemoryBudget
    scheduler: SchedulerSettings
    pool: KVPoolSettings
    step_time: RooflineStepTime


def deploy(serving: ServingConfig) -> Deployment:
    """Return the deployment that `serving` describes.

    Raises:
        ConfigError: For anything that cannot work, with what would.
    """
    model, hardware = load_model(serving.model), load_hardware(serving.hardware)
    if serving.clock_derate is not None:
        hardware = hardware.derated(serving.clock_derate)
    engine = ENGINES.load(serving.engine)
    if serving.contiguous_heap not in HEAPS.names():
        raise unknown_name("contiguous-heap", serving.contiguous_heap, HEAPS.names())
    if not 0 <= serving.watermark < 1:
        raise ConfigError(f"watermark {serving.watermark} is a share of the blocks: needs 0 or more, below 1")
    if serving.block_size > 1 << 16:
        raise ConfigError(f"block-size {serving.block_size}: needs 1 to {1 << 16:,} tokens; vLLM's default is 16")
    weight_format = load_weight_format(serving.quantization) if serving.quantization else model.native_format
    scheduler = engine.scheduler_settings(serving, model, hardware)
    budget = engine.memory_budget(serving, model, weight_format, hardware, scheduler)
    usual = engine.scheduler_settings(
        replace(serving, max_model_len=None, max_num_seqs=None, max_num_batched_tokens=None), model, hardware
    )
    kv_spec = model.kv_spec(serving.kv_cache_dtype)
    limits: dict[str, Any] = {
        name: None if getattr(scheduler, name) == getattr(usual, name) else getattr(serving, name)
        for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens")
    }
    utilization = serving.gpu_memory_utilization
    return Deployment(
        config=replace(
            serving,
            **limits,
            gpu_memory_utilization=None if utilization == hardware.default_utilization.value else utilization,
            clock_derate=None if serving.clock_derate == 1 else serving.clock_derate,
        ),
        model=model,
        hardware=hardware,
        weight_format=weight_format,
        budget=budget,
        scheduler=scheduler,
        pool=KVPoolSettings(
            num_blocks=budget.num_blocks,
            block_size=serving.block_size,
            max_num_seqs=scheduler.max_num_seqs,
            max_model_len=scheduler.max_model_len,
            max_num_batched_tokens=scheduler.max_num_batched_tokens,
            kv_cache_dtype=serving.kv_cache_dtype,
            page_tokens=_page_tokens(kv_spec),
            contiguous_heap=serving.contiguous_heap,
            watermark=serving.watermark,
            reserve_full_isl=serving.scheduler_reserve_full_isl,
            state_slots=-(-kv_spec.state_bytes_per_sequence // kv_spec.bytes_per_token),
        ),
        step_time=RooflineStepTime(
            model,
            hardware,
            weight_format=weight_format,
            kv_spec=kv_spec,
            enforce_eager=serving.enforce_eager,
        ),
    )


def _page_tokens(kv_spec: KVCacheSpec) -> int:
    """Return the tokens whose keys fill a page of `PAGE_BYTES` in the widest layer."""
    key_bytes, _ = kv_element_pair_bytes(kv_spec.dtype_name)
    widest = max(group.num_kv_heads * group.key_dim * key_bytes / group.compression for group in kv_spec.groups)
    return int(PAGE_BYTES // widest)
