"""The result folder: config.toml, summary.json and what shows it in other ways, each file written whole or not at all."""

import csv
import io
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pagedkv.errors import ConfigError
from pagedkv.sims.chrome_trace import trace_text
from pagedkv.sims.config_file import file_text
from pagedkv.sims.recording import KV_KINDS, RUNNING, WAITING
from pagedkv.sims.records import Outcome
from pagedkv.sims.results import Results, rerun_settings
from pagedkv.sims.scenario import Scenario
from pagedkv.sims.simulation import Run
from pagedkv.sims.vllm_metrics import metrics_text

REQUEST_COLUMNS = [
    *("allocator", "repeat", "request", "arrival_s", "scheduled_s", "first_token_s", "last_token_s", "prompt_tokens"),
    *("output_tokens", "num_output_tokens", "num_cached_tokens", "num_preemptions", "outcome", "measured", "class", "model"),
]
TIMELINE_COLUMNS = ["allocator", "repeat", "start_s", "observed_s", "running", "waiting", *(f"kv_{kind}" for kind in KV_KINDS)]


LOAD_COLUMNS = ["allocator", "repeat", "model", "context", "held_bytes", "start_s", "ready_s", "end_s", "why_ended"]


def to_json(document: dict[str, Any]) -> str:
    """Return the result document as JSON text. Floats keep all their digits; no NaN or infinity can be in it."""
    return json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def prepare_folder(folder: Path, *, flag: str = "--out") -> None:
    """Make sure that results can be written to `folder`, which `flag` names, before anything is computed.

    Raises:
        ConfigError: If it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ConfigError(
            f"cannot write results to {str(folder)!r}: {error.strerror}. Give {flag} a folder that you may write to"
        ) from error


def keep_other_runs(scenario: Scenario, folder: Path) -> None:
    """Refuse to write the run of `scenario` over another; over the same settings it is written anew.

    Raises:
        ConfigError: If `folder` holds a config.toml that does not say the same.
    """
    there = folder / "config.toml"
    try:
        same = not there.exists() or there.read_text(encoding="utf-8") == file_text(rerun_settings(scenario), folder)
    except (OSError, UnicodeDecodeError):
        same = False
    if not same:
        raise ConfigError(
            f"{str(folder)!r} holds another run, as its config.toml says: give --out a new folder, or add --overwrite to replace it"
        )


def prepare_file(path: Path, *, flag: str) -> None:
    """Make sure that the file `path`, which `flag` names, can be written, before anything is computed.

    Raises:
        ConfigError: If it is a folder, or its folder cannot be made or written to.
    """
    if path.is_dir():
        raise ConfigError(f"cannot write {flag} {str(path)!r}: it is a directory. Give {flag} the name of a file")
    try:
        prepare_folder(path.absolute().parent)
    except ConfigError as error:
        raise ConfigError(f"cannot write {flag} {str(path)!r}: {error.__cause__}. Give {flag} a file that you may write") from error


def write(results: Results, folder: Path, *, page: str | None = None) -> None:
    """Write all files to `folder`; a file of an earlier run is replaced only once its successor is complete.

    `page` is the text of report.html, if it has been made already.
    """
    if page is None:
        from pagedkv.sims.report import html  # noqa: PLC0415 (plotly takes a while to import)

        page = html(results)
    document = results.document()
    files = {
        "config.toml": file_text(rerun_settings(results.scenario), folder),
        **run_files({name: result.runs for name, result in results.by_allocator.items()}),
        "metrics.prom": metrics_text([results]),
        "trace.json": trace_text([results]),
        "summary.json": to_json(document),
        "report.html": page,
    }
    if results.scenario.model_serving is not None:
        files["loads.csv"] = _csv(LOAD_COLUMNS, _load_rows(results))
    prepare_folder(folder)
    for name, text in files.items():
        write_atomically(folder / name, text)


def run_files(runs: Mapping[str, Sequence[Run]]) -> dict[str, str]:
    """Return requests.csv and timeline.csv by name, of the runs of each allocator."""
    return {
        "requests.csv": _csv(REQUEST_COLUMNS, _request_rows(runs)),
        "timeline.csv": _csv(TIMELINE_COLUMNS, _timeline_rows(runs)),
    }


def write_atomically(path: Path, text: str) -> None:
    """Write `text` to `path` so that a reader, or an interruption, finds the old file or the new one, never a part.

    A pipe or a device is written to, not replaced.

    Raises:
        ConfigError: If it cannot be written.
    """
    target = path.resolve()  # a symbolic link stays one
    try:
        if target.exists() and not target.is_file():
            target.write_text(text, encoding="utf-8")
            return
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", newline="", dir=target.parent, delete=False) as file:
            try:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
                Path(file.name).chmod(0o666 & ~_umask())
                Path(file.name).replace(target)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise
    except OSError as error:
        raise ConfigError(f"cannot write {str(path)!r}: {error.strerror}") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _csv(header: list[str], rows: Iterator[list[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()


def _request_rows(runs: Mapping[str, Sequence[Run]]) -> Iterator[list[Any]]:
    for name, repeats in runs.items():
        for repeat, run in enumerate(repeats):
            log = run.log
            columns = (
                _times(log.arrival_s),
                _times(log.scheduled_s),
                _times(log.first_token_s),
                _times(log.last_token_s),
                log.prompt_tokens.tolist(),
                log.output_tokens.tolist(),
                log.num_output_tokens.tolist(),
                log.num_cached_tokens.tolist(),
                log.num_preemptions.tolist(),
                [Outcome(outcome).name.lower() for outcome in log.outcome],
                (log.arrival_s >= run.warmup_s).astype(int).tolist(),
                [run.class_names[i] for i in log.user_class.tolist()] if run.class_names else [""] * len(log),
                [""] * len(log) if run.server is None else [run.server.models[i].name for i in log.model.tolist()],
            )
            for request, row in enumerate(zip(*columns, strict=True)):
                yield [name, repeat, request, *row]


def _timeline_rows(runs: Mapping[str, Sequence[Run]]) -> Iterator[list[Any]]:
    for name, repeats in runs.items():
        for repeat, run in enumerate(repeats):
            starts_s, seconds, means = run.recorder.timeline.means()
            shares = means[:, : len(KV_KINDS)] / run.allocator.usable_slots
            rows = np.column_stack((starts_s, seconds, means[:, RUNNING], means[:, WAITING], shares))
            for row in rows.tolist():
                yield [name, repeat, *(format(value, ".9g") for value in row)]


def _load_rows(results: Results) -> Iterator[list[Any]]:
    """Yield what each load of a model took of the machine, and when."""
    for name, result in results.by_allocator.items():
        for repeat, run in enumerate(result.runs):
            for load in () if run.server is None else run.server.loads:
                model = run.server.models[load.model].name if run.server is not None else ""
                times = ("" if time_s is None else f"{time_s:.6f}" for time_s in (load.start_s, load.ready_s, load.end_s))
                yield [name, repeat, model, load.context, load.held_bytes, *times, load.why_ended]


def _times(times_s: np.ndarray[Any, np.dtype[np.float64]]) -> list[str]:
    return ["" if np.isnan(t) else f"{t:.6f}" for t in times_s.tolist()]
