"""Many simulations: every combination of some flags' values, on all cores, in a folder from which an interrupted sweep goes on."""

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pagedkv.errors import ConfigError
from pagedkv.sims.export import to_json, write_atomically
from pagedkv.sims.flat_figures import FIGURES, VERDICT, check_figure, figure
from pagedkv.sims.scenario import resolve
from pagedkv.sims.sweep_findings import Anomaly, Cliff, Row, anomalies, cliffs
from pagedkv.sims.sweep_grid import Grid
from pagedkv.sims.sweep_names import check_names
from pagedkv.sims.sweep_store import RESULTS, SCHEMA_VERSION, config_hash, header, open_store
from pagedkv.sims.workers import all_cores, outcomes


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """A sweep, done."""

    grid: Grid
    rows: tuple[Row, ...]
    """One per combination, sorted."""
    cliffs: tuple[Cliff, ...]
    anomalies: tuple[Anomaly, ...]

    def document(self) -> dict[str, Any]:
        """Return it in JSON types; the same for a sweep that was interrupted as for one that was not."""
        return {
            **header(self.grid),
            "schema_version": SCHEMA_VERSION,
            "swept": {axis.name: list(axis.values) for axis in self.grid.axes},
            "runs": [{"values": row.values, **row.outcome} for row in self.rows],
            "cliffs": [asdict(cliff) for cliff in self.cliffs],
            "anomalies": [asdict(anomaly) for anomaly in self.anomalies],
        }

    def csv(self) -> str:
        """Return a line per combination: swept flags, figures by dotted name, and the error of one that cannot run."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        names = [axis.name for axis in self.grid.axes]
        writer.writerow([*names, "num_blocks", *FIGURES, *VERDICT, "error"])
        for row in self.rows:
            values = [value_text(row.values[name]) for name in names]
            result = row.outcome.get("result", {})
            figures = [figure(result, name) for name in (*FIGURES, *VERDICT)]
            writer.writerow([*values, row.outcome.get("num_blocks"), *figures, row.outcome.get("error")])
        return text.getvalue()


def value_text(value: Any) -> Any:
    """Return a value of a flag for a table: a list as its words."""
    return " ".join(value) if isinstance(value, tuple | list) else value


def run_sweep(
    grid: Grid,
    folder: Path,
    *,
    workers: int | None = None,
    metric: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Sweep:
    """Run every combination of `grid` that `folder` does not have yet, and write results.csv, results.json and sweep.html there.

    Args:
        grid: What to run.
        folder: Where results go, each as soon as it is there. In the folder of an interrupted sweep it goes on from there; more
            values of the same flags may be added to it.
        workers: Processes; None: as many as there are cores.
        metric: Figure of the picture; None: the share within the goals, or the throughput if there are none.
        progress: Told (runs done, all of them).

    Raises:
        ConfigError: If no combination can run, or the folder cannot be written or holds another sweep.
    """
    if workers is not None and workers < 1:
        raise ConfigError(f"--workers is {workers}: needs 1 or more")
    if metric is None:
        metric = "goodput_share" if any(point.config.measurement.goodput for point in grid) else "output_tokens_per_s"
    check_figure(metric)
    check_names(grid)
    _check_one_runs(grid)
    points = list(grid)
    keys = [config_hash(point.config) for point in points]
    with open_store(folder, grid) as store:
        todo = {key: point.config for key, point in zip(keys, points, strict=True) if key not in store.finished}
        before = len(points) - len(todo)
        if progress is not None:
            progress(before, len(points))
        waiting = list(todo)
        for done, (i, outcome) in enumerate(outcomes(list(todo.values()), workers=workers or all_cores()), start=1):
            store.append(waiting[i], outcome)
            if progress is not None:
                progress(before + done, len(points))
        rows = tuple(Row(values=point.values, outcome=store.finished[key]) for key, point in zip(keys, points, strict=True))
        sweep = Sweep(grid=grid, rows=rows, cliffs=tuple(cliffs(grid.axes, rows)), anomalies=tuple(anomalies(grid.axes, rows)))
        _write(sweep, folder, metric)
    return sweep


def _check_one_runs(grid: Grid) -> None:
    """Refuse a sweep of which nothing can run, with the first reason. If some can, the results say why the others cannot."""
    first: ConfigError | None = None
    for point in grid:
        try:
            resolve(point.config)
        except ConfigError as error:
            first = first or error
        else:
            return
    assert first is not None
    raise first


def _write(sweep: Sweep, folder: Path, metric: str) -> None:
    from pagedkv.sims.sweep_plot import html  # noqa: PLC0415 (plotly takes a while to import)

    for name, text in zip(RESULTS, (sweep.csv(), to_json(sweep.document()), html(sweep, metric)), strict=True):
        write_atomically(folder / name, text)


def labels(values: dict[str, Any]) -> str:
    """Return the values of flags as a legend has them, e.g. "block-size 16, allocator paged"; "" for none."""
    return ", ".join(f"{name.replace('_', '-')} {value_text(value)}" for name, value in values.items())


def errors(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Return the combinations that cannot run, each with the reason."""
    return [(labels(row.values), row.outcome["error"]) for row in rows if "error" in row.outcome]
