"""The section of a real vLLM run: fitted on its first minute, scored on the rest."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pagedkv.arrays import Float64Array
from pagedkv.sims.validation.checks import Check, Section, Table, at_most, within
from pagedkv.sims.validation.log_replay import FIT_S, FREE, Replay, fit_to_beginning, machine_of, replay, scenario_of
from pagedkv.sims.validation.plots import seconds_picture
from pagedkv.sims.validation.vllm_log import VLLMLog, read_log

NAME = "vllm_log"
MEAN_BAR = 0.03
KV_POINTS_BAR = 5.0
RUNNING_BAR = 4.0


def section(folder: Path, hardware: str | None = None) -> Section:
    """Return how the simulator does on a log.

    Raises:
        ConfigError: If the log cannot be read, or is of a machine, model or version that is not known.
    """
    log = read_log(folder)
    scenario = scenario_of(log, machine_of(log).name if hardware is None else hardware)
    constants = fit_to_beginning(log, scenario)
    ours = replay(scenario, constants)
    rest = log.finish_s > FIT_S
    checks = [*_means(log, ours, rest, "requests that end later"), *_means(log, ours, np.ones_like(rest), "all requests")]
    num = len(log.seconds["t"])
    running, kv_pct = ours.seconds(num)
    later = np.arange(num) >= FIT_S
    for name, simulated, limit in (("running", running, RUNNING_BAR), ("kv_cache_pct", kv_pct, KV_POINTS_BAR)):
        error = float(np.mean(np.abs(simulated - log.seconds[name])[later]))
        checks.append(at_most(f"{name} every second, mean absolute error after {FIT_S:.0f} s", error, limit, percent=False))
    deployment = scenario.deployment
    fitted = {name: float(getattr(constants, name)) for names in FREE for name in names}
    as_is = replay(scenario)
    notes = (
        f"Constants are fitted to the first {FIT_S:.0f} s alone: "
        + ", ".join(f"{name} {value:.4g}" for name, value in fitted.items())
        + ".",
        f"{int(ours.run.log.num_preemptions.sum())} preemptions.",
        "With the constants that `simulate` has for this machine: "
        + ", ".join(f"{check.what.partition(':')[0]} {check.simulated}" for check in _means(log, as_is, np.ones_like(rest), "all"))
        + ".",
    )
    details: dict[str, Any] = {"constants": fitted, "engine": deployment.engine.name, "hardware": deployment.hardware.name}
    return Section(
        name=NAME,
        title=f"A real vLLM run ({log.version}, {log.device}, {log.model})",
        source=f"{folder.name}: {len(log.trace)} requests, {num} seconds",
        checks=tuple(checks),
        notes=notes,
        tables=(_seconds_table(log, running, kv_pct),),
        pictures={"vllm-log.svg": _picture(log, running, kv_pct)},
        details=details,
    )


def _means(log: VLLMLog, ours: Replay, chosen: npt.NDArray[np.bool_], of_whom: str) -> list[Check]:
    run = ours.run.log
    arrival, output = log.trace.arrival_s, np.maximum(log.trace.output_tokens - 1, 1)
    checks = []
    for what, theirs, simulated, unit in (
        ("TTFT, mean", log.first_token_s - arrival, run.first_token_s - arrival, 1.0),
        ("TPOT, mean", (log.finish_s - log.first_token_s) / output, (run.last_token_s - run.first_token_s) / output, 1e3),
        ("E2E, mean", log.finish_s - arrival, run.last_token_s - arrival, 1.0),
    ):
        mark = " ms" if unit > 1 else " s"
        checks.append(
            within(
                f"{what}: {of_whom}",
                unit * float(np.mean(theirs[chosen])),
                unit * float(np.mean(simulated[chosen])),
                share=MEAN_BAR,
                digits=2,
                unit=mark,
            )
        )
    if chosen.all():
        checks.append(within("makespan", float(log.finish_s.max()), float(np.nanmax(run.last_token_s)), share=MEAN_BAR, unit=" s"))
    return checks


def _picture(log: VLLMLog, running: Float64Array, kv_pct: Float64Array) -> str:
    return seconds_picture(
        {
            "requests running": (("vLLM's log", log.seconds["running"]), ("simulated", running)),
            "KV cache in use, %": (("vLLM's log", log.seconds["kv_cache_pct"]), ("simulated", kv_pct)),
        },
        FIT_S,
    )


def _seconds_table(log: VLLMLog, running: Float64Array, kv_pct: Float64Array) -> Table:
    rows = []
    num = len(log.seconds["t"])
    for second in range(0, num, math.ceil(num / 20)):
        rows.append(
            (
                str(second),
                f"{log.seconds['running'][second]:.0f}",
                f"{running[second]:.1f}",
                f"{log.seconds['kv_cache_pct'][second]:.1f}",
                f"{kv_pct[second]:.1f}",
            )
        )
    return Table(
        title="Running requests and KV cache in use over time",
        header=("second", "running: log", "here", "KV in %: log", "here"),
        rows=tuple(rows),
        detail=True,
    )
