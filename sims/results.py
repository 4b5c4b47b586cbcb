"""The result document: the one schema of --json, summary.json and everything that shows results. docs/metrics.md explains it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pagedkv.sims.budget_parts import budget_document
from pagedkv.sims.command import flat
from pagedkv.sims.config import ATTAIN, time_text
from pagedkv.sims.engine_flags import ENGINE_FLAGS
from pagedkv.sims.error_interval import error_intervals
from pagedkv.sims.load_flags import DEFAULT_LENGTHS
from pagedkv.sims.metrics import measure
from pagedkv.sims.scenario import Scenario
from pagedkv.sims.simulation import Progress, Run, run
from pagedkv.sims.statistics import ci95
from pagedkv.sims.verdict import Verdict, judge

SCHEMA_VERSION = 1

_SUMMED = ("num_", "iterations", "request_steps", "simulated_s", "up_s", "load_s")
_LARGEST = ("running_max", "num_replicas", "replica", "held_bytes", "context")
"""Of these the largest is taken; replicas are the same in every repeat."""
_LATENCIES = ("ttft_s", "tpot_s", "itl_s", "e2e_s")
_ONE_BY_ONE = ("replicas", "classes", "models")
"""Lists of rows: the same ones in every repeat."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AllocatorResult:
    """What one allocator did with the load."""

    runs: list[Run]
    """One per repeat."""
    figures: dict[str, Any]
    """Figures over all repeats, by schema name."""
    verdict: Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """A simulation, done."""

    scenario: Scenario
    by_allocator: dict[str, AllocatorResult]

    def document(self) -> dict[str, Any]:
        """Return the result document: JSON types only, no data is None."""
        scenario = self.scenario
        serving = scenario.config.serving
        return {
            "schema_version": SCHEMA_VERSION,
            "config": resolved_config(scenario),
            "budget": budget_document(scenario.deployment.budget),
            "calibration": scenario.deployment.calibration.document(),
            "results": [
                {
                    "allocator": name,
                    "placement": result.runs[0].allocator.placement,
                    "engine": serving.engine,
                    "model": scenario.model_name,
                    "hardware": scenario.deployment.hardware.name,
                    **result.figures,
                    "error_interval": error_intervals(
                        result.figures, scenario.deployment.calibration, [run.recorder for run in result.runs]
                    ),
                    "verdict": {
                        "status": result.verdict.status,
                        "fits": result.verdict.fits,
                        "binding": result.verdict.binding,
                        "attained": result.verdict.attained,
                        "text": result.verdict.text,
                        "next_command": result.verdict.next_command,
                    },
                }
                for name, result in self.by_allocator.items()
            ],
        }


def simulate(scenario: Scenario, *, attain: float = ATTAIN, progress: Progress | None = None) -> Results:
    """Run every allocator of `scenario`, each `repeats` times, on the same requests; seeds count up from the given one.

    The verdicts want a share `attain` of the requests within the goals.
    """
    measurement = scenario.config.measurement
    by_allocator = {}
    for name in scenario.allocators:
        runs = []
        for repeat in range(measurement.repeats):
            tell = None if progress is None else _telling(progress, name, repeat)
            runs.append(run(scenario, name, seed=measurement.seed + repeat, progress=tell))
        figures = combine([measure(each, scenario.goals) for each in runs])
        verdict = judge(scenario, figures, runs, attain=attain)
        by_allocator[name] = AllocatorResult(runs=runs, figures=figures, verdict=verdict)
    return Results(scenario=scenario, by_allocator=by_allocator)


def _telling(progress: Progress, name: str, repeat: int) -> Any:
    return lambda share: progress(name, repeat, share)


def combine(repeats: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures over all repeats: counts and steps summed, everything else the mean over the repeats that have it.

    Replicas, and classes of users, are combined one by one.

    Latencies get `ci95`, the 95 % confidence interval of their mean; the top-level `ci95` has the intervals of the other rates
    and of the percentiles ("ttft_s.p99"). Both are None for a single run.
    """
    combined: dict[str, Any] = {}
    intervals: dict[str, list[float]] = {}

    def merge(name: str, values: list[Any]) -> Any:
        present = [value for value in values if value is not None]
        if not present:
            return None
        if isinstance(present[0], dict):
            return {key: merge(f"{name}.{key}", [value[key] for value in present]) for key in present[0]}
        if name in _ONE_BY_ONE:
            return [merge(f"{name}.{i}", list(rows)) for i, rows in enumerate(zip(*present, strict=True))]
        if isinstance(present[0], str):
            return present[0]
        if isinstance(present[0], list):
            return sorted(set().union(*present))
        last = name.rpartition(".")[2]
        if last in _LARGEST:
            return max(present)
        if last.startswith(_SUMMED):
            return sum(present)
        if name.partition(".")[0] not in _ONE_BY_ONE and (interval := ci95(present)) is not None:
            intervals[name] = list(interval)
        return sum(present) / len(present)

    for name in repeats[0]:
        combined[name] = merge(name, [figures[name] for figures in repeats])
    for name in _LATENCIES:
        if combined[name] is not None:
            combined[name]["ci95"] = intervals.pop(f"{name}.mean", None)
    combined["ci95"] = intervals or None
    return combined


def resolved_config(scenario: Scenario) -> dict[str, Any]:
    """Return every setting by field name, with the defaults that model, machine, engine and load decided filled in.

    None is left where a setting does not apply. `to_toml` of it runs again to the same results.
    """
    settings = flat(scenario.config)
    settings |= {
        "model": scenario.deployment.model.name if scenario.model_serving is None else scenario.config.serving.model,
        "allocator": list(scenario.allocators),
        "goodput": list(scenario.config.measurement.goodput),
        "max_model_len": scenario.deployment.scheduler.max_model_len,
        "max_num_seqs": scenario.deployment.scheduler.max_num_seqs,
        **scenario.deployment.engine.derived_settings(scenario.config.serving),
        "max_num_batched_tokens": scenario.deployment.scheduler.max_num_batched_tokens,
        "gpu_memory_utilization": scenario.deployment.budget.utilization,
        "scheduler_reserve_full_isl": scenario.deployment.pool.reserve_full_isl,
        "enable_prefix_caching": scenario.deployment.pool.enable_prefix_caching,
        "routing": scenario.replication.routing if scenario.replication.num_replicas > 1 else None,
        "fault": list(scenario.config.serving.fault),
        "warmup": time_text(scenario.warmup_s),
        "duration": None if scenario.duration_s is None else time_text(scenario.duration_s),
    }
    if scenario.model_serving is not None:
        settings["max_model_len"] = scenario.config.serving.max_model_len  # each model has its own
    if settings["trace"] is None and settings["random_input_len"] is None:
        settings["lengths"] = settings["lengths"] or DEFAULT_LENGTHS
    return settings | scenario.load.settings()


def rerun_settings(scenario: Scenario) -> dict[str, Any]:
    """Return `resolved_config` without settings of other engines, which this one would refuse."""
    engine = scenario.deployment.engine.name.partition("@")[0]
    return {name: value for name, value in resolved_config(scenario).items() if engine in ENGINE_FLAGS.get(name, (engine,))}
