"""Serving engines as presets, one per file: the defaults and the rules that a user of that engine gets."""

from collections.abc import Mapping
from typing import Any, Protocol

from pagedkv.allocation import KVPoolSettings
from pagedkv.errors import ConfigError
from pagedkv.hardware_spec import HardwareSpec
from pagedkv.memory_request import Ledger
from pagedkv.model_spec import ModelSpec
from pagedkv.registry import Registry
from pagedkv.scheduling.scheduler_settings import SchedulerSettings
from pagedkv.scheduling.step import StepScheduler
from pagedkv.sims.config import ServingConfig


class EnginePreset(Protocol):
    """Turns what a user asked for into settings, as this engine would."""

    @property
    def name(self) -> str:
        """What a user writes after --engine; without a version if it is the current one."""

    @property
    def setting(self) -> str | None:
        """The flag of `MemoryBudget.utilization`; None: there is none."""

    def allocators(self, serving: ServingConfig) -> tuple[str, ...]:
        """Return the allocators that are compared where the user names none; the first is what the engine runs on."""

    def columns(self, serving: ServingConfig) -> tuple[str, ...]:
        """Return the allocators that stand for this engine beside other engines."""

    def in_words(self, serving: ServingConfig, limits: SchedulerSettings, pool: KVPoolSettings) -> str:
        """Return a sentence or two on what it does with its memory, with these numbers."""

    def at_exhaustion(self, serving: ServingConfig) -> str:
        """Return what happens when memory runs out, as the rest of a sentence."""

    @property
    def caching_allocators(self) -> tuple[str, ...]:
        """Those under which this engine can keep prefixes."""

    def at(self, engine: str) -> "EnginePreset":
        """Return the preset of the version that `engine`, such as "vllm@0.19", names.

        Raises:
            ConfigError: If there is no such version, with those that there are.
        """

    def default_utilization(self, hardware: HardwareSpec) -> float:
        """Return the share of the visible memory that the engine takes where the user says nothing."""

    def admission(self, serving: ServingConfig) -> tuple[bool, bool]:
        """Return whether a request is admitted only if all its known tokens fit, and whether freed blocks are handed out next.

        Raises:
            ConfigError: If `serving` asks for what this version does not have.
        """

    def runs_eagerly(self, serving: ServingConfig) -> bool:
        """Return whether kernels are launched one by one, not as CUDA graphs."""

    def scheduler_settings(self, serving: ServingConfig, model: ModelSpec, hardware: HardwareSpec) -> SchedulerSettings:
        """Return the limits of a step, with the engine's defaults for this machine where the user set none."""

    def derived_settings(self, serving: ServingConfig) -> Mapping[str, Any]:
        """Return the settings, besides the limits of a step, that it decides by what else is set; by field name.

        Written down with the limits, they repeat a run: the limits alone could read as another wish.
        """

    def scheduler(self, serving: ServingConfig, limits: SchedulerSettings, pool: KVPoolSettings, allocator: str) -> StepScheduler:
        """Return the engine's scheduler over `allocator`, with nobody in it.

        Raises:
            ConfigError: If this engine does not run on `allocator`, with those that it does.
        """

    def ledger(self, serving: ServingConfig, hardware: HardwareSpec, limits: SchedulerSettings) -> Ledger:
        """Return the rule by which the engine divides the machine's memory, with what the user set."""


def only_on(preset: EnginePreset, allocator: str, serving: ServingConfig) -> None:
    """Refuse an allocator that is not the engine's.

    Raises:
        ConfigError: With those that are.
    """
    own = preset.allocators(serving)
    if allocator not in own:
        raise ConfigError(f"--allocator {allocator}: {preset.name} runs on {' and '.join(own)}; leave it out, or use --engine vllm")


ENGINES: Registry[EnginePreset] = Registry(__name__, kind="engine")


def load_engine(engine: str) -> EnginePreset:
    """Return the preset that `engine`, a name or name@version, names.

    Raises:
        ConfigError: If there is no such engine or version, with those that there are.
    """
    name, at, _ = engine.partition("@")
    preset = ENGINES.load(name)
    return preset.at(engine) if at else preset
