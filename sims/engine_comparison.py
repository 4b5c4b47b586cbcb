"""Several engines with the same load on the same machine, each under its own rules, side by side in the answer."""

from dataclasses import dataclass, replace
from typing import Any

from pagedkv.errors import ConfigError
from pagedkv.sims.budget_parts import budget_document
from pagedkv.sims.command import flat
from pagedkv.sims.config import ATTAIN, SimulationConfig
from pagedkv.sims.engine_flags import engine_names, of_one_engine, refuse_flags_of_others
from pagedkv.sims.engines import load_engine
from pagedkv.sims.results import SCHEMA_VERSION, Results, simulate
from pagedkv.sims.scenario import Scenario, resolve
from pagedkv.sims.simulation import Progress


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineComparison:
    """What several engines did."""

    config: SimulationConfig
    """As asked for, with all the engines."""
    results: dict[str, Results]
    """By engine, in the order in which they were named; those that do not start are left out."""
    refused: dict[str, str]
    """By engine that does not start: why, and what would."""

    def document(self) -> dict[str, Any]:
        """Return the comparison as one result document: what each engine has, does and rests on, a result per column."""
        documents = {engine: results.document() for engine, results in self.results.items()}
        return {
            "schema_version": SCHEMA_VERSION,
            "config": flat(self.config),
            "configs": {engine: document["config"] for engine, document in documents.items()},
            "budgets": {engine: budget_document(results.scenario.deployment.budget) for engine, results in self.results.items()},
            "calibrations": {engine: document["calibration"] for engine, document in documents.items()},
            "rules": {engine: rules_of(results.scenario) for engine, results in self.results.items()},
            "refused": self.refused,
            "results": [column for document in documents.values() for column in document["results"]],
        }


def rules_of(scenario: Scenario) -> dict[str, str]:
    """Return what this engine does here, and what it does when memory runs out, in words with this machine's numbers."""
    deployment = scenario.deployment
    serving, limits, pool = deployment.config, deployment.scheduler, deployment.pool_of(scenario.allocators[0])
    return {
        "rules": deployment.engine.in_words(serving, limits, pool),
        "at_exhaustion": deployment.engine.at_exhaustion(serving),
    }


def scenarios(config: SimulationConfig) -> tuple[dict[str, Scenario], dict[str, str]]:
    """Return the scenario of each engine that `config` names, and why others do not start.

    Raises:
        ConfigError: If an engine or a setting is not known, or none of them starts.
    """
    refuse_flags_of_others(config.serving)
    ready: dict[str, Scenario] = {}
    refused: dict[str, str] = {}
    for name in engine_names(config.serving):
        preset = load_engine(name)  # a name that is unknown is a mistake, whatever the others do
        serving, measurement = of_one_engine(config.serving, name), config.measurement
        if measurement.allocator is None:
            measurement = replace(measurement, allocator=preset.columns(serving))
        try:
            ready[name] = resolve(replace(config, serving=serving, measurement=measurement))
        except ConfigError as error:
            refused[name] = str(error)
    if not ready:
        raise ConfigError("none of these engines starts. " + " ".join(f"{name}: {why}" for name, why in refused.items()))
    return ready, refused


def compare_engines(
    config: SimulationConfig, ready: dict[str, Scenario], refused: dict[str, str], *, progress: Progress | None = None
) -> EngineComparison:
    """Run every scenario of `ready` on the same requests."""
    results = {}
    for engine, scenario in ready.items():
        tell = None if progress is None else _telling(progress, engine)
        results[engine] = simulate(scenario, attain=ATTAIN, progress=tell)
    return EngineComparison(config=config, results=results, refused=refused)


def column_name(engine: str, allocator: str) -> str:
    """Return what a column is called."""
    return f"{engine} {allocator}"


def _telling(progress: Progress, engine: str) -> Progress:
    return lambda allocator, repeat, share: progress(column_name(engine, allocator), repeat, share)
