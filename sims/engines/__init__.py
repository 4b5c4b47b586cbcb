"""Serving engines as presets, one per file: the defaults and the rules that a user of that engine gets."""

from typing import Protocol

from pagedkv.hardware_spec import HardwareSpec
from pagedkv.memory_budget import MemoryBudget
from pagedkv.model_spec import ModelSpec
from pagedkv.registry import Registry
from pagedkv.scheduling.scheduler import SchedulerSettings
from pagedkv.sims.config import ServingConfig
from pagedkv.weight_format import WeightFormat


class EnginePreset(Protocol):
    """Turns what a user asked for into settings, as this engine would."""

    def scheduler_settings(self, serving: ServingConfig, model: ModelSpec, hardware: HardwareSpec) -> SchedulerSettings:
        """Return the limits of a step, with the engine's defaults for this machine where the user set none."""

    def memory_budget(
        self,
        serving: ServingConfig,
        model: ModelSpec,
        weight_format: WeightFormat,
        hardware: HardwareSpec,
        settings: SchedulerSettings,
    ) -> MemoryBudget:
        """Return how the engine divides the machine's memory.

        Raises:
            ConfigError: If it would not start, with settings under which it would.
        """


ENGINES: Registry[EnginePreset] = Registry(__name__, kind="engine")
