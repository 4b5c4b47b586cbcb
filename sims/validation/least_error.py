"""The least error that any constants could leave: what shows that rows contradict each other, and not that a fit is poor."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np

from pagedkv.hardware_spec import HardwareSpec
from pagedkv.sims.step_constants import catalogue_constants
from pagedkv.sims.validation.fitting import Plan
from pagedkv.sims.validation.points import Point
from pagedkv.sims.validation.work import Work, as_row

_REACH = 8.0
"""Constants are tried from this share of the catalogue's figure to this multiple of it."""
_STEPS = 140
"""Values of each, equally far apart as logarithms: 3 % from one to the next."""


def least_mean_error(plan: Plan, hardware: HardwareSpec, points: Sequence[Point]) -> float | None:
    """Return the least mean relative error of `points` that any values of the constants of `plan` leave, to about 1 %.

    All are tried, with these very figures in view: no fit can do better, whatever it weighs. None where that cannot be searched:
    the plan has more than two constants, or the figures are of several weight types.
    """
    names = (*plan.shared, *plan.by_format)
    formats = {point.subject.weight_format for point in points}
    if len(names) > 2 or plan.by_version or len(formats) != 1:
        return None
    prior = catalogue_constants(hardware, formats.pop())
    work = Work.of(points)
    measured = np.array([point.measured_tok_s for point in points])
    factors = np.geomspace(1 / _REACH, _REACH, _STEPS)
    least = np.inf
    for chosen in product(factors, repeat=len(names)):
        values: dict[str, Any] = {name: getattr(prior, name) * factor for name, factor in zip(names, chosen, strict=True)}
        row = as_row(replace(prior, **(values | dict(plan.known))))
        rates = work.rates(np.broadcast_to(row, (len(points), row.size)))
        least = min(least, float(np.abs(rates / measured - 1).mean()))
    return least
