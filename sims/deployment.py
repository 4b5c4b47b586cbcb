"""A model on a machine under an engine: everything about a simulation but its load. Built once."""

import math
from dataclasses import dataclass, replace
from typing import Any

from pagedkv.allocation import KVPoolSettings
from pagedkv.catalogue import load_hardware, load_model
from pagedkv.errors import ConfigError, unknown_name
from pagedkv.hardware_spec import HardwareSpec
from pagedkv.heaps import HEAPS
from pagedkv.hybrid_steps import HybridStepAllocator
from pagedkv.kv_spec import KVCacheSpec, kv_element_pair_bytes
from pagedkv.layer_groups import plan_layer_groups
from pagedkv.ledgers.llama_cpp import DEFAULT_CHECKPOINTS
from pagedkv.memory_budget import MemoryBudget
from pagedkv.memory_plan import plan
from pagedkv.memory_request import MemoryRequest
from pagedkv.model_spec import ModelSpec
from pagedkv.offload_steps import OffloadStepAllocator
from pagedkv.quantity import parse_quantity
from pagedkv.readable_formats import check_readable, default_format
from pagedkv.scheduling.llama_cpp_scheduler import LlamaCppSettings
from pagedkv.scheduling.scheduler_settings import SchedulerSettings
from pagedkv.scheduling.step import StepScheduler
from pagedkv.sims.calibration import Calibration, calibration_for
from pagedkv.sims.config import ServingConfig, names_several_models
from pagedkv.sims.drafting import Drafting, drafting_of
from pagedkv.sims.engine_flags import refuse_flags_of_others
from pagedkv.sims.engines import EnginePreset, load_engine
from pagedkv.sims.second_tier import SecondTier, second_tier
from pagedkv.sims.step_formula import NO_COPIES
from pagedkv.sims.step_time import RooflineStepTime
from pagedkv.units import parse_bytes, size_bytes
from pagedkv.weight_format import WeightFormat, load_weight_format

PAGE_BYTES = 2 << 20
"""A page of virtual memory that stock CUDA maps. Source: Prabhu et al., vAttention, ASPLOS 2025."""
_LIMITS = ("max_num_batched_tokens", "max_num_seqs", "max_model_len")
"""Limits of a step; an engine may decide one by those after it."""


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
    tier: SecondTier | None
    """Where what leaves the prefix cache goes; None: nowhere."""

    @property
    def own_allocator(self) -> str:
        """What the engine itself runs on."""
        return self.engine.columns(self.config)[0]

    def off_by(self, spreads: float) -> "Deployment":
        """Return the same with steps that take as long as may be (1), or as short (-1), as surely as their constants are known."""
        decode, prefill = (math.exp(spreads * each) for each in (self.calibration.decode_spread, self.calibration.prefill_spread))
        return replace(self, step_time=self.step_time.slower(decode_factor=decode, prefill_factor=prefill))

    def scheduler_over(self, allocator: str) -> StepScheduler:
        """Return a scheduler with nobody in it, over `allocator`."""
        return self.engine.scheduler(self.config, self.scheduler, self.pool_of(allocator), allocator)

    def pool_of(self, allocator: str) -> KVPoolSettings:
        """Return what `allocator` is built from: all divide the same bytes, and those with blocks per layer group their own way.

        Raises:
            ConfigError: If it needs a second tier and there is none.
        """
        if allocator == OffloadStepAllocator.name and self.tier is None and self.pool.enable_prefix_caching:
            raise ConfigError(f"--allocator {allocator} needs a second tier: add --offload-size, e.g. 200GiB")
        pool = self.pool if allocator in self.engine.caching_allocators else replace(self.pool, enable_prefix_caching=False)
        if allocator != HybridStepAllocator.name:
            return pool
        groups = self.model.layer_groups + (() if self.drafting is None else self.drafting.memory.kv_groups)
        plan = plan_layer_groups(groups, block_size=pool.block_size, kv_cache_dtype=pool.kv_cache_dtype)
        return replace(pool, num_blocks=self.budget.blocks_of(plan.page_bytes), layer_groups=groups, state_slots=0)

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
    request = memory_request(serving)
    budget, engine = plan(request), load_engine(serving.engine)
    model, hardware, weight_format = request.model, request.hardware, request.weight_format
    drafting = drafting_of(serving, model, weight_format)
    limits, kv_spec = engine.scheduler_settings(serving, model, hardware), model.kv_spec(serving.kv_cache_dtype)
    tier = second_tier(serving, hardware, kv_spec, budget)
    calibration = calibration_for(
        hardware,
        engine.name,
        weight_format,
        serving.kv_cache_dtype,
        model=model,
        clock=serving.clock_derate or 1.0,
        bandwidth=hardware.read_bandwidth.value / load_hardware(serving.hardware).read_bandwidth.value,
    )
    return Deployment(
        config=_without_usual(serving, engine, model, hardware, limits),
        engine=engine,
        drafting=drafting,
        model=model,
        hardware=hardware,
        weight_format=weight_format,
        budget=budget,
        scheduler=limits,
        pool=_pool(
            serving,
            engine,
            kv_spec,
            budget,
            limits,
            num_blocks=budget.blocks_of(replace(request, layers_apart=False).block_bytes),
            offload_blocks=0 if tier is None else tier.num_blocks,
        ),
        step_time=RooflineStepTime(
            model,
            hardware,
            weight_format=weight_format,
            kv_spec=kv_spec,
            enforce_eager=engine.runs_eagerly(serving),
            drafting=drafting,
            constants=calibration.constants,
            copies=NO_COPIES if tier is None else tier.coefficients(budget.block_bytes),
        ),
        calibration=calibration,
        tier=tier,
    )


def memory_request(serving: ServingConfig) -> MemoryRequest:
    """Return what the engine's ledger is asked: not checked, and nobody knows yet whether it fits.

    Raises:
        ConfigError: If model, machine, engine or a setting is none, or several models are named.
    """
    refuse_flags_of_others(serving)
    if names_several_models(serving):
        raise ConfigError(
            f"--model {serving.model} names several models, and this needs one; simulate --engine ollama loads them on demand"
        )
    model, hardware = load_model(serving.model), load_hardware(serving.hardware)
    if serving.clock_derate is not None:
        hardware = hardware.derated(serving.clock_derate)
    if serving.cpu_bandwidth is not None:
        hardware = hardware.beside_cpu_work(parse_quantity(serving.cpu_bandwidth, "bytes/s", name="--cpu-bandwidth"))
    engine = load_engine(serving.engine)
    _check_shares(serving)
    limits = engine.scheduler_settings(serving, model, hardware)
    ledger = engine.ledger(serving, hardware, limits)
    usual = default_format(engine.name, model.native_format)
    weight_format = load_weight_format(serving.quantization) if serving.quantization else usual
    if weight_format != usual:
        check_readable(weight_format, engine.name, proposed=ledger.weight_formats)
    drafting = drafting_of(serving, model, weight_format)
    return MemoryRequest(
        model=model,
        hardware=hardware,
        engine=engine.name,
        ledger=ledger,
        weight_format=weight_format,
        kv_cache_dtype=serving.kv_cache_dtype,
        max_model_len=limits.max_model_len,
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        enforce_eager=serving.enforce_eager,
        tensor_parallel_size=serving.tensor_parallel_size,
        draft=None if drafting is None else drafting.memory,
        layers_apart=engine.columns(serving)[0] == HybridStepAllocator.name,
        free_memory_bytes=size_bytes(serving.free_memory, "free-memory"),
        os_reserve_bytes=size_bytes(serving.os_reserve, "os-reserve"),
        other_programs_bytes=parse_bytes(serving.other_programs, name="other-programs"),
    )


def _check_shares(serving: ServingConfig) -> None:
    if serving.contiguous_heap not in HEAPS.names():
        raise unknown_name("contiguous-heap", serving.contiguous_heap, HEAPS.names())
    if not 0 <= serving.watermark < 1:
        raise ConfigError(f"watermark {serving.watermark} is a share of the blocks: needs 0 or more, below 1")
    if serving.block_size > 1 << 16:
        raise ConfigError(f"block-size {serving.block_size}: needs 1 to {1 << 16:,} tokens; vLLM's default is 16")


def _without_usual(
    serving: ServingConfig, engine: EnginePreset, model: ModelSpec, hardware: HardwareSpec, limits: SchedulerSettings
) -> ServingConfig:
    """Return `serving` without the settings that say what would be so anyway.

    It is first filled in, so that what was left out and what a config.toml says in its place come to the same.
    """

    def in_force(its: ServingConfig) -> tuple[object, ...] | None:
        try:
            limits = engine.scheduler_settings(its, model, hardware)
        except ConfigError:  # without one limit, another may be impossible
            return None
        return limits, engine.ledger(its, hardware, limits), engine.allocators(its)

    derived, wanted = engine.derived_settings(serving), in_force(serving)
    filled = replace(serving, **derived, **{name: getattr(limits, name) for name in _LIMITS})
    for name in (*derived, *_LIMITS, *derived):  # derived ones again: without a limit that they rest on, they may be usual
        left_out: dict[str, Any] = {name: None}
        without = replace(filled, **left_out)
        filled = without if in_force(without) == wanted else filled
    gate, usual_gate = (engine.admission(each)[0] for each in (serving, replace(serving, scheduler_reserve_full_isl=None)))
    utilization = serving.gpu_memory_utilization
    keeps_state = model.kv_spec(serving.kv_cache_dtype).state_bytes_per_sequence > 0
    return replace(
        filled,
        engine=engine.name,
        gpu_memory_utilization=None if utilization == engine.default_utilization(hardware) else utilization,
        scheduler_reserve_full_isl=None if gate == usual_gate else serving.scheduler_reserve_full_isl,
        clock_derate=None if serving.clock_derate == 1 else serving.clock_derate,
        cpu_bandwidth=serving.cpu_bandwidth if hardware.read_bandwidth != load_hardware(serving.hardware).read_bandwidth else None,
        enable_prefix_caching=None if keeps_state or serving.enable_prefix_caching else serving.enable_prefix_caching,
    )


def _pool(
    serving: ServingConfig,
    engine: EnginePreset,
    kv_spec: KVCacheSpec,
    budget: MemoryBudget,
    limits: SchedulerSettings,
    *,
    num_blocks: int,
    offload_blocks: int,
) -> KVPoolSettings:
    """Return the pool of one block table for all layers, with `num_blocks` of all of them."""
    reserve_full_isl, freed_to_front = engine.admission(serving)
    state_bytes = kv_spec.state_bytes_per_sequence
    return KVPoolSettings(
        num_blocks=num_blocks,
        block_size=budget.block_size,
        max_num_seqs=limits.max_num_seqs,
        max_model_len=limits.max_model_len,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        kv_cache_dtype=serving.kv_cache_dtype,
        page_tokens=_page_tokens(kv_spec),
        contiguous_heap=serving.contiguous_heap,
        watermark=serving.watermark,
        reserve_full_isl=reserve_full_isl,
        freed_to_front=freed_to_front,
        lookahead_slots=limits.num_speculative_tokens,
        enable_prefix_caching=bool(engine.caching_allocators) and serving.enable_prefix_caching is not False and not state_bytes,
        offload_blocks=offload_blocks,
        window_tokens=budget.window_tokens,
        window_cells=budget.window_cells,
        context_checkpoints=DEFAULT_CHECKPOINTS if serving.ctx_checkpoints is None else serving.ctx_checkpoints,
        ubatch_tokens=serving.ubatch_size or LlamaCppSettings().n_ubatch,
        state_slots=-(-state_bytes // budget.kv_bytes_per_token),
    )


def _page_tokens(kv_spec: KVCacheSpec) -> int:
    """Return the tokens whose keys fill a page of `PAGE_BYTES` in the widest layer."""
    key_bytes, _ = kv_element_pair_bytes(kv_spec.dtype_name)
    widest = max(group.num_kv_heads * group.key_dim * key_bytes / group.compression for group in kv_spec.groups)
    return int(PAGE_BYTES // widest)
