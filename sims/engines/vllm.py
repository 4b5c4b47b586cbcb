"""vLLM v1: one pool of blocks sized by --gpu-memory-utilization, recompute on preemption, defaults by device and version."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from pagedkv.allocation import KVPoolSettings
from pagedkv.catalogue import load_model
from pagedkv.errors import ConfigError
from pagedkv.hardware_spec import HardwareSpec
from pagedkv.layer_groups import groups_differ
from pagedkv.ledgers.vllm import VLLMLedger
from pagedkv.model_spec import ModelSpec
from pagedkv.scheduling.scheduler import Scheduler
from pagedkv.scheduling.scheduler_settings import SchedulerSettings
from pagedkv.scheduling.step import StepScheduler
from pagedkv.sims.config import DEFAULT_ALLOCATORS, ServingConfig, names_several_models
from pagedkv.sims.engines import ENGINES
from pagedkv.sims.engines._shared import longest_request, vllm_ledger
from pagedkv.sims.vllm_versions import CURRENT, VLLMVersion, vllm_version
from pagedkv.step_allocation import step_allocator


@dataclass(frozen=True, slots=True)
class VLLM:
    """The engine of `vllm serve`. Source: vLLM's EngineArgs, gpu_worker and the v1 scheduler."""

    version: VLLMVersion
    """What its version does differently."""

    @property
    def name(self) -> str:
        """What a user writes after --engine."""
        return "vllm" if self.version is CURRENT else f"vllm@{self.version.name}"

    @property
    def setting(self) -> str:
        """The flag of its share of the memory."""
        return "gpu-memory-utilization"

    @property
    def caching_allocators(self) -> tuple[str, ...]:
        """Paged memory, with a second tier or without, and blocks per group of layers."""
        return ("paged", "paged-offload", "hybrid")

    def allocators(self, serving: ServingConfig) -> tuple[str, ...]:
        """Return its own memory, and what that is compared with; drafts are for its own only."""
        own = self.columns(serving)
        return own if serving.num_speculative_tokens else (*own, *(name for name in DEFAULT_ALLOCATORS if name != "paged"))

    def runs_eagerly(self, serving: ServingConfig) -> bool:
        """Return what the user says."""
        return serving.enforce_eager

    def at(self, engine: str) -> "VLLM":
        """Return the preset of the version that `engine` names.

        Raises:
            ConfigError: If there is no such version, with those that there are.
        """
        return VLLM(vllm_version(engine))

    def default_utilization(self, hardware: HardwareSpec) -> float:
        """Return the machine's share, and no more than this version takes."""
        return min(hardware.default_utilization.value, self.version.gpu_memory_utilization)

    def admission(self, serving: ServingConfig) -> tuple[bool, bool]:
        """Return whether the full-prompt gate is on, and whether freed blocks are handed out next.

        Raises:
            ConfigError: If `serving` asks for what this version does not have.
        """
        if serving.watermark and not self.version.has_watermark:
            raise ConfigError(
                f"--watermark {serving.watermark:g}: vLLM {self.version.name} has none. "
                f"Leave it out, or use --engine vllm, which is {CURRENT.name}"
            )
        gate = serving.scheduler_reserve_full_isl
        return self.version.reserve_full_isl if gate is None else gate, self.version.freed_to_front

    def derived_settings(self, serving: ServingConfig) -> Mapping[str, Any]:
        """Return none: each of its settings is decided alone."""
        del serving
        return {}

    def columns(self, serving: ServingConfig) -> tuple[str, ...]:
        """Return paged memory, with blocks per layer group where layers differ, with a second tier and without if there is one.

        The others are no part of vLLM. With a second tier it has one block table for all layers.
        """
        if serving.offload_size is not None:
            return ("paged-offload", "paged")
        if serving.disable_hybrid_kv_cache_manager or names_several_models(serving):  # these are refused, with what would work
            return ("paged",)
        return ("hybrid",) if groups_differ(load_model(serving.model).layer_groups) else ("paged",)

    def in_words(self, serving: ServingConfig, limits: SchedulerSettings, pool: KVPoolSettings) -> str:
        """Return how it batches."""
        del serving
        chunks = "in chunks beside the others' decoding" if limits.enable_chunked_prefill else "whole"
        gate = "when all its known tokens fit" if pool.reserve_full_isl else "when its next tokens fit"
        cache = ", and finished blocks stay for prompts that begin alike" if pool.enable_prefix_caching else ""
        return (
            f"A request starts {gate}, takes blocks of {pool.block_size} tokens as it grows{cache}; prompts are computed {chunks}, "
            f"{limits.max_num_batched_tokens:,} tokens a step."
        )

    def at_exhaustion(self, serving: ServingConfig) -> str:
        """Return what preemption does."""
        del serving
        return "the request that came last is preempted and recomputes"

    def scheduler_settings(self, serving: ServingConfig, model: ModelSpec, hardware: HardwareSpec) -> SchedulerSettings:
        """Return vLLM's limits of a step: its defaults depend on the device.

        Source: EngineArgs (max_num_seqs by default is at most the tokens of a step), SchedulerConfig.verify_max_model_len.

        Raises:
            ConfigError: If a step has fewer tokens than max_num_seqs, as vLLM has it.
        """
        longest, chunked = longest_request(serving, model), serving.enable_chunked_prefill is not False
        counts_alone = hardware.unified and not self.version.knows_gb10
        device = replace(hardware, small_compute_device=False) if counts_alone else hardware
        tokens, seqs = serving.max_num_batched_tokens, serving.max_num_seqs
        if tokens is None:
            tokens = device.default_max_num_batched_tokens
            if not chunked:
                tokens = max(tokens, longest)  # a prompt must fit into one step
        if seqs is None:
            seqs = min(device.default_max_num_seqs, max(tokens, 1))
        elif 0 < tokens < seqs:
            given = "" if serving.max_num_batched_tokens else ", the default"
            raise ConfigError(
                f"max-num-batched-tokens is {tokens:,}{given}, and max-num-seqs {seqs:,}: vLLM does not start with fewer "
                f"tokens than requests in a step; --max-num-batched-tokens {seqs} or --max-num-seqs {tokens} would do"
            )
        return SchedulerSettings(
            max_num_seqs=seqs,
            max_num_batched_tokens=tokens,
            max_model_len=longest,
            enable_chunked_prefill=chunked,
            long_prefill_token_threshold=serving.long_prefill_token_threshold,
            num_speculative_tokens=serving.num_speculative_tokens or 0,
        )

    def scheduler(self, serving: ServingConfig, limits: SchedulerSettings, pool: KVPoolSettings, allocator: str) -> StepScheduler:
        """Return vLLM's scheduler; it runs on any allocator."""
        del serving
        return Scheduler(limits, step_allocator(allocator, pool))

    def ledger(self, serving: ServingConfig, hardware: HardwareSpec, limits: SchedulerSettings) -> VLLMLedger:
        """Return vLLM's ledger: KV gets what utilization leaves after weights, overhead, activations and graphs."""
        del limits
        return vllm_ledger(serving, self.default_utilization(hardware), cuda_graphs_set_aside=self.version.cuda_graphs_set_aside)


ENGINES.register("vllm")(VLLM(CURRENT))
