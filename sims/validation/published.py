"""Published rows against the constants that a simulation uses: every residual, by engine and model, and models left out."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from pagedkv.errors import ConfigError
from pagedkv.hardware_spec import HardwareSpec
from pagedkv.sims.calibration import Calibration, calibration_for, fitted_groups
from pagedkv.sims.constant_sources import carried_constants
from pagedkv.sims.validation.benchmark_rows import BenchmarkRow, read_rows
from pagedkv.sims.validation.fitting import PLANS, fit, plan_for
from pagedkv.sims.validation.least_error import least_mean_error
from pagedkv.sims.validation.left_out import Spreads, Trial, trials
from pagedkv.sims.validation.peaks import believable
from pagedkv.sims.validation.points import KINDS, Kind, NotCompared, Point
from pagedkv.sims.validation.row_models import reason_for
from pagedkv.sims.validation.work import Work, as_row

MEAN_BARS: dict[Kind, float] = {"decode": 0.06, "prefill": 0.15}
"""Largest mean error of an engine's figures."""
ROW_BAR = 0.30
"""Largest error of a figure without a stated reason."""
LEFT_OUT_FACTOR = 1.5
"""How much larger the mean error of left-out models may be."""
EXCLUDED_BAR = 0.10
"""Largest share of rows that are left out."""
COVERAGE_BAR = 0.85
"""Least share of left-out figures within their interval."""
MORE_ROWS_THAN_CONSTANTS = 3
"""An engine needs so many rows more than constants."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Residual:
    """A published figure and ours."""

    point: Point
    calibration: Calibration
    simulated_tok_s: float
    left_out_tok_s: float | None
    """By constants that saw no row of its model; None: not tried."""
    reason: str
    """Why it may be far off; empty: unknown."""

    @property
    def error(self) -> float:
        """Relative error of the rate."""
        return self.simulated_tok_s / self.point.measured_tok_s - 1

    @property
    def left_out_error(self) -> float | None:
        """The same with its model left out."""
        return None if self.left_out_tok_s is None else self.left_out_tok_s / self.point.measured_tok_s - 1

    def document(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        row = self.point.row
        return {
            "line": row.line,
            "file": row.file,
            "source": row.source,
            "engine": self.point.engine,
            "build": self.point.version or None,
            "model": self.point.subject.model.name,
            "model_known_by": self.point.subject.source,
            "weights": self.point.subject.weight_format.name,
            "kind": self.point.kind,
            "batch": row.batch,
            "prompt_tokens": row.prompt_tokens,
            "context_depth": row.context_depth,
            "measured_tok_s": self.point.measured_tok_s,
            "simulated_tok_s": self.simulated_tok_s,
            "error": self.error,
            "left_out_error": self.left_out_error,
            "assumed": self.point.assumed or None,
            "calibration": self.calibration.status,
            "reason": self.reason or None,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStatus:
    """Whether an engine's rows can validate anything."""

    engine: str
    num_rows: int
    num_models: int
    """Models that bars count."""
    num_constants: int
    """Constants that its rows decide; 0 where none are fitted."""

    @property
    def doubts(self) -> str:
        """Why not; empty: they can."""
        needed = self.num_constants + MORE_ROWS_THAN_CONSTANTS
        if not self.num_constants:
            return f"not validated: {self.num_rows} row{'s' if self.num_rows > 1 else ''}, too few to fit constants to"
        if self.num_rows < needed:
            return f"not validated: {self.num_rows} rows, needs {needed} for {self.num_constants} constants"
        return "" if self.num_models > 1 else "not validated: scored rows of a single model"


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """What became of a file of rows."""

    path: Path
    rows: list[BenchmarkRow]
    residuals: list[Residual]
    not_compared: list[NotCompared]
    """Figures left out, with reasons; those that no machine of this kind can reach among them."""
    engines: list[EngineStatus]
    coverage: float | None
    """Share of left-out figures within the interval of the other models; None: nothing was left out."""
    further: list[Residual]
    """Figures of further rows, which constants were fitted to as well; no bar counts them."""
    least: Mapping[tuple[str, Kind], float]
    """Where an engine's figures miss the bar of their mean: the least error that any values of its constants leave, if known."""

    @property
    def excluded_share(self) -> float:
        """Share of the rows, those marked as not verified aside, of which no figure is compared."""
        verified = {row.line for row in self.rows if row.verified}
        return len(verified - {residual.point.row.line for residual in self.residuals}) / len(verified) if verified else 0.0

    def of(self, engine: str, kind: Kind) -> list[Residual]:
        """Return the residuals of one engine and kind."""
        return [residual for residual in self.residuals if residual.point.engine == engine and residual.point.kind == kind]

    def further_of(self, engine: str, kind: Kind) -> list[Residual]:
        """Return the same of further rows."""
        return [residual for residual in self.further if residual.point.engine == engine and residual.point.kind == kind]


def compare_rows(path: Path, hardware: HardwareSpec, *, leave_out: bool = True, further: Sequence[BenchmarkRow] = ()) -> Published:
    """Return the residuals of a file of rows on `hardware`.

    Args:
        path: The file.
        hardware: The machine.
        leave_out: Whether to fit constants without each model as well, which takes seconds.
        further: Rows of the same machine that count as evidence, and that no bar is about.

    Raises:
        ConfigError: If the file is not such a file, or none of its rows can be compared; with what is needed.
    """
    rows = read_rows(path)
    believed, not_compared = believable(rows, hardware)
    if not believed:
        raise ConfigError(f"{path}: none of its {len(rows)} rows can be compared; the first: {not_compared[0].reason}")
    num_own = len(believed)
    more, more_not_compared = believable(further, hardware)
    believed, not_compared = believed + more, not_compared + more_not_compared
    used = [
        calibration_for(
            hardware,
            point.engine,
            point.subject.weight_format,
            point.kv_cache_dtype,
            model=point.subject.model,
            build=point.version,
        )
        for point in believed
    ]
    rates = Work.of(believed).rates(np.stack([as_row(each.constants) for each in used]))
    statuses = list(_statuses(believed, believed[:num_own]))
    tried = _tried(believed, hardware) if leave_out else {}
    residuals = [
        Residual(
            point=point,
            calibration=its,
            simulated_tok_s=float(rate),
            left_out_tok_s=tried[id(point)].rate_tok_s if id(point) in tried else None,
            reason=reason_for(point.row, point.kind),
        )
        for point, its, rate in zip(believed, used, rates, strict=True)
    ]
    return Published(
        path=path,
        rows=rows,
        residuals=residuals[:num_own],
        further=residuals[num_own:],
        not_compared=not_compared,
        engines=statuses,
        coverage=Spreads(list(tried.values())).coverage() if tried else None,
        least=_least(residuals[:num_own], statuses, hardware) if leave_out else {},
    )


def _least(
    residuals: Sequence[Residual], statuses: Sequence[EngineStatus], hardware: HardwareSpec
) -> dict[tuple[str, Kind], float]:
    """Return what the best constants would leave, for every engine and kind whose bar is judged and missed."""
    plans = {plan.engine: plan for plan in PLANS}
    least: dict[tuple[str, Kind], float] = {}
    for status, kind in product(statuses, KINDS):
        own = [each for each in residuals if (each.point.engine, each.point.kind) == (status.engine, kind)]
        if own and not status.doubts and mean_error(own) > MEAN_BARS[kind]:
            found = least_mean_error(plans[status.engine], hardware, [each.point for each in own])
            least |= {} if found is None else {(status.engine, kind): found}
    return least


def _statuses(points: Sequence[Point], scored: Sequence[Point]) -> list[EngineStatus]:
    """Return the status of each engine with `points`, of which bars count those `scored`."""
    plans = {plan.engine: plan for plan in PLANS}
    statuses = []
    for engine in sorted({point.engine for point in points}):
        own = [point for point in points if point.engine == engine]
        formats = {point.subject.weight_format.name for point in own}
        builds = {point.version for point in own} - {""}
        count = 0
        if engine in plans:
            plan = plan_for(plans[engine], own)
            count = len(plan.shared) + len(plan.by_format) * len(formats) + len(plan.by_version) * len(builds)
        statuses.append(
            EngineStatus(
                engine=engine,
                num_rows=len({(point.row.file, point.row.line) for point in own}),
                num_models=len({point.subject.model.name for point in scored if point.engine == engine}),
                num_constants=count,
            )
        )
    return statuses


def _tried(points: Sequence[Point], hardware: HardwareSpec) -> dict[int, Trial]:
    """Return the trials of every engine with more rows than constants, by the identity of their points."""
    plans = {plan.engine: plan for plan in PLANS}
    tried: dict[int, Trial] = {}
    for status in _statuses(points, points):
        if status.num_constants and status.num_rows >= status.num_constants + MORE_ROWS_THAN_CONSTANTS:
            own = [point for point in points if point.engine == status.engine]
            work = Work.of(own)
            carried = carried_constants(_larger_groups(status), (hardware.name, hardware.like), status.engine)
            whole = fit(plans[status.engine], hardware, own, work, carried=carried)
            tried |= {id(trial.point): trial for trial in trials(whole, own, work)}
    return tried


def _larger_groups(status: EngineStatus) -> list[Mapping[str, Any]]:
    """Return the fitted groups of other engines with rows of more models: what a fit may take from that its own do not tell."""
    return [group for group in fitted_groups() if group["engine"] != status.engine and group["num_models"] > status.num_models]


def mean_error(residuals: Sequence[Residual], *, left_out: bool = False) -> float:
    """Return the mean absolute error; not a number without figures."""
    errors = [residual.left_out_error if left_out else residual.error for residual in residuals]
    known = [abs(error) for error in errors if error is not None]
    return sum(known) / len(known) if known else math.nan
