"""The section of loads that were served by vLLM on a DGX Spark: each simulated request by request, with constants that saw none."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from pagedkv.hardware_spec import HardwareSpec
from pagedkv.sims.calibration import calibration_for
from pagedkv.sims.config import LoadConfig, MeasurementConfig, ServingConfig, SimulationConfig
from pagedkv.sims.constant_sources import families_of
from pagedkv.sims.error_interval import error_intervals
from pagedkv.sims.load import TraceReplay
from pagedkv.sims.records import Outcome
from pagedkv.sims.scenario import Scenario, resolve
from pagedkv.sims.simulation import run
from pagedkv.sims.step_constants import StepConstants
from pagedkv.sims.step_time import RooflineStepTime
from pagedkv.sims.validation.checks import Check, Section, Table, at_most, reported
from pagedkv.sims.validation.plots import scatter_picture
from pagedkv.sims.validation.row_models import RowModel, model_of
from pagedkv.sims.validation.served_loads import FILE, ServedLoad, requests_of, served_loads
from pagedkv.weight_format import WEIGHT_FORMATS

NAME = "served_loads"
TITLE = "Loads that vLLM served on a DGX Spark"
ENGINE = "vllm"
TPOT_BAR, E2E_BAR, TTFT_BAR = 0.20, 0.20, 0.35
"""Means of absolute errors over loads. Set by us after a first look, so that nothing gets worse unseen; nobody asked for them."""
LABELS: Mapping[str, str] = {"tpot_s": "TPOT", "ttft_s": "TTFT", "e2e_s": "E2E", "duration_s": "duration"}
"""Means that are compared."""
COVERAGE_BAR = 0.85
"""Share of loads whose TPOT lies within the interval that `simulate` would state: what is asked of left-out rows too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """A load, and what comes out of simulating it."""

    load: ServedLoad
    subject: RowModel
    ttft_s: float
    tpot_s: float
    e2e_s: float
    duration_s: float
    tpot_interval_s: tuple[float, float]
    """What the calibration says that the mean TPOT may be."""

    @property
    def errors(self) -> dict[str, float]:
        """Signed relative errors by figure."""
        return {name: getattr(self, name) / getattr(self.load, name) - 1 for name in ("tpot_s", "ttft_s", "e2e_s", "duration_s")}

    @property
    def covered(self) -> bool:
        """Whether the measured TPOT lies in the interval."""
        low, high = self.tpot_interval_s
        return low <= self.load.tpot_s <= high


def section(hardware: HardwareSpec, loads: Sequence[ServedLoad] | None = None) -> Section:
    """Return how the simulator does on `loads`, all of the file without them."""
    everything = served_loads() if loads is None else loads
    why_not = {load.source: why for load in everything if (why := why_not_compared(load))}
    compared = [simulated(load, hardware) for load in everything if load.source not in why_not]
    random = [each for each in compared if each.load.input_len is not None]
    real = [each for each in compared if each.load.input_len is None]
    return Section(
        name=NAME,
        title=TITLE,
        source=f"{FILE.name}: {len(everything)} runs of vllm bench serve, {len(compared)} compared",
        checks=tuple(_checks(random, real, compared)),
        notes=tuple(_notes(why_not)),
        tables=tuple(_tables(compared)),
        pictures={"served-loads.svg": _picture(compared)} if compared else {},
        details={"loads": [_document(each) for each in compared], "not_compared": why_not},
    )


def why_not_compared(load: ServedLoad) -> str:
    """Return why a load cannot be simulated as it was; empty: it can."""
    if load.num_failed:
        return "a request failed"
    if load.tpot_s > load.p99_tpot_s:
        return "mean TPOT is above the P99: tokens came in bursts"
    if load.input_len is not None and int(requests_of(load).output_tokens.sum()) != load.total_output_tokens:
        return "answers ended before the length that was asked"
    return ""


def simulated(load: ServedLoad, hardware: HardwareSpec, *, constants: StepConstants | None = None) -> Compared:
    """Run a load, with other constants than `simulate` has where some are given."""
    subject = model_of(load.model, load.weight_dtype, ENGINE)
    assert isinstance(subject, RowModel)
    scenario = _scenario(
        hardware.name,
        load.model,
        load.weight_dtype,
        load.kv_cache_dtype,
        load.max_model_len,
        load.gpu_memory_utilization,
        load.max_num_batched_tokens,
    )
    deployment = scenario.deployment
    calibration = calibration_for(hardware, ENGINE, subject.weight_format, deployment.config.kv_cache_dtype, model=deployment.model)
    step_time = RooflineStepTime(
        deployment.model,
        hardware,
        weight_format=subject.weight_format,
        kv_spec=deployment.model.kv_spec(deployment.config.kv_cache_dtype),
        constants=constants or calibration.constants,
    )
    replay = TraceReplay(trace=requests_of(load), max_concurrency=load.max_concurrency)
    deployment = replace(deployment, step_time=step_time, calibration=calibration)
    done = run(replace(scenario, deployment=deployment, load=replay), deployment.own_allocator, seed=0)
    log = done.log
    assert (log.outcome == Outcome.FINISHED).all()
    tpot_s = float(np.mean((log.last_token_s - log.first_token_s) / np.maximum(log.num_output_tokens - 1, 1)))
    figures = {"output_tokens_per_s": 1.0, "tpot_s": tpot_s, "ttft_s": 1.0}
    interval = error_intervals(figures, calibration, [done.recorder])["tpot_s"]
    assert interval is not None
    return Compared(
        load=load,
        subject=subject,
        ttft_s=float(np.mean(log.first_token_s - log.arrival_s)),
        tpot_s=tpot_s,
        e2e_s=float(np.mean(log.last_token_s - log.arrival_s)),
        duration_s=float(log.last_token_s.max()),
        tpot_interval_s=(interval[0], interval[1]),
    )


@cache
def _scenario(
    hardware: str,
    model: str,
    weight_dtype: str,
    kv_cache_dtype: str,
    max_model_len: int,
    utilization: float,
    max_num_batched_tokens: int,
) -> Scenario:
    """Return a model as it was served, with nobody who asks.

    Its KV cache is what the weight type's usual checkpoint leaves: one that keeps more of its layers wide leaves less.
    """
    subject = model_of(model, weight_dtype, ENGINE)
    assert isinstance(subject, RowModel)
    serving = ServingConfig(
        hardware=hardware,
        model=subject.model.name,
        engine=ENGINE,
        quantization=next(name for name in WEIGHT_FORMATS if name == subject.weight_format.name.removesuffix("-marlin")),
        kv_cache_dtype=kv_cache_dtype,
        enable_prefix_caching=False,
        max_model_len=max_model_len,
        gpu_memory_utilization=utilization,
        max_num_batched_tokens=max_num_batched_tokens,
    )
    measurement = MeasurementConfig(allocator=("paged",))
    scenario = resolve(SimulationConfig(load=LoadConfig(users=1), serving=serving, measurement=measurement))
    return replace(scenario, warmup_s=0.0, duration_s=None)


def mean_errors(compared: Sequence[Compared]) -> dict[str, float]:
    """Return the means of absolute errors by figure."""
    return {name: float(np.mean([abs(each.errors[name]) for each in compared])) for name in compared[0].errors}


def _checks(random: Sequence[Compared], real: Sequence[Compared], compared: Sequence[Compared]) -> Iterator[Check]:
    bars = {"tpot_s": TPOT_BAR, "e2e_s": E2E_BAR, "ttft_s": TTFT_BAR}
    for what, those in (("random prompts, sent request by request", random), ("prompts of ShareGPT, of the same totals", real)):
        if not those:
            continue
        errors = mean_errors(those)
        for name, bar in bars.items():
            yield at_most(f"{LABELS[name]}, mean error of {len(those)} loads of {what}", errors[name], bar)
        half = float(np.median([abs(each.errors["tpot_s"]) for each in those]))
        yield reported(f"TPOT, median error of the same {len(those)} loads", "", f"{half:.1%}", "half of them are nearer")
    share = sum(each.covered for each in compared) / max(len(compared), 1)  # of nothing compared nothing holds
    yield Check(
        what="loads whose TPOT lies in the interval that simulate states",
        measured="",
        simulated=f"{share:.1%}",
        bar=f"at least {COVERAGE_BAR:.0%}",
        outcome="holds" if share >= COVERAGE_BAR else "fails",
    )


def _notes(why_not: Mapping[str, str]) -> Iterator[str]:
    yield "Nothing was fitted to these loads: the constants come from single requests and batches of up to ten there."
    for why in dict.fromkeys(why_not.values()):
        yield f"Not compared, since {why}: {', '.join(source for source, its in why_not.items() if its == why)}."


def _tables(compared: Sequence[Compared]) -> Iterator[Table]:
    by_model: dict[tuple[str, str], list[Compared]] = {}
    for each in compared:
        by_model.setdefault((each.subject.model.title, each.subject.weight_format.name), []).append(each)
    yield Table(
        title="By model: loads, mean absolute errors, and mean signed errors of TPOT, of random prompts and of ShareGPT's",
        header=("model", "weights", "loads", "TPOT", "TTFT", "E2E", "TPOT, random", "TPOT, ShareGPT"),
        rows=tuple(_by_model(by_model)),
    )
    yield Table(
        title="Every load: measured and simulated means",
        header=("load", "rate", "TPOT, ms", "here", "error", "TTFT, s", "here", "error", "E2E, s", "here", "error"),
        rows=tuple(_by_load(compared)),
        detail=True,
    )


def _picture(compared: Sequence[Compared]) -> str:
    """Return measured and simulated TPOT by kind of model."""
    points: dict[str, list[tuple[float, float, bool]]] = {"dense": [], "with states": [], "mixture of experts": []}
    for each in compared:
        families = families_of(each.subject.model)
        kind = "mixture of experts" if "experts" in families else "with states" if "states" in families else "dense"
        points[kind].append((1e3 * each.load.tpot_s, 1e3 * each.tpot_s, each.load.input_len is not None))
    return scatter_picture(
        "Measured and simulated time per output token of loads served by vLLM",
        points,
        axes=("measured mean TPOT, ms", "simulated mean TPOT, ms"),
        marks=("random prompts", "ShareGPT"),
    )


def _by_model(by_model: Mapping[tuple[str, str], Sequence[Compared]]) -> Iterator[tuple[str, ...]]:
    for (title, fmt), its in sorted(by_model.items()):
        errors = mean_errors(its)
        mixture = " (mixture)" if "experts" in families_of(its[0].subject.model) else ""
        signed = [
            [each.errors["tpot_s"] for each in its if (each.load.input_len is None) == of_share_gpt]
            for of_share_gpt in (False, True)
        ]
        yield (
            f"{title}{mixture}",
            fmt,
            str(len(its)),
            *(f"{errors[name]:.1%}" for name in ("tpot_s", "ttft_s", "e2e_s")),
            *(f"{np.mean(values):+.1%}" if values else "–" for values in signed),
        )


def _by_load(compared: Sequence[Compared]) -> Iterator[tuple[str, ...]]:
    for each in compared:
        load, errors = each.load, each.errors
        yield (
            load.source,
            f"{load.request_rate_per_s:g}" + (f", at most {load.max_concurrency}" if load.max_concurrency else ""),
            *(f"{1e3 * load.tpot_s:,.0f}", f"{1e3 * each.tpot_s:,.0f}", f"{errors['tpot_s']:+.1%}"),
            *(f"{load.ttft_s:,.2f}", f"{each.ttft_s:,.2f}", f"{errors['ttft_s']:+.1%}"),
            *(f"{load.e2e_s:,.1f}", f"{each.e2e_s:,.1f}", f"{errors['e2e_s']:+.1%}"),
        )


def _document(each: Compared) -> dict[str, object]:
    measured = {name: getattr(each.load, name) for name in LABELS}
    return {
        "source": each.load.source,
        "model": each.subject.model.name,
        "weights": each.subject.weight_format.name,
        "measured": measured,
        "simulated": {name: getattr(each, name) for name in LABELS},
        "tpot_interval_s": list(each.tpot_interval_s),
    }
