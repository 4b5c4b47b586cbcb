"""Fits the constants of step times to published rows and writes step_constants.toml.

`python -m pagedkv.sims.fit_step_time ../shared/data 2026-11-29` reads dgx_spark_benchmarks.csv and
vllm_rtx4090_llama31_8b of that folder; the date is written down.
"""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from pagedkv.catalogue import load_hardware
from pagedkv.hardware_spec import HardwareSpec
from pagedkv.sims.calibration import FILE
from pagedkv.sims.certainty import SPREAD_PREFIX, WIDENED
from pagedkv.sims.constant_sources import FAMILIES, Carried, carried_constants, families_of
from pagedkv.sims.step_constants import StepConstants, catalogue_constants
from pagedkv.sims.step_groups import IN_GROUPS, OF_WEIGHTS, SHARED, toml_lines
from pagedkv.sims.validation.benchmark_rows import FURTHER, read_rows
from pagedkv.sims.validation.fitting import OFFSET_SPREAD, PLANS, Fit, Plan, fit
from pagedkv.sims.validation.left_out import Spreads, Trial, trials
from pagedkv.sims.validation.log_replay import FIT_S, FREE, fit_to_beginning, machine_of, scenario_of
from pagedkv.sims.validation.points import KINDS, Point, points_of
from pagedkv.sims.validation.vllm_log import read_log
from pagedkv.sims.validation.work import Work, as_row
from pagedkv.weight_format import WEIGHT_FORMATS

MACHINE = "dgx-spark"
ROWS = "dgx_spark_benchmarks.csv"
LOG = "vllm_rtx4090_llama31_8b"
MORE_ROWS_THAN_CONSTANTS = 3
"""A group with fewer rows than constants and this is not validated."""
_CATALOGUE_COVERED = 0.90
"""Of the figures of engines without a fit, how many lie within the catalogue's spread."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Fitted:
    """An engine's rows, and what was fitted to them."""

    plan: Plan
    points: list[Point]
    work: Work
    fit: Fit
    tried: list[Trial]
    """The same figures by constants that saw no row of their models."""

    def told(self) -> Mapping[str, Any]:
        """Return what other engines may take from it, as a group of the file has it."""
        base = self.fit.constants(catalogue_constants(self.fit.hardware, WEIGHT_FORMATS["bf16"]), "")
        return {
            "engine": self.plan.engine,
            "machine": self.fit.hardware.name,
            "num_models": len({point.subject.model.name for point in self.points}),
            "fitted": self.fit.identified(),
            "constants": {name: getattr(base, name) for name in SHARED},
        }


def fit_all(points: Sequence[Point], hardware: HardwareSpec) -> list[Fitted]:
    """Return a fit for every engine with a plan. A fit per engine and model: about 10 s."""
    fitted: list[Fitted] = []
    for plan in PLANS:
        own = [point for point in points if point.engine == plan.engine]
        if own:
            work = Work.of(own)
            carried = carried_constants([each.told() for each in fitted], (hardware.name,), plan.engine)
            whole = fit(plan, hardware, own, work, carried=carried)
            fitted.append(Fitted(plan=plan, points=own, work=work, fit=whole, tried=trials(whole, own, work)))
    return fitted


def catalogue_spread(points: Sequence[Point], fitted: Sequence[Fitted], hardware: HardwareSpec) -> dict[str, float]:
    """Return how far the machine's own figures are off, by kind, for engines whose kernels its figures are meant for.

    What its figures do not say, of a mixture's experts, is as of the engine with rows of most models.
    """
    carried = carried_constants([each.told() for each in fitted], (), "")
    others_told: dict[str, Any] = {name: each.value for name, each in carried.items()}
    own = [point for point in points if point.engine not in ("llama-cpp", "ollama")]
    priors = [replace(catalogue_constants(hardware, point.subject.weight_format), **others_told) for point in own]
    rates = Work.of(own).rates(np.stack([as_row(prior) for prior in priors]))
    off = np.abs(np.log(rates) - np.log([point.measured_tok_s for point in own]))
    kinds = np.array([point.kind for point in own])
    return {kind: float(np.quantile(off[kinds == kind], _CATALOGUE_COVERED, method="higher")) for kind in KINDS}


def document(
    fitted: Sequence[Fitted], catalogue: dict[str, float], hardware: HardwareSpec, date: str, log: Path | None = None
) -> Iterator[str]:
    """Yield the lines of step_constants.toml."""
    spreads = Spreads([trial for each in fitted for trial in each.tried])
    yield "# Constants of a step's duration by machine, engine and weight type."
    yield "# Written by python -m pagedkv.sims.fit_step_time; do not edit."
    yield "# `spread`: 9 of 10 figures of models left out lie within × or / e^spread, or e^(spread × widened)."
    yield ""
    yield "[catalogue]"
    yield from toml_lines({"machine": hardware.name, **catalogue})
    for each in fitted:
        yield from _group(each, spreads, hardware, date)
    if log is not None:
        yield from log_group(log, spreads, [each.told() for each in fitted], date)


def _group(each: Fitted, spreads: Spreads, hardware: HardwareSpec, date: str) -> Iterator[str]:
    engine, points = each.plan.engine, each.points
    rows = {(point.row.file, point.row.line) for point in points}
    files = ", ".join(sorted({file for file, _ in rows}))
    models = {fmt: _models(points, fmt) for fmt in each.fit.formats}
    yield ""
    yield "[[group]]"
    any_weights = len(models) > 1 and min(map(len, models.values())) > 1  # else their mean is one of models as much as of types
    yield from toml_lines(
        {
            "machine": hardware.name,
            "engine": engine,
            "kv_cache_dtypes": sorted({point.kv_cache_dtype for point in points}),
            "source": f"{len(rows)} published rows ({files})",
            "date": date,
            "num_rows": len(rows),
            "num_figures": len(points),
            "num_models": len({point.subject.model.name for point in points}),
            "num_constants": each.fit.num_constants,
            "families": _families(points),
            "fitted": list(each.fit.identified()),
            "too_few": len(rows) < each.fit.num_constants + MORE_ROWS_THAN_CONSTANTS,
            "widened": WIDENED,
        }
    )
    prior = catalogue_constants(hardware, WEIGHT_FORMATS["bf16"])
    base = each.fit.constants(prior, "")
    yield "[group.constants]"
    yield from toml_lines({name: getattr(base, name) for name in SHARED})
    yield "[group.assumed]"
    yield from toml_lines(assumed(base, each.fit.identified(), each.fit.carried, each.plan.known, hardware))
    for version in each.fit.versions:
        its = each.fit.constants(prior, "", version)
        yield f'[group.versions."{version}"]'
        yield from toml_lines({name: _factor(its, base, name) for name in each.plan.by_version})
    yield "[group.spread]"
    yield from toml_lines(_spread_table(spreads, engine))
    yield "[group.any_weights]"
    if any_weights:
        yield from toml_lines({name: getattr(base, name) for name in each.plan.by_format})
    for fmt in each.fit.formats:
        its = _possible(each.fit.constants(prior, fmt), hardware)
        errors = {f"{kind}_error": _mean_error(each, kind, fmt) for kind in KINDS}
        yield f'[group.weights."{fmt}"]'
        counted = {
            "num_models": len(models[fmt]),
            "num_figures": sum(p.subject.weight_format.name == fmt for p in points),
            "fitted": list(each.fit.identified(fmt)),
        }
        yield from toml_lines({name: getattr(its, name) for name in each.plan.by_format} | counted | errors)


def assumed(
    constants: StepConstants,
    fitted: Iterable[str],
    carried: Mapping[str, Carried],
    known: Mapping[str, float],
    hardware: HardwareSpec,
) -> dict[str, str]:
    """Return, by constant that all weight types share and no row identified, where it comes from."""
    catalogue = catalogue_constants(hardware, WEIGHT_FORMATS["bf16"])
    found = {}
    for name in SHARED:
        value = getattr(constants, name)
        if name in fitted:
            continue
        if name in known:
            found[name] = "the engine's source code, and no row"
        elif name in carried and value == carried[name].value:
            found[name] = f"as of {carried[name].whose}, whose rows tell it"
        elif value == getattr(catalogue, name) and name not in _WITHOUT:
            found[name] = f"the catalogue's figure of {hardware.name}: no row tells it apart"
        elif value == getattr(catalogue, name):
            found[name] = "the formula without it: no row tells"
        else:
            found[name] = "fitted, though its rows leave more than half of what was open"
    return found


_WITHOUT = ("layer_overhead_s", "batched_layer_overhead_s", "state_scan_bytes_per_s", "overlap", *FAMILIES["latents"])
"""Constants that the catalogue does not have: it says what the formula is without them."""


def log_group(folder: Path, spreads: Spreads, told: Sequence[Mapping[str, Any]], date: str) -> Iterator[str]:
    """Yield the group of a real run: the constants of its first minute, and what other groups `told`."""
    log = read_log(folder)
    scenario = scenario_of(log, machine_of(log).name)
    deployment, constants = scenario.deployment, fit_to_beginning(log, scenario)
    engine, free = deployment.engine.name, [name for names in FREE for name in names]
    carried = carried_constants(told, (deployment.hardware.name,), engine)
    others_told: dict[str, Any] = {name: each.value for name, each in carried.items()}
    constants = replace(constants, **others_told)
    catalogue = catalogue_constants(deployment.hardware, deployment.weight_format)
    moved = [name for name in free if getattr(constants, name) != getattr(catalogue, name)]
    fmt, finished = deployment.weight_format.name, int((log.finish_s <= FIT_S).sum())
    yield ""
    yield "[[group]]"
    yield from toml_lines(
        {
            "machine": deployment.hardware.name,
            "engine": engine,
            "kv_cache_dtypes": [deployment.config.kv_cache_dtype],
            "source": f"the first {FIT_S:.0f} s of a run of vLLM {log.version} ({folder.name}, LLMServingSim)",
            "date": date,
            "num_rows": finished,
            "num_figures": finished,
            "num_models": 1,
            "num_constants": len(FREE),
            "families": list(families_of(deployment.model)),
            "fitted": [name for name in moved if name in SHARED],
            "too_few": finished < len(FREE) + MORE_ROWS_THAN_CONSTANTS,
            "widened": WIDENED,
        }
    )
    by_format = [name for name in OFFSET_SPREAD if name in free]
    yield "[group.constants]"
    yield from toml_lines({name: getattr(constants, name) for name in IN_GROUPS if name not in OFFSET_SPREAD})
    yield "[group.assumed]"
    yield from toml_lines(assumed(constants, moved, carried, {}, deployment.hardware))
    yield "[group.spread]"
    yield from toml_lines(_spread_table(spreads, engine))
    yield "[group.any_weights]"
    yield f'[group.weights."{fmt}"]'
    counted = {"num_models": 1, "num_figures": finished, "fitted": [name for name in moved if name in OF_WEIGHTS]}
    yield from toml_lines({name: getattr(constants, name) for name in by_format} | counted)


def _possible(constants: StepConstants, hardware: HardwareSpec) -> StepConstants:
    """Return constants that read weights no faster than the memory's datasheet says, whatever rows of one model would have."""
    most = hardware.memory_bandwidth.value
    return replace(constants, weight_read_bytes_per_s=min(constants.weight_read_bytes_per_s, most))


def _models(points: Sequence[Point], fmt: str) -> set[str]:
    """Return the models whose decoding was measured with a weight type, if any was: what reading weights is confirmed by."""
    own = [point for point in points if point.subject.weight_format.name == fmt]
    return {p.subject.model.name for p in own if p.kind == "decode"} or {p.subject.model.name for p in own}


def _families(points: Sequence[Point]) -> list[str]:
    """Return the families of models that have rows."""
    have = {family for point in points for family in families_of(point.subject.model)}
    return [family for family in FAMILIES if family in have]


def _spread_table(spreads: Spreads, engine: str) -> dict[str, float]:
    """Return the spreads of a group; a version of an engine is known as well as the engine."""
    base = engine.partition("@")[0]
    by_prefix = {"": (), **{prefix: (family,) for family, prefix in SPREAD_PREFIX.items()}}
    return {f"{prefix}{kind}": spreads.of(base, kind, families=of) for kind in KINDS for prefix, of in by_prefix.items()}


def _factor(its: StepConstants, base: StepConstants, name: str) -> float:
    return float(getattr(its, name) / getattr(base, name))


def _mean_error(each: Fitted, kind: str, fmt: str) -> float:
    """Return the mean relative error of the fit for one weight type; not a number where it has no such figures."""
    chosen = np.array([i for i, p in enumerate(each.points) if p.kind == kind and p.subject.weight_format.name == fmt], np.int64)
    if chosen.size == 0:
        return float("nan")
    own = [each.points[i] for i in chosen]
    rates = each.work.where(chosen).rates(each.fit.rows(own))
    return float(np.mean(np.abs(rates / [point.measured_tok_s for point in own] - 1)))


def main() -> None:
    """Write the file."""
    if len(sys.argv) != 3:
        sys.exit("usage: python -m pagedkv.sims.fit_step_time FOLDER DATE")
    hardware = load_hardware(MACHINE)
    folder, date = Path(sys.argv[1]), sys.argv[2]
    points, _ = points_of([*read_rows(folder / ROWS), *read_rows(FURTHER)])
    fitted = fit_all(points, hardware)
    lines = list(document(fitted, catalogue_spread(points, fitted, hardware), hardware, date, folder / LOG))
    FILE.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
