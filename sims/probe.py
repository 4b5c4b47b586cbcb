"""One simulation of a search, reduced to what the search asks: does it fit, how surely, and what binds."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from pagedkv.errors import ConfigError
from pagedkv.sims.attainment import Term, attained, terms
from pagedkv.sims.command import changed
from pagedkv.sims.config import SimulationConfig
from pagedkv.sims.metrics import measure
from pagedkv.sims.results import combine, simulate
from pagedkv.sims.scenario import resolve
from pagedkv.sims.simulation import Progress
from pagedkv.sims.statistics import ci95
from pagedkv.sims.verdict import Verdict, judge


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What one configuration did with one allocator."""

    config: SimulationConfig
    figures: dict[str, Any]
    """Over all repeats, by schema name."""
    verdict: Verdict
    attained: float | None
    """Share of the requests that meet the goals, of those whose fate is known; None without goals, or if none is known."""
    attained_ci95: tuple[float, float] | None
    """95 % confidence interval of it over the repeats; None for a single run."""
    by_repeat: tuple[tuple[float | None, float | None], ...]
    """Of each repeat: the share that meets the goals, and output tokens per second."""
    stable_repeats: float
    """Share of the repeats that are stable by themselves."""
    terms: tuple[Term, ...]
    """The goals one by one."""

    @property
    def refused(self) -> int:
        """Requests that were rejected or failed; with goals, those that failed by a fault that was asked for are misses instead."""
        by_fault = bool(self.config.serving.fault and self.terms)
        return int(self.figures["num_rejected"] + (0 if by_fault else self.figures["num_failed"]))

    @property
    def fits(self) -> bool:
        """Whether the verdict says so.

        With no request whose fate is known, as with few users in a short run, nothing has been missed either.
        """
        if not self.terms:
            return _is_stable(self.verdict)
        return self.verdict.fits or (self.attained is None and self.refused == 0)

    def surely_meets(self, share: float) -> bool:
        """Return whether the lower bound of the interval is `share` or more; without goals, whether every repeat is stable."""
        if not self.terms:
            return self.stable_repeats == 1.0
        return self.refused == 0 and (self.attained_ci95 is None or self.attained_ci95[0] >= share)

    def may_meet(self, share: float) -> bool:
        """Return whether the upper bound of the interval is `share` or more; without goals, whether a repeat is stable."""
        if not self.terms:
            return self.stable_repeats > 0.0
        return self.refused == 0 and (self.attained_ci95 is None or self.attained_ci95[1] >= share)


def probe(
    config: SimulationConfig, allocator: str, *, attain: float, off_by: float = 0.0, progress: Progress | None = None
) -> Probe:
    """Simulate `config` with `allocator` and return what a search asks of it; step times may be off: `Deployment.off_by`.

    Raises:
        ConfigError: If `config` cannot work.
    """
    scenario = resolve(changed(config, allocator=(allocator,)))
    if off_by:
        scenario = replace(scenario, deployment=scenario.deployment.off_by(off_by))
    result = simulate(scenario, attain=attain, progress=progress).by_allocator[allocator]
    figures = [measure(run, scenario.goals) for run in result.runs]
    alone = [judge(scenario, combine([each]), [run], attain=attain) for each, run in zip(figures, result.runs, strict=True)]
    shares = [attained([run], scenario.goals) if scenario.goals else None for run in result.runs]
    return Probe(
        config=config,
        figures=result.figures,
        verdict=result.verdict,
        attained=attained(result.runs, scenario.goals) if scenario.goals else None,
        attained_ci95=ci95([share for share in shares if share is not None]),
        by_repeat=tuple(zip(shares, (each["output_tokens_per_s"] for each in figures), strict=True)),
        stable_repeats=sum(map(_is_stable, alone)) / len(alone),
        terms=terms(result.runs, scenario.goals, attain=attain),
    )


def _is_stable(verdict: Verdict) -> bool:
    """Return whether nobody was seen to wait: a run so short, or with so few users, that no request counts says so, too."""
    return verdict.status in ("stable", "unmeasured")


class Probes:
    """The runs of a search by its variable, each done once.

    A value whose configuration cannot work (a context that the machine cannot start with) fits nothing: `at` returns None.
    """

    def __init__(
        self,
        config_of: Callable[[int], SimulationConfig],
        allocator: str,
        *,
        attain: float,
        off_by: float = 0.0,
        progress: Callable[[int, float], None] | None = None,
    ) -> None:
        self._config_of = config_of
        self._allocator = allocator
        self._attain, self._off_by = attain, off_by
        self._progress = progress
        self._by_value: dict[int, Probe | ConfigError] = {}

    def at(self, value: int) -> Probe | None:
        """Return the run at `value`, None if its configuration cannot work.

        Raises:
            ConfigError: If the first one asked for cannot work: then none can.
        """
        if value not in self._by_value:
            try:
                self._by_value[value] = probe(
                    self._config_of(value),
                    self._allocator,
                    attain=self._attain,
                    off_by=self._off_by,
                    progress=self._telling(len(self._by_value)),
                )
            except ConfigError as error:
                if not self._by_value:
                    raise
                self._by_value[value] = error
        found = self._by_value[value]
        return found if isinstance(found, Probe) else None

    def done(self) -> dict[int, Probe | None]:
        """Return what was run, by value, ascending."""
        return {value: self.at(value) for value in sorted(self._by_value)}

    def why_not(self, value: int) -> str | None:
        """Return why the configuration at `value` cannot work; None if it can, or was not tried."""
        found = self._by_value.get(value)
        return str(found) if isinstance(found, ConfigError) else None

    def _telling(self, before: int) -> Progress | None:
        tell = self._progress
        return None if tell is None else lambda _, __, share: tell(before, share)
