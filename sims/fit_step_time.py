"""Fits the constants of step times to published rows and writes step_constants.toml.

`python -m pagedkv.sims.fit_step_time ../shared/data 2026-11-29` reads dgx_spark_benchmarks.csv and
vllm_rtx4090_llama31_8b of that folder; the date is written down.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pagedkv.catalogue import load_hardware
from pagedkv.hardware_spec import HardwareSpec
from pagedkv.sims.calibration import FILE
from pagedkv.sims.step_constants import StepConstants, catalogue_constants
from pagedkv.sims.step_groups import IN_GROUPS, toml_lines
from pagedkv.sims.validation.benchmark_rows import FURTHER, read_rows
from pagedkv.sims.validation.fitting import OFFSET_SPREAD, PLANS, Fit, Plan, fit
from pagedkv.sims.validation.left_out import WIDENED, Spreads, Trial, trials
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


def fit_all(points: Sequence[Point], hardware: HardwareSpec) -> list[Fitted]:
    """Return a fit for every engine with a plan. A fit per engine and model: about 10 s."""
    fitted = []
    for plan in PLANS:
        own = [point for point in points if point.engine == plan.engine]
        if own:
            work = Work.of(own)
            whole = fit(plan, hardware, own, work)
            fitted.append(Fitted(plan=plan, points=own, work=work, fit=whole, tried=trials(whole, own, work)))
    return fitted


def catalogue_spread(points: Sequence[Point], hardware: HardwareSpec) -> dict[str, float]:
    """Return how far the machine's own figures are off, by kind, for engines whose kernels its figures are meant for."""
    own = [point for point in points if point.engine not in ("llama-cpp", "ollama")]
    rates = Work.of(own).rates(np.stack([as_row(catalogue_constants(hardware, point.subject.weight_format)) for point in own]))
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
        yield from log_group(log, spreads, date)


def _group(each: Fitted, spreads: Spreads, hardware: HardwareSpec, date: str) -> Iterator[str]:
    engine, points = each.plan.engine, each.points
    rows = {(point.row.file, point.row.line) for point in points}
    files = ", ".join(sorted({file for file, _ in rows}))
    models = {fmt: {p.subject.model.name for p in points if p.subject.weight_format.name == fmt} for fmt in each.fit.formats}
    yield ""
    yield "[[group]]"
    any_weights = len(each.fit.formats) > 1 and len(set().union(*models.values())) > 1
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
            "too_few": len(rows) < each.fit.num_constants + MORE_ROWS_THAN_CONSTANTS,
            "widened": WIDENED,
        }
    )
    prior = catalogue_constants(hardware, WEIGHT_FORMATS["bf16"])
    base = each.fit.constants(prior, "")
    shared = [name for name in IN_GROUPS if name not in each.plan.by_format]
    yield "[group.constants]"
    yield from toml_lines({name: getattr(base, name) for name in shared})
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
        its = each.fit.constants(prior, fmt)
        errors = {f"{kind}_error": _mean_error(each, kind, fmt) for kind in KINDS}
        yield f'[group.weights."{fmt}"]'
        counted = {"num_models": len(models[fmt]), "num_figures": sum(p.subject.weight_format.name == fmt for p in points)}
        yield from toml_lines({name: getattr(its, name) for name in each.plan.by_format} | counted | errors)


def log_group(folder: Path, spreads: Spreads, date: str) -> Iterator[str]:
    """Yield the group of a real run: the constants of its first minute."""
    log = read_log(folder)
    scenario = scenario_of(log, machine_of(log).name)
    deployment, constants = scenario.deployment, fit_to_beginning(log, scenario)
    engine, free = deployment.engine.name, [name for names in FREE for name in names]
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
            "too_few": finished < len(FREE) + MORE_ROWS_THAN_CONSTANTS,
            "widened": WIDENED,
        }
    )
    by_format = [name for name in OFFSET_SPREAD if name in free]
    yield "[group.constants]"
    yield from toml_lines({name: getattr(constants, name) for name in IN_GROUPS if name not in OFFSET_SPREAD})
    yield "[group.spread]"
    yield from toml_lines(_spread_table(spreads, engine))
    yield "[group.any_weights]"
    yield f'[group.weights."{fmt}"]'
    yield from toml_lines({name: getattr(constants, name) for name in by_format} | {"num_models": 1, "num_figures": finished})


def _spread_table(spreads: Spreads, engine: str) -> dict[str, float]:
    return {
        f"{'state_' if state else ''}{kind}": spreads.of(engine, kind, state=state) for kind in KINDS for state in (False, True)
    }


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
    lines = list(document(fit_all(points, hardware), catalogue_spread(points, hardware), hardware, date, folder / LOG))
    FILE.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
