"""Two runs side by side: what differs in their configuration, and in their figures, and whether that is more than noise."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pagedkv.errors import ConfigError
from pagedkv.sims.flat_figures import FIGURES, SUMMED, VERDICT, figure, interval
from pagedkv.sims.results import SCHEMA_VERSION

_WANTED = "Give a summary.json, or the folder that --out wrote"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A setting that differs."""

    name: str
    first: Any
    second: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """A figure in both runs; counts are per repeat."""

    figure: str
    first: float | str | bool | None
    second: float | str | bool | None
    difference: float | None = None
    """second − first, of numbers."""
    relative: float | None = None
    """difference / first."""
    significant: bool | None = None
    """Whether 0 is outside the 95 % interval of the difference; None without repeats in both."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunComparison:
    """Two runs."""

    first: str
    second: str
    settings: tuple[Setting, ...]
    figures: dict[str, tuple[Difference, ...]]
    """By allocator that both have."""
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]
    """Allocators that one of them has."""

    def document(self) -> dict[str, Any]:
        """Return it in JSON types."""
        return {"schema_version": SCHEMA_VERSION, **asdict(self)}


def read_summary(path: Path) -> dict[str, Any]:
    """Return the result document in `path`, a file or the folder of `--out`.

    Raises:
        ConfigError: If there is none.
    """
    file = path / "summary.json" if path.is_dir() else path
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"cannot read the run {str(path)!r}: {error}. {_WANTED}") from error
    if not isinstance(document, dict) or not {"config", "results"} <= document.keys():
        raise ConfigError(f"{str(file)!r} is no result document. {_WANTED}")
    if (version := document.get("schema_version")) != SCHEMA_VERSION:
        raise ConfigError(f"{str(file)!r} has schema version {version}, and {SCHEMA_VERSION} is read: run it again")
    return document


def compare_runs(first: Path, second: Path) -> RunComparison:
    """Return what differs between two runs.

    Raises:
        ConfigError: If one cannot be read, or they have no allocator in common.
    """
    documents = [read_summary(path) for path in (first, second)]
    try:
        return _compared(str(first), str(second), *documents)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ConfigError(f"{str(first)!r} or {str(second)!r} is damaged: {type(error).__name__} {error}; run it again") from error


def _compared(first: str, second: str, a: dict[str, Any], b: dict[str, Any]) -> RunComparison:
    names = [*a["config"], *(name for name in b["config"] if name not in a["config"])]
    pairs = [(name, a["config"].get(name), b["config"].get(name)) for name in names]
    by_allocator = [{result["allocator"]: result for result in document["results"]} for document in (a, b)]
    common = [name for name in by_allocator[0] if name in by_allocator[1]]
    if not common:
        had = [", ".join(results) for results in by_allocator]
        raise ConfigError(f"the runs have no allocator in common: {had[0]} in {first!r}, {had[1]} in {second!r}")
    repeats = (a["config"].get("repeats") or 1, b["config"].get("repeats") or 1)
    return RunComparison(
        first=first,
        second=second,
        settings=tuple(Setting(name=name, first=x, second=y) for name, x, y in pairs if x != y),
        figures={name: _differences(by_allocator[0][name], by_allocator[1][name], repeats) for name in common},
        only_first=tuple(name for name in by_allocator[0] if name not in by_allocator[1]),
        only_second=tuple(name for name in by_allocator[1] if name not in by_allocator[0]),
    )


def _differences(a: dict[str, Any], b: dict[str, Any], repeats: tuple[int, int]) -> tuple[Difference, ...]:
    rows = [Difference(figure=name, first=figure(a, name), second=figure(b, name)) for name in VERDICT]
    for name in FIGURES:
        x, y = figure(a, name), figure(b, name)
        if x is None and y is None:
            continue
        if name in SUMMED:
            x, y = (None if value is None else value / number for value, number in zip((x, y), repeats, strict=True))
        difference = None if x is None or y is None else y - x
        rows.append(
            Difference(
                figure=name,
                first=x,
                second=y,
                difference=difference,
                relative=difference / x if difference is not None and x else None,
                significant=None if difference is None else _significant(difference, interval(a, name), interval(b, name)),
            )
        )
    return tuple(rows)


def _significant(difference: float, a: tuple[float, float] | None, b: tuple[float, float] | None) -> bool | None:
    """Return whether `difference` of two independent means is beyond its 95 % interval, whose half-width is the root of the sum of
    the squares of theirs (a little wide: Student's t of either has fewer degrees of freedom than that of both).
    """  # noqa: D205
    if a is None or b is None:
        return None
    return abs(difference) > math.hypot((a[1] - a[0]) / 2, (b[1] - b[0]) / 2)
