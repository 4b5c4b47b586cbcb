"""How many users, or how long a context, several engines serve: each asked alone, with its own settings and allocator."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias

from pagedkv.errors import ConfigError
from pagedkv.sims.capacity_answer import CapacityAnswer
from pagedkv.sims.command import flat
from pagedkv.sims.config import SimulationConfig
from pagedkv.sims.deployment import deploy
from pagedkv.sims.engine_comparison import column_name
from pagedkv.sims.engine_flags import engine_names, of_one_engine, refuse_flags_of_others
from pagedkv.sims.engines import load_engine
from pagedkv.sims.max_context import ContextAnswer
from pagedkv.sims.scenario import asked_allocators

Answer: TypeAlias = CapacityAnswer | ContextAnswer


class Search(Protocol):
    """A question about one engine with one allocator."""

    def __call__(
        self, config: SimulationConfig, allocator: str, *, attain: float, progress: Callable[[float], None] | None = None
    ) -> Answer:
        """Return its answer.

        Raises:
            ConfigError: If there is none, with what would have one.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineAnswer:
    """What one engine comes to with one allocator."""

    engine: str
    """As after --engine."""
    weights: str
    """Their format."""
    answer: Answer

    @property
    def found(self) -> CapacityAnswer:
        """The answer, whatever was asked."""
        return self.answer.found if isinstance(self.answer, ContextAnswer) else self.answer

    def document(self) -> dict[str, Any]:
        """Return the answer in JSON types, as of this engine alone."""
        return {"engine": self.engine, "weights": self.weights, **self.answer.document()}


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineAnswers:
    """What several engines come to."""

    config: SimulationConfig
    """As asked for, with all the engines."""
    configs: dict[str, SimulationConfig]
    """By engine that has an answer: what it was asked."""
    answers: tuple[EngineAnswer, ...]
    """In the order in which the engines were named, of each as many as it has allocators."""
    refused: dict[str, str]
    """By engine that has none: why, and what would."""

    def document(self) -> dict[str, Any]:
        """Return all of it in JSON types."""
        return {
            "config": flat(self.config),
            "configs": {engine: flat(config) for engine, config in self.configs.items()},
            "refused": self.refused,
            "answers": [each.document() for each in self.answers],
        }


def engine_configs(config: SimulationConfig) -> dict[str, SimulationConfig]:
    """Return what each engine that `config` names is asked, with the allocators: the engine's own where none is named.

    Raises:
        ConfigError: If an engine, an allocator or a setting is not known, or no engine has the setting.
    """
    refuse_flags_of_others(config.serving)
    found = {}
    for name in engine_names(config.serving):
        preset, serving = load_engine(name), of_one_engine(config.serving, name)
        allocators = asked_allocators(config.measurement, usual=preset.columns(serving)[:1])
        found[name] = replace(config, serving=serving, measurement=replace(config.measurement, allocator=allocators))
    return found


def columns(configs: dict[str, SimulationConfig]) -> list[str]:
    """Return the names of all searches, in order: what `ask_engines` tells of its progress by."""
    return [column_name(name, allocator) for name, its in configs.items() for allocator in its.measurement.allocator or ()]


def ask_engines(
    search: Search,
    config: SimulationConfig,
    configs: dict[str, SimulationConfig],
    *,
    attain: float,
    progress: Callable[[str, int, float], None] | None = None,
) -> EngineAnswers:
    """Ask `search` once for each engine and allocator of `configs`.

    Raises:
        ConfigError: If no engine has an answer.
    """
    answers: list[EngineAnswer] = []
    refused: dict[str, str] = {}
    for name, its in configs.items():
        try:
            weights = deploy(its.serving).weight_format.name
            for allocator in its.measurement.allocator or ():
                tell = None if progress is None else _telling(progress, column_name(name, allocator))
                found = search(its, allocator, attain=attain, progress=tell)
                answers.append(EngineAnswer(engine=name, weights=weights, answer=found))
        except ConfigError as error:
            refused[name] = str(error)
    if not answers:
        reasons = list(dict.fromkeys(refused.values()))
        alike = len(reasons) == 1  # a mistake in what is asked, whichever the engine
        raise ConfigError(reasons[0] if alike else "no engine has an answer. " + " ".join(f"{n}: {w}" for n, w in refused.items()))
    return EngineAnswers(
        config=config,
        configs={name: its for name, its in configs.items() if name not in refused},
        answers=tuple(answers),
        refused=refused,
    )


def _telling(progress: Callable[[str, int, float], None], column: str) -> Callable[[float], None]:
    return lambda share: progress(column, 0, share)
