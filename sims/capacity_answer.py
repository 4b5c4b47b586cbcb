"""The search behind max-users and max-context: the largest value that fits, how sure that is, and what stops the next."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from pagedkv.errors import ConfigError
from pagedkv.sims.attainment import Term, share_words
from pagedkv.sims.bisection import Bisected, largest
from pagedkv.sims.command import changed
from pagedkv.sims.config import ATTAIN, ServingConfig, SimulationConfig
from pagedkv.sims.limits import Binding
from pagedkv.sims.probe import Probe, Probes

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """One simulation of the search."""

    value: int
    """Users, or tokens of context."""
    fits: bool
    status: str
    """The verdict's, or "does not start"."""
    attained: float | None
    """Share of the requests that meet the goals."""
    num_preemptions: int | None
    output_tokens_per_s: float | None
    ttft_s: float | None
    """Mean time to the first token."""
    tpot_s: float | None
    """Mean time per further token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CapacityAnswer:
    """The largest value that fits, for one allocator."""

    allocator: str
    value: int
    """Users, or tokens of context; 0 if not even the smallest fits."""
    criterion: str
    """What fitting means here."""
    interval: tuple[int, int | None]
    """See `interval_means`; None: the largest that is tried fits."""
    interval_means: str
    """What the two ends are."""
    calibration_interval: tuple[int, int | None]
    """The largest values that fit if all steps take as long, and as short, as their constants may be off; None: all tried fit."""
    attained: float | None
    """Share of the requests that meet the goals at `value`."""
    binding: Binding | None
    """The limit that the smallest value that does not fit runs into; the nearest if every value fits; None: it does not start."""
    stops: str
    """What happens at the smallest value that does not fit (at the largest tried, if all fit)."""
    preemption_from: int | None
    """The smallest value tried that has preemptions; None if there were none up to `preemption_tried`."""
    preemption_tried: int
    """The largest value at which preemptions were looked for."""
    anomalies: tuple[int, ...]
    """Values above the smallest that does not fit which fit all the same."""
    failing: tuple[Term, ...]
    """If nothing fits: the goals that the smallest value misses."""
    tried: tuple[Tried, ...]
    """Every simulation of the search, ascending."""
    remedy: Mapping[str, Any] | None = None
    """Settings of the deployment, by field name, that may help the smallest value that does not fit; None: none is known."""

    def document(self) -> dict[str, Any]:
        """Return the answer in JSON types."""
        return asdict(self) | {name: list(getattr(self, name)) for name in ("interval", "calibration_interval")}


def run_at(found: CapacityAnswer) -> Tried | None:
    """Return the simulation at the answer; None if nothing fits."""
    return next((each for each in found.tried if each.value == found.value), None)


def calibrated(found: CapacityAnswer) -> str:
    """Return the interval that the constants leave, in words."""
    low, high = found.calibration_interval
    return f"{low:,} to more than was tried" if high is None else f"{low:,} to {high:,}"


def shown_value(found: CapacityAnswer) -> int:
    """Return the value whose run shows the most: what was found, or, if nothing fits, the smallest that was tried."""
    return found.value or found.tried[0].value


def check_attain(attain: float) -> None:
    """Refuse what is no share of the requests.

    Raises:
        ConfigError: If `attain` is not above 0 and at most 1.
    """
    if not 0 < attain <= 1:
        raise ConfigError(f"--attain is {attain:g}: it is a share of the requests, above 0 and at most 1, e.g. {ATTAIN:g}")


def answer(
    config_of: Callable[[int], SimulationConfig],
    allocator: str,
    *,
    attain: float,
    first: int,
    most: int,
    scale: int = 1,
    resolution: float = 0.0,
    without_preemption: bool = False,
    preemption_most: Callable[[int], int],
    progress: Callable[[float], None] | None = None,
) -> CapacityAnswer:
    """Search the largest value from `first` to `most` that fits.

    Args:
        config_of: The configuration at a value.
        allocator: Which one serves.
        attain: Share of the requests that must meet the goals.
        first: The smallest value, 1 or more, in steps of `scale`.
        most: The largest.
        scale: What one step stands for, e.g. tokens of a block: every value of the answer is multiplied by it.
        resolution: Relative precision that is enough.
        without_preemption: Without goals, a value with preemptions does not fit.
        preemption_most: By answer: how far to look for preemptions.
        progress: Told the share of the search that is done, by estimate.

    Raises:
        ConfigError: If nothing can be run, or the runs are too short to say anything.
    """
    expected, begun = 2 * (2 * most.bit_length() + 6), 0

    def tell(before: int, share: float) -> None:
        if progress is not None:
            progress(min((begun + before + share) / expected, 1.0))

    probes = Probes(lambda value: config_of(value * scale), allocator, attain=attain, progress=tell)

    def calm(found: Probe) -> bool:
        return not without_preemption or bool(found.terms) or found.figures["num_preemptions"] == 0

    def passing(test: Callable[[Probe], bool], probes: Probes = probes) -> Callable[[int], bool]:
        return lambda value: (found := probes.at(value)) is not None and test(found) and calm(found)

    def if_off_by(spreads: float) -> int | None:
        nonlocal begun
        begun += len(probes.done())
        once = Probes(
            lambda value: changed(config_of(value * scale), repeats=1), allocator, attain=attain, off_by=spreads, progress=tell
        )
        found = largest(passing(lambda each: each.fits, once), first=first, most=most, resolution=resolution)
        return None if found.bad is None else _scaled(found.good, first, scale)

    def search(test: Callable[[Probe], bool], *, guard: bool = False) -> Bisected:
        return largest(passing(test), first=first, most=most, resolution=resolution, guard=guard)

    fits = passing(lambda found: found.fits)
    found = search(lambda found: found.fits, guard=True)
    at = probes.at(found.good) if found.good >= first else None
    if at is not None and (at.figures["num_finished"] == 0 or (at.terms and at.attained is None)):
        raise ConfigError("no request was answered within the measured time, so that nothing can be said: give a longer --duration")
    smallest = probes.at(first)
    assert smallest is not None  # else it has raised
    interval, means = _interval(found, smallest, search, first=first, attain=attain)
    calm_until = largest(
        lambda value: (found := probes.at(value)) is not None and found.figures["num_preemptions"] == 0,
        first=first,
        most=max(first, min(most, preemption_most(found.good))),
        resolution=resolution,
    )
    stopping = found.good if found.bad is None else found.bad
    stopped = probes.at(stopping)
    onset = min((value for value, each in probes.done().items() if each and each.figures["num_preemptions"]), default=None)
    return CapacityAnswer(
        allocator=allocator,
        value=_scaled(found.good, first, scale),
        criterion=_criterion(smallest, attain=attain, without_preemption=without_preemption),
        interval=(_scaled(interval[0], first, scale), None if interval[1] is None else _scaled(interval[1], first, scale)),
        interval_means=means,
        calibration_interval=_around(found, if_off_by(1.0), if_off_by(-1.0), first=first, scale=scale),
        attained=None if at is None else at.attained,
        binding=None if stopped is None else "kv_memory" if not calm(stopped) else stopped.verdict.binding,
        stops=(probes.why_not(stopping) or "") if stopped is None else _said(stopped, calm=calm(stopped), attain=attain),
        preemption_from=None if onset is None else onset * scale,
        preemption_tried=(calm_until.good if calm_until.bad is None else calm_until.bad) * scale,
        anomalies=tuple(value * scale for value in found.above),
        failing=() if at is not None else tuple(term for term in smallest.terms if (term.attained or 0.0) < attain),
        tried=tuple(_tried(value * scale, each, fits=fits(value)) for value, each in probes.done().items()),
        remedy=None if stopped is None or found.bad is None else _remedy(stopped),
    )


def _remedy(stopped: Probe) -> Mapping[str, Any] | None:
    """Return what the verdict would change of the deployment; None if it would change the load."""
    settings = stopped.verdict.next_settings
    return settings if not stopped.fits and settings.keys() <= {field.name for field in fields(ServingConfig)} else None


def _interval(
    found: Bisected, smallest: Probe, search: Callable[[Callable[[Probe], bool]], Bisected], *, first: int, attain: float
) -> tuple[tuple[int, int | None], str]:
    """Return the interval of the answer `found`, and what its ends are. `search` finds the largest value that passes a test."""
    if smallest.config.measurement.repeats > 1:
        sure, possible = search(lambda each: each.surely_meets(attain)), search(lambda each: each.may_meet(attain))
        high = None if found.bad is None or possible.bad is None else max(possible.good, found.good)
        if smallest.terms:
            means = f"up to the first, a share of {attain:g} or more is sure to meet the goals; beyond the second, less is sure to"
        else:
            means = "up to the first, every repeat is stable by itself; beyond the second, none is"
        return (min(sure.good, found.good), high), f"{means} (95 % over the repeats)" if smallest.terms else means
    if found.above:
        means = "all tried up to the first fit; the second fits, too, but one between them does not"
        return (found.good, found.above[-1]), f"{means}; one run each, --repeats 5 gives a 95 % interval"
    if found.bad is None:
        means = "the largest that was tried fits"
    else:
        means = (
            "the first fits, the second does not"
            if found.good >= first
            else "the second does not fit, and nothing smaller was tried"
        )
    return (found.good, found.bad), f"{means}; one run each, --repeats 5 gives a 95 % interval"


def _around(found: Bisected, slow: int | None, fast: int | None, *, first: int, scale: int) -> tuple[int, int | None]:
    """Return an interval that holds what was found: near its limit a figure is noisy."""
    value = _scaled(found.good, first, scale)
    return (value if slow is None else min(slow, value), None if fast is None or found.bad is None else max(fast, value))


def _criterion(smallest: Probe, *, attain: float, without_preemption: bool) -> str:
    if not smallest.terms:
        calm = " and without preemptions" if without_preemption else ""
        return f"stable{calm} (simulate explain stable), about as fast as for one user alone, be that slow; --goodput sets times"
    return f"{100 * attain:g} % of the requests within " + " and ".join(
        f"{term.metric} {1e3 * term.limit_s:,g} ms" for term in smallest.terms
    )


def _said(found: Probe, *, calm: bool, attain: float) -> str:
    figures = found.figures
    if not calm:
        return f"{figures['num_preemptions']:,} preemptions"
    if not found.terms or found.attained is None:
        return found.verdict.text.partition(". Limit")[0].partition(": ")[2]
    refused = f", and {found.refused:,} of {figures['num_injected']:,} are turned away" if found.refused else ""
    return f"{share_words(found.attained, attain)} of the requests meet the goals{refused}"


def _scaled(value: int, first: int, scale: int) -> int:
    return value * scale if value >= first else 0


def _mean(found: Probe, latency: str) -> float | None:
    figure = found.figures[latency]
    return None if figure is None else float(figure["mean"])


def _tried(value: int, found: Probe | None, *, fits: bool) -> Tried:
    return Tried(
        value=value,
        fits=fits,
        status="does not start" if found is None else found.verdict.status,
        attained=None if found is None else found.attained,
        num_preemptions=None if found is None else found.figures["num_preemptions"],
        output_tokens_per_s=None if found is None else found.figures["output_tokens_per_s"],
        ttft_s=None if found is None else _mean(found, "ttft_s"),
        tpot_s=None if found is None else _mean(found, "tpot_s"),
    )
