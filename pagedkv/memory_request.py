"""What a memory budget is asked for, and what an engine's ledger must be able to answer."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol, TypeAlias

from pagedkv.errors import ConfigError
from pagedkv.hardware_spec import HardwareSpec
from pagedkv.kv_spec import KVCacheSpec, LayerGroup
from pagedkv.layer_groups import LayerGroupPlan, plan_layer_groups
from pagedkv.memory_budget import MemoryBudget, Shortage
from pagedkv.model_spec import ModelSpec
from pagedkv.readable_formats import default_format
from pagedkv.start_up import StartUp
from pagedkv.units import GIB, MIB, gib
from pagedkv.weight_format import WeightFormat


class Ledger(Protocol):
    """One engine's rule of dividing memory, with that engine's own settings. A frozen dataclass whose fields are flags."""

    @property
    def block_size(self) -> int:
        """Tokens per block."""

    @property
    def null_blocks(self) -> int:
        """Blocks of the pool that no request can hold."""

    @property
    def windows_apart(self) -> bool:
        """Whether layers with a window have a cache of their own, and blocks only the others."""

    @property
    def weight_formats(self) -> tuple[str, ...]:
        """Narrower weight formats to propose, the widest first."""

    def check(self, request: "MemoryRequest") -> None:
        """Refuse settings that no machine could make work.

        Raises:
            ConfigError: With the value and the range that would work.
        """

    def attempt(self, request: "MemoryRequest") -> MemoryBudget | Shortage:
        """Return the budget, or why there is none. The values have been checked."""

    def reason(self, request: "MemoryRequest", shortage: Shortage) -> str:
        """Return what is missing, with this machine's numbers."""

    def remedies(self) -> "tuple[Remedy, ...]":
        """Return the changes that may help, the mildest first."""

    def start_up(self, request: "MemoryRequest") -> StartUp:
        """Return what the engine does between its start and its first request."""

    def starved_blocks(self, request: "MemoryRequest", budget: MemoryBudget, lost_bytes: int) -> int:
        """Return the blocks that there would be if `lost_bytes` were missing where the engine sizes its KV cache."""

    def cautious(self, request: "MemoryRequest", budget: MemoryBudget) -> "Iterator[Ledger]":
        """Yield settings with a KV cache that is surer to come, or smaller, the mildest first."""

    def on(self, hardware: HardwareSpec) -> "tuple[Ledger, ...]":
        """Return the ledgers that a user may end up with on another machine: with these settings, or with its defaults."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftMemory:
    """What speculative decoding holds beside the model."""

    weight_bytes: int
    """Weights of the draft model, layer or heads."""
    kv_groups: tuple[LayerGroup, ...]
    """What it caches of every token, in the model's blocks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryRequest:
    """A model, a machine and an engine's ledger, and what they have in common for every engine."""

    model: ModelSpec
    """The model to serve."""
    hardware: HardwareSpec
    """The machine to serve it on."""
    engine: str
    """As after --engine: which weight formats it reads, and has where nobody asks for one."""
    ledger: Ledger
    """Its rule and settings."""
    weight_format: WeightFormat
    """How the weights are stored."""
    kv_cache_dtype: str = "auto"
    """Element type of the KV cache."""
    max_model_len: int
    """The longest request, prompt and output, in tokens."""
    max_num_seqs: int
    """Most sequences in one step."""
    max_num_batched_tokens: int
    """Most tokens in one step."""
    enforce_eager: bool = False
    """No CUDA graphs."""
    tensor_parallel_size: int = 1
    """Devices that share a model's weights."""
    draft: DraftMemory | None = None
    """What drafts, if something does."""
    layers_apart: bool = False
    """Layers that cache differently have block tables of their own, and windows give blocks back: `pagedkv.layer_groups`."""
    free_memory_bytes: int | None = None
    """Memory free when the engine starts, if known; otherwise what the operating system and other programs leave."""
    os_reserve_bytes: int | None = None
    """What the operating system holds; None takes the machine's figure."""
    other_programs_bytes: int = 0
    """What other programs hold."""

    def check(self) -> None:
        """Refuse values that no machine could make work, the ledger's included.

        Raises:
            ConfigError: With the value and the range that would work.
        """
        if self.tensor_parallel_size != 1:
            raise ConfigError(
                f"--tensor-parallel-size {self.tensor_parallel_size}: one device is supported so far, use 1; what it cannot "
                f"hold may fit with a narrower --quantization or on a larger --hardware"
            )
        for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} {getattr(self, name)} must be at least 1")
        if self.max_model_len > self.model.max_context:
            raise ConfigError(
                f"--max-model-len {self.max_model_len} is longer than {self.model.title} was made for: "
                f"use {self.model.max_context} or less"
            )
        if not self.model.kv_spec(self.kv_cache_dtype).bytes_per_token:
            raise ConfigError(f"{self.model.title} caches only states of fixed size: a cache without tokens has no blocks to plan")
        for name in ("free_memory_bytes", "os_reserve_bytes", "other_programs_bytes"):
            check_size(name, getattr(self, name), self.hardware)
        self.ledger.check(self)

    def attempt(self) -> MemoryBudget | Shortage:
        """Return the budget, or why there is none. The values have been checked."""
        return self.ledger.attempt(self)

    def default_format(self, model: ModelSpec) -> WeightFormat:
        """Return the weight format that a model has under this engine where nobody asks for one."""
        return default_format(self.engine, model.native_format)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block as the engine counts them, in `kv_cache_dtype`.

        In all layers that have blocks, those that draft included; if layers are apart, in those of one group.
        """
        return self._layer_groups.page_bytes if self.layers_apart else self._kv_spec.block_bytes(self.ledger.block_size)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of one token in all layers that have blocks, those that draft included."""
        return self._kv_spec.bytes_per_token

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights, those that draft included."""
        return self.model.weight_bytes(self.weight_format) + (0 if self.draft is None else self.draft.weight_bytes)

    @property
    def _layer_groups(self) -> LayerGroupPlan:
        return plan_layer_groups(self._kv_spec.groups, block_size=self.ledger.block_size, kv_cache_dtype=self.kv_cache_dtype)

    @property
    def window_spec(self) -> KVCacheSpec | None:
        """The layers that the engine caches apart from its blocks; None if there are none."""
        return self._kv_specs[1]

    @property
    def _kv_spec(self) -> KVCacheSpec:
        return self._kv_specs[0]

    @property
    def _kv_specs(self) -> tuple[KVCacheSpec, KVCacheSpec | None]:
        """What is in blocks, and what is apart from them."""
        spec = self.model.kv_spec(self.kv_cache_dtype)
        spec = spec if self.draft is None else replace(spec, groups=(*spec.groups, *self.draft.kv_groups))
        return spec.apart() if self.ledger.windows_apart else (spec, None)

    @property
    def blocks_for_one_request(self) -> int:
        """Blocks without which a request of `max_model_len` tokens cannot finish, its state and null blocks included."""
        return self.bytes_for_one_request // self.block_bytes + self.ledger.null_blocks

    @property
    def bytes_for_one_request(self) -> int:
        """Bytes of the blocks that a request of `max_model_len` tokens holds at its peak, its state included."""
        spec, size = self._kv_spec, self.ledger.block_size
        if self.layers_apart:
            rules = self._layer_groups.rules(max_model_len=self.max_model_len, enable_caching=False)
            return self.block_bytes * sum(rule.peak_blocks(self.max_model_len, self.max_num_batched_tokens) for rule in rules)
        state_slots = -(-spec.state_bytes_per_sequence // spec.bytes_per_token)
        return (-(-self.max_model_len // size) + -(-state_slots // size)) * self.block_bytes

    def tokens_held(self, budget: MemoryBudget) -> int:
        """Return the tokens that requests can hold by `budget`; if layers are apart, those of requests of `max_model_len`.

        That is how vLLM's log counts them: of the blocks that a request takes, some do not depend on its length.
        """
        if self.layers_apart:
            return int(budget.kv_cache / self.bytes_for_one_request * self.max_model_len)
        return budget.usable_blocks * budget.block_size

    @property
    def taken_by_others(self) -> tuple[int, int]:
        """Bytes of the operating system and of other programs.

        When the free memory is known, what is taken is known too, and only its split is not: on unified memory the
        operating system has what `other_programs_bytes` does not explain, on a discrete GPU other programs have the rest.
        """
        os_reserve = int(self.hardware.os_reserve.value) if self.os_reserve_bytes is None else self.os_reserve_bytes
        other_programs = self.other_programs_bytes
        if self.free_memory_bytes is not None:
            taken = self.hardware.visible_bytes - self.free_memory_bytes
            other_programs = min(other_programs, taken) if self.hardware.unified else taken - min(os_reserve, taken)
            os_reserve = taken - other_programs
        return os_reserve, other_programs

    @property
    def free_at_start(self) -> int:
        """Bytes that the operating system and other programs leave to the engine."""
        return self.hardware.visible_bytes - sum(self.taken_by_others)


Remedy: TypeAlias = Callable[[MemoryRequest], Iterator[MemoryRequest]]
"""Yields changed requests, the mildest change first. Nobody has checked yet whether they fit."""


def check_size(name: str, size_bytes: int | None, hardware: HardwareSpec) -> None:
    """Refuse a size that is negative or more than the machine has.

    Raises:
        ConfigError: With the size and the range that would work.
    """
    if size_bytes is not None and not 0 <= size_bytes <= hardware.visible_bytes:
        flag = "--" + name.replace("_", "-")
        if flag != "--kv-cache-memory-bytes":
            flag = flag.removesuffix("-bytes")
        size = f"{size_bytes:,} bytes" if size_bytes % MIB else f"{size_bytes / GIB:g}GiB"
        raise ConfigError(f"{flag} {size}: needs 0 to {gib(hardware.visible_bytes)}, all of {hardware.title}")
