"""What the constants say of a model whose rows they were not fitted to, and how far that is off: the width of intervals."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pagedkv.sims.certainty import SPREAD_PREFIX, WIDENED
from pagedkv.sims.constant_sources import families_of
from pagedkv.sims.validation.fitting import Fit, fit, without
from pagedkv.sims.validation.points import Kind, Point
from pagedkv.sims.validation.work import Work

COVERED = 0.98
"""Quantile of the left-out figures' errors that an interval spans: what it takes for nine in ten of a new model's to lie inside,
since models differ more than the rows of one."""
FEW_MODELS = 4
"""An engine with rows of fewer models is taken to be off by as much as any engine."""

Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """A figure, and what constants say that saw no row of its model."""

    point: Point
    rate_tok_s: float

    @property
    def off(self) -> float:
        """How far it is off, as a logarithm: measured lies within simulated / e^x and simulated × e^x."""
        return float(abs(np.log(self.rate_tok_s / self.point.measured_tok_s)))


def trials(whole: Fit, points: Sequence[Point], work: Work) -> list[Trial]:
    """Leave out one model after another. A fit per model; where no row is left, the machine's own figures."""
    rates = np.empty(len(points))
    for name in sorted({point.subject.model.name for point in points}):
        chosen = np.array([i for i, point in enumerate(points) if point.subject.model.name == name])
        others, their_work = without(work, points, name)
        fitted = fit(whole.plan, whole.hardware, others, their_work, near=whole) if others else whole.unfitted()
        rates[chosen] = work.where(chosen).rates(fitted.rows([points[i] for i in chosen]))
    return [Trial(point=point, rate_tok_s=float(rate)) for point, rate in zip(points, rates, strict=True)]


class Spreads:
    """How wide an interval must be, by engine, kind of figure and kind of model."""

    def __init__(self, tried: Sequence[Trial]) -> None:
        self._off = np.array([trial.off for trial in tried])
        self._kinds = np.array([trial.point.kind for trial in tried])
        self._families = [families_of(trial.point.subject.model) for trial in tried]
        self._belongs = {family: np.array([family in its for its in self._families], np.bool_) for family in SPREAD_PREFIX}
        self._engines = np.array([trial.point.engine for trial in tried])
        self._models = np.array([trial.point.subject.model.name for trial in tried])
        self._formats = np.array([trial.point.subject.weight_format.name for trial in tried])

    def of(self, engine: str, kind: Kind, *, families: Collection[str], but_for: str | None = None) -> float:
        """Return it as a logarithm, from all trials but those of the model `but_for`.

        It is the widest of what dense models with plain attention and each of the model's families were off by. An engine with
        figures of few models, or of fewer than two of a family, is taken to be off by as much as any engine is.
        """
        among = (self._models != but_for) & (self._kinds == kind)
        own = among & (self._engines == engine)
        few = self._num_models(own) < FEW_MODELS
        plain = ~np.any(np.stack(list(self._belongs.values())), axis=0)
        widest = 0.0
        for alike in (plain, *(self._belongs[family] for family in families if family in self._belongs)):
            widest = max(widest, self._quantile(own & alike))
            if few or self._num_models(own & alike) < 2:
                widest = max(widest, self._quantile(among & alike))
        return widest

    def single_model(self, engine: str, fmt: str) -> bool:
        """Return whether fewer than two models of a weight type have figures of decoding."""
        return self._num_models((self._engines == engine) & (self._formats == fmt) & (self._kinds == "decode")) < 2

    def coverage(self, chosen: Callable[[str, str], bool] = lambda engine, kind: True) -> float:
        """Return the share of figures within the interval that the other models give; `chosen` says which, by engine and kind."""
        inside = [
            self._off[i]
            <= self.of(engine, kind, families=self._families[i], but_for=str(self._models[i]))
            * (WIDENED if self.single_model(engine, str(self._formats[i])) else 1.0)
            for i, (engine, kind) in enumerate(zip(self._engines.tolist(), self._kinds.tolist(), strict=True))
            if chosen(engine, kind)
        ]
        return float(sum(inside) / len(inside)) if inside else float("nan")

    def _num_models(self, among: Mask) -> int:
        return len(set(self._models[among].tolist()))

    def _quantile(self, among: Mask) -> float:
        return float(np.quantile(self._off[among], COVERED, method="higher")) if among.any() else 0.0
