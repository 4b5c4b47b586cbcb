"""How fast a machine multiplies with weights, by rows: a library takes other kernels and tiles for few rows than for many."""

from dataclasses import dataclass

import numpy as np

from pagedkv.arrays import Float64Array
from pagedkv.errors import ConfigError

MOST_ROWS = 8192
"""Rows of the last measured product at most: time by rows is kept for each number up to it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowRates:
    """The rates that products of some rows with a layer's weights reached, reading these weights included."""

    rows: tuple[int, ...]
    """Numbers of rows that were measured, ascending from 1: tokens of a step."""
    flops: tuple[float, ...]
    """What each reached, in operations a second."""
    tag: str
    """How it is known, as of a `Figure`."""
    source: str
    """Where it comes from."""

    def __post_init__(self) -> None:
        """Refuse what is no table.

        Raises:
            ConfigError: With what would be one.
        """
        if not self.source.strip():
            raise ConfigError("the rates by rows have no source")
        if len(self.rows) != len(self.flops):
            raise ConfigError(f"{len(self.rows)} numbers of rows and {len(self.flops)} rates: needs a rate for each")
        if len(self.rows) < 2 or self.rows[0] != 1:
            raise ConfigError(f"rows are {list(self.rows)}: needs two or more, the first of them 1")
        for before, after in zip(self.rows, self.rows[1:], strict=False):
            if after <= before:
                raise ConfigError(f"rows go from {before} to {after}: they must ascend")
        if self.rows[-1] > MOST_ROWS:
            raise ConfigError(f"the last rows are {self.rows[-1]}: needs {MOST_ROWS} at most; more run at the last rate")
        for rows, rate in zip(self.rows, self.flops, strict=True):
            if not 0 < rate < np.inf:
                raise ConfigError(f"the rate for rows = {rows} is {rate:g}: it must be above 0")

    @property
    def full_flops(self) -> float:
        """The rate of the most rows, at which more are taken to run too."""
        return self.flops[-1]

    def effective_rows(self) -> Float64Array:
        """Return, for 0 rows to the last number measured, how many take as long at the full rate. O(rows).

        Between the numbers measured, time is linear in rows.
        """
        rows = np.array(self.rows, np.float64)
        as_many = rows * self.full_flops / np.array(self.flops)
        effective: Float64Array = np.interp(np.arange(self.rows[-1] + 1), rows, as_many)
        effective[0] = 0.0
        return effective
