"""Prometheus' text format: families of samples, as a server answers a scrape with. It knows nothing of what they mean.

Source: the text-based format of https://prometheus.io/docs/instrumenting/exposition_formats, version 0.0.4.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from pagedkv.arrays import Float64Array, Int64Array

_LARGE = 1e6
"""From here on client libraries write bounds with an exponent, 1e+06."""

Labels: TypeAlias = Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Histogram:
    """Observations by bucket."""

    bounds: Sequence[float]
    """Upper bounds, ascending and inclusive, without infinity."""
    counts: Int64Array
    """[bounds + 1]: observations in each bucket alone, the last one above every bound."""
    total: float
    """Sum of the observations."""

    @classmethod
    def of(cls, observations: Float64Array, bounds: Sequence[float]) -> "Histogram":
        """Count `observations`, none of them NaN. O(n log bounds)."""
        places = np.searchsorted(bounds, observations, side="left")
        counts = np.bincount(places, minlength=len(bounds) + 1).astype(np.int64)
        return cls(bounds=bounds, counts=counts, total=float(observations.sum()))


Value: TypeAlias = float | Histogram


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A metric: one kind and meaning, a value per set of labels."""

    name: str
    """In full; of a counter, with its `_total`."""
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    samples: Sequence[tuple[Labels, Value]]


def exposition(families: Iterable[Family], *, comments: Iterable[str] = ()) -> str:
    """Return the text: `comments` first, which a reader of the format skips, then the families in order."""
    lines = [f"# {comment}" for comment in comments]
    for family in families:
        lines.append(f"# HELP {family.name} {_escaped(family.help)}")
        lines.append(f"# TYPE {family.name} {family.kind}")
        for labels, value in family.samples:
            if isinstance(value, Histogram):
                lines += _histogram_lines(family.name, labels, value)
            else:
                lines.append(_line(family.name, labels, value))
    return "\n".join(lines) + "\n"


def _histogram_lines(name: str, labels: Labels, histogram: Histogram) -> Iterator[str]:
    below = np.cumsum(histogram.counts).tolist()
    for bound, number in zip((*map(_bound, histogram.bounds), "+Inf"), below, strict=True):
        yield _line(f"{name}_bucket", {**labels, "le": bound}, number)
    yield _line(f"{name}_sum", labels, histogram.total)
    yield _line(f"{name}_count", labels, below[-1])


def _line(name: str, labels: Labels, value: float) -> str:
    inside = ",".join(f'{label}="{_escaped(text, quote=True)}"' for label, text in labels.items())
    return f"{name}{{{inside}}} {float(value)!r}"


def _bound(bound: float) -> str:
    """Return a bound as the client libraries write it, so that series have the names that dashboards know."""
    return f"{bound:g}" if bound >= _LARGE else repr(float(bound))


def _escaped(text: str, *, quote: bool = False) -> str:
    escaped = text.replace("\\", r"\\").replace("\n", r"\n")
    return escaped.replace('"', r"\"") if quote else escaped
