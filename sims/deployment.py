"""A model on a machine under an engine: everything about a simulation but its load. Built once."""

from dataclasses import dataclass, replace
from typing import Any

from pagedkv.allocation import KVPoolSettings
from pagedkv.catalogue import load_hardware, load_model
from pagedkv.errors import ConfigError, unknown_name
from pagedkv.hardware_spec import HardwareSpec
from pagedkv.heaps import HEAPS
from pagedkv.kv_spec import KVCacheSpec, kv_element_pair_bytes
from pagedkv.layer_groups import plan_layer_groups
from pagedkv.memory_budget import MemoryBudget
from pagedkv.model_spec import ModelSpec
from pagedkv.scheduling.scheduler import SchedulerSettings
from pagedkv.scheduling.step import StepScheduler
from pagedkv.sims.calibration import Calibration, calibration_for
from pagedkv.sims.config import ServingConfig
from pagedkv.sims.drafting import Drafting, drafting_of
from pagedkv.sims.engine_flags import refuse_flags_of_others
from pagedkv.sims.engines import EnginePreset, load_engine
from pagedkv.sims.step_time import RooflineStepTime
from pagedkv.weight_format import WeightFormat, load_weight_format

PAGE_BYTES = 2 << 20
"""A page of virtual memory that stock CUDA maps. Source: Prabhu et al., vAttention, ASPLOS 2025."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """What serves."""

    config: ServingConfig
    """As asked for; a setting that says what would be so anyway is left out."""
    engine: EnginePreset
    drafting: Drafting | None
    """How tokens are drafted; None: they are not."""
    model: ModelSpec
    hardware: HardwareSpec
    weight_format: WeightFormat
    budget: MemoryBudget
    scheduler: SchedulerSettings
    pool: KVPoolSettings
    step_time: RooflineStepTime
    calibration: Calibration
    """What its constants rest on, and how far they may be off."""

    def scheduler_over(self, allocator: str) -> StepScheduler:
        """Return a scheduler with nobody in it, over `allocator`."""
        return self.engine.scheduler(self.config, self.scheduler, self.pool_of(allocator), allocator)

    def pool_of(self, allocator: str) -> KVPoolSettings:
        """Return what `allocator` is built from: all divide the same bytes, and those with blocks per layer group their own way."""
        if allocator in self.engine.caching_allocators:
            return self.pool
        if allocator != "hybrid":
            return replace(self.pool, enable_prefix_caching=False)
        groups = self.model.layer_groups
        plan = plan_layer_groups(groups, block_size=self.pool.block_size, kv_cache_dtype=self.pool.kv_cache_dtype)
        num_blocks = self.pool.num_blocks * self.budget.block_bytes // plan.page_bytes
        return replace(self.pool, num_blocks=num_blocks, layer_groups=groups, state_slots=0, enable_prefix_caching=False)

    @property
    def why_no_prefix_caching(self) -> str | None:
        """Why prefix caching is off, whatever was asked for; None if it is on, or off only because that was asked for."""
        if self.pool.enable_prefix_caching or self.config.enable_prefix_caching is False or not self.engine.caching_allocators:
            return None
        return (
            "Prefix caching is off: this model's layers with a state are not cached. vLLM caches them only if asked, in an "
            "experimental way that is not modelled."
        )


def deploy(serving: ServingConfig) -> Deployment:
    """Return the deployment that `serving` describes.

    Raises:
        ConfigError: For anything that cannot work, with what would.
    """
    refuse_flags_of_others(serving)
    model, hardware = load_model(serving.model), load_hardware(serving.hardware)
    if serving.clock_derate is not None:
        hardware = hardware.derated(serving.clock_derate)
    engine = load_engine(serving.engine)
    if serving.contiguous_heap not in HEAPS.names():
        raise unknown_name("contiguous-heap", serving.contiguous_heap, HEAPS.names())
    if not 0 <= serving.watermark < 1:
        raise ConfigError(f"watermark {serving.watermark} is a share of the blocks: needs 0 or more, below 1")
    if serving.block_size > 1 << 16:
        raise ConfigError(f"block-size {serving.block_size}: needs 1 to {1 << 16:,} tokens; vLLM's default is 16")
    reserve_full_isl, freed_to_front = engine.admission(serving)
    has_state = model.kv_spec(serving.kv_cache_dtype).state_bytes_per_sequence > 0
    weight_format = load_weight_format(serving.quantization) if serving.quantization else model.native_format
    drafting = drafting_of(serving, model, weight_format)
    scheduler = engine.scheduler_settings(serving, model, hardware)
    budget = engine.memory_budget(serving, model, weight_format, hardware, scheduler)
    usual = engine.scheduler_settings(
        replace(serving, max_model_len=None, max_num_seqs=None, max_num_batched_tokens=None), model, hardware
    )
    usual_gate, _ = engine.admission(replace(serving, scheduler_reserve_full_isl=None))
    kv_spec = model.kv_spec(serving.kv_cache_dtype)
    limits: dict[str, Any] = {
        name: None if getattr(scheduler, name) == getattr(usual, name) else getattr(serving, name)
        for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens")
    }
    utilization = serving.gpu_memory_utilization
    calibration = calibration_for(
        hardware, engine.name, weight_format, serving.kv_cache_dtype, model=model, clock=serving.clock_derate or 1.0
    )
    return Deployment(
        config=replace(
            serving,
            **limits,
            engine=engine.name,
            gpu_memory_utilization=None if utilization == engine.default_utilization(hardware) else utilization,
            scheduler_reserve_full_isl=None if reserve_full_isl == usual_gate else serving.scheduler_reserve_full_isl,
            clock_derate=None if serving.clock_derate == 1 else serving.clock_derate,
            enable_prefix_caching=None if has_state or serving.enable_prefix_caching else serving.enable_prefix_caching,
        ),
        engine=engine,
        drafting=drafting,
        model=model,
        hardware=hardware,
        weight_format=weight_format,
        budget=budget,
        scheduler=scheduler,
        pool=KVPoolSettings(
            num_blocks=budget.num_blocks,
            block_size=budget.block_size,
            max_num_seqs=scheduler.max_num_seqs,
            max_model_len=scheduler.max_model_len,
            max_num_batched_tokens=scheduler.max_num_batched_tokens,
            kv_cache_dtype=serving.kv_cache_dtype,
            page_tokens=_page_tokens(kv_spec),
            contiguous_heap=serving.contiguous_heap,
            watermark=serving.watermark,
            reserve_full_isl=reserve_full_isl,
            freed_to_front=freed_to_front,
            lookahead_slots=scheduler.num_speculative_tokens,
            enable_prefix_caching=bool(engine.caching_allocators) and serving.enable_prefix_caching is not False and not has_state,
            state_slots=-(-kv_spec.state_bytes_per_sequence // budget.kv_bytes_per_token),
        ),
        step_time=RooflineStepTime(
            model,
            hardware,
            weight_format=weight_format,
            kv_spec=kv_spec,
            enforce_eager=engine.runs_eagerly(serving),
            drafting=drafting,
            constants=calibration.constants,
        ),
        calibration=calibration,
    )


def _page_tokens(kv_spec: KVCacheSpec) -> int:
    """Return the tokens whose keys fill a page of `PAGE_BYTES` in the widest layer."""
    key_bytes, _ = kv_element_pair_bytes(kv_spec.dtype_name)
    widest = max(group.num_kv_heads * group.key_dim * key_bytes / group.compression for group in kv_spec.groups)
    return int(PAGE_BYTES // widest)
