"""What to try next: the command of a remedy that would start, or of more or less load."""

import math
from collections.abc import Iterator
from typing import Any

from pagedkv.errors import ConfigError
from pagedkv.sims.attainment import terms
from pagedkv.sims.command import changed
from pagedkv.sims.config import SimulationConfig
from pagedkv.sims.deployment import Deployment
from pagedkv.sims.limits import Binding, held_back_to
from pagedkv.sims.load_flags import LARGEST
from pagedkv.sims.missed_goal import MissedGoal
from pagedkv.sims.records import Outcome
from pagedkv.sims.scenario import Scenario, resolve
from pagedkv.sims.simulation import Run
from pagedkv.sims.slot_remedies import enough_cells, longer_slots, more_at_once
from pagedkv.sims.start_check import start_worsened
from pagedkv.weight_format import load_weight_format

CLEARLY_NARROWER = 0.8
"""Of the present bits per weight: a format above this share of them is hardly faster, and costs quality all the same."""


def next_settings(
    scenario: Scenario, binding: Binding, runs: list[Run], why: MissedGoal | None, *, attain: float, fits: bool
) -> dict[str, Any]:
    """Return the settings to try next, by field name.

    They are more load if this one fits, else the nearest remedy that would start, else less load. A remedy whose start would freeze
    the host, where the present one's does not, is none. Less load does not help prompts that miss a goal all by themselves: a
    faster format does, or a goal that they can keep. Of a client that waits for answers the load is how many it waits for.

    Args:
        scenario: What ran.
        binding: The limit that is reached, or would be reached first.
        runs: Its runs.
        why: Which goal is missed most, and why; None if they are met, or for want of goals.
        attain: The share of requests that must meet the goals.
        fits: Whether the load fits.
    """
    config, load = scenario.config, scenario.config.load
    remedies: list[dict[str, Any]] = []
    if not fits:
        if binding == "max_model_len":
            needed = max(int((run.log.prompt_tokens + run.log.output_tokens).max(initial=1)) for run in runs)
            remedies = [{"max_model_len": needed}, *longer_slots(scenario, needed), {"over_length": "drop"}]
        elif binding == "kv_memory":
            remedies = [_more_kv(scenario)]
        elif binding == "ctx_size":
            remedies = enough_cells(scenario, _longest_asked(runs))
        elif binding == "bandwidth" and (narrower := _narrower_format(scenario)):
            remedies = [{"quantization": narrower}]
        elif binding == "max_num_seqs":
            remedies = more_at_once(scenario, _longest_asked(runs))
        elif binding == "model_loads" and scenario.model_serving is not None and (lower := scenario.model_serving.lower_context):
            remedies = [{"ctx_size": lower}]
    more = 2.0 if fits else 0.5
    if why is not None and (why.prompts_alone_miss or load.users == 1):
        remedies += [{"quantization": faster} for faster in _faster_formats(scenario)]
        remedies.append({"goodput": _goals_within_reach(scenario, runs, attain)})
    elif load.users is not None:
        remedies.append({"users": min(max(1, round(load.users * more)), LARGEST["users"])})
    elif load.workload is not None:
        remedies += [{"quantization": faster} for faster in _faster_formats(scenario)]
        remedies.append({"repeats": config.measurement.repeats + 4})
    else:
        if load.max_concurrency is not None and held_back_to(scenario, runs) is not None:
            remedies.append({"max_concurrency": min(max(1, round(load.max_concurrency * more)), LARGEST["max_concurrency"])})
        name, rate = ("trace_rate", load.trace_rate or 1.0) if load.request_rate is None else ("request_rate", load.request_rate)
        remedies.append({name: min(rate * more, LARGEST[name])})
    if fits:
        remedies.append({"repeats": config.measurement.repeats + 4})  # of the largest load that there is: how sure that is
    return next(remedy for remedy in remedies if _starts(config, remedy) or remedy is remedies[-1])


def _starts(config: SimulationConfig, remedy: dict[str, Any]) -> bool:
    then = changed(config, **remedy)
    try:
        resolve(then)
    except ConfigError:
        return False
    return then != config and start_worsened(config.serving, then.serving) is None


def _longest_asked(runs: list[Run]) -> int:
    """Return the tokens of the longest request that was not refused."""
    logs = [run.log.where(run.log.outcome != Outcome.REJECTED) for run in runs]
    return max(int((log.prompt_tokens + log.output_tokens).max(initial=1)) for log in logs)


def _more_kv(scenario: Scenario) -> dict[str, Any]:
    serving = scenario.config.serving
    if serving.num_gpu_blocks_override is not None:
        return {"num_gpu_blocks_override": 2 * serving.num_gpu_blocks_override}
    return {"kv_cache_dtype": "fp8"}


def narrower_formats(deployment: Deployment) -> Iterator[str]:
    """Yield the engine's formats, the widest first, that take clearly less than the present one and compute no slower."""
    hardware, now = deployment.hardware, deployment.weight_format
    for name in deployment.engine.ledger(deployment.config, hardware, deployment.scheduler).weight_formats:
        narrower = load_weight_format(name)
        if narrower.compute_dtype == "fp4" and "fp4" not in hardware.reached_flops:
            continue
        slower = hardware.effective_flops(narrower) < hardware.effective_flops(now)
        if narrower.bits_per_weight < CLEARLY_NARROWER * now.bits_per_weight and not slower:
            yield name


def _narrower_format(scenario: Scenario) -> str | None:
    return next(narrower_formats(scenario.deployment), None)


def _faster_formats(scenario: Scenario) -> list[str]:
    hardware, current = scenario.deployment.hardware, scenario.deployment.weight_format
    narrower = _narrower_format(scenario)
    faster = narrower and hardware.effective_flops(load_weight_format(narrower)) > hardware.effective_flops(current)
    return [narrower] if narrower and faster else []


def _goals_within_reach(scenario: Scenario, runs: list[Run], attain: float) -> tuple[str, ...]:
    """Return the goals with each limit that is missed raised to what the wanted share would keep, rounded up."""
    texts = []
    for term in terms(runs, scenario.goals, attain=attain):
        limit_s = term.limit_s if term.reached_s is None else max(term.limit_s, term.reached_s)
        raised_ms = f"{math.ceil(1e3 * limit_s):d}" if limit_s > term.limit_s else f"{1e3 * limit_s:g}"
        texts.append(f"{term.metric}:{raised_ms}")
    return tuple(texts)
