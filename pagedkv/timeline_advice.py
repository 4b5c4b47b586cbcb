"""Settings under which a start that goes wrong goes well: each is applied to the timeline before it is named."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from pagedkv.errors import ConfigError
from pagedkv.memory_request import MemoryRequest
from pagedkv.memory_timeline import MemoryTimeline
from pagedkv.remedies import eager, fits
from pagedkv.request_flags import as_flags
from pagedkv.start_phases import attempt_timeline
from pagedkv.start_up import StartOptions
from pagedkv.units import MIB

_MOST_STEPS = 6
_ROUNDING_BYTES = 128 * MIB
"""What whole blocks of another size may come to: no reason to call a start worse."""
Change = tuple[MemoryRequest, StartOptions]


@dataclass(frozen=True, slots=True, kw_only=True)
class StartAdvice:
    """What to change of a start, and what comes of it."""

    settings: tuple[str, ...]
    """Flags, variables and deeds, all of them together."""
    timeline: MemoryTimeline
    """The same start with them."""

    @property
    def solved(self) -> bool:
        """Whether nothing goes wrong then; if not, `timeline` has what is left."""
        return self.timeline.worst.verdict.kind == "ok"


@dataclass(frozen=True, slots=True, kw_only=True)
class SafeStart:
    """Whether and how settings start without endangering their host."""

    settings: tuple[str, ...] = ()
    """What that takes besides, such as MAX_JOBS; empty: nothing."""
    danger: str | None = None
    """The moment that nothing avoids which leaves the settings as they are, in words; None: there is none."""


def advise_start(timeline: MemoryTimeline) -> StartAdvice | None:
    """Return what to change so that nothing goes wrong; None if nothing does, or if nothing that is known helps.

    The worst phase comes first: the mildest change that makes it less bad, and no other phase worse, is applied, and so on.
    """
    now = _better(timeline, _changes, until=lambda each: each.worst.verdict.kind == "ok")
    if now is timeline:
        return None
    return StartAdvice(settings=tuple(_in_words(timeline, now)), timeline=now)


def safe_start(request: MemoryRequest) -> SafeStart:
    """Return how a request that fits starts without a freeze of its host: as it is, by other options of the start, or not."""
    timeline = _outcome((request, StartOptions()))
    if timeline is None or timeline.danger is None:
        return SafeStart()
    now = _mended(timeline)
    if now.danger is not None:
        return SafeStart(danger=timeline.danger)
    return SafeStart(settings=tuple(_in_words(timeline, now)))


def worse_start(before: MemoryTimeline, after: MemoryTimeline) -> str | None:
    """Return the moment at which `after` endangers its host, or is refused, and `before` does so less; None: there is none.

    Two starts that go well with other options of the start, such as MAX_JOBS, are as good as each other.
    """
    if before.danger is None or after.danger is None:
        return after.danger
    was, now = _mended(before), _mended(after)
    if was.danger is None or now.danger is None:
        return now.danger
    fell = was.tightest.worst.mem_available - now.tightest.worst.mem_available
    worse = now.worst.verdict.severity - was.worst.verdict.severity
    return now.danger if worse > 0 or (worse == 0 and fell > _ROUNDING_BYTES) else None


def _mended(timeline: MemoryTimeline) -> MemoryTimeline:
    return _better(timeline, _other_options, until=lambda each: each.danger is None)


def _better(
    timeline: MemoryTimeline, changes: Callable[[MemoryTimeline], Iterator[Change]], *, until: Callable[[MemoryTimeline], bool]
) -> MemoryTimeline:
    now = timeline
    for _ in range(_MOST_STEPS):
        if until(now):
            break
        better = next((outcome for outcome in map(_outcome, changes(now)) if outcome is not None and _helps(now, outcome)), None)
        if better is None:
            break
        now = better
    return now


def _outcome(change: Change) -> MemoryTimeline | None:
    try:
        outcome = attempt_timeline(*change)
    except ConfigError:
        return None
    return outcome if isinstance(outcome, MemoryTimeline) else None


def _helps(now: MemoryTimeline, then: MemoryTimeline) -> bool:
    """Return whether the worst phase is less bad then, and no other is worse."""
    if now.budget is None:
        return then.budget is not None
    before, after, worst = _severities(now), _severities(then), now.worst.name
    return after.get(worst, 0) < before[worst] and all(after[name] <= before.get(name, 0) for name in after)


def _severities(timeline: MemoryTimeline) -> dict[str, int]:
    """Return how bad each phase is, by name; of several guests the worst."""
    found: dict[str, int] = {}
    for phase in timeline.phases:
        found[phase.name] = max(found.get(phase.name, 0), phase.verdict.severity)
    return found


def _changes(now: MemoryTimeline) -> Iterator[Change]:
    request, options = now.request, now.options
    if now.budget is None:
        for remedy in request.ledger.remedies():
            yield from ((change, options) for change in filter(fits, remedy(request)))
        return
    yield from _other_options(now)
    yield from ((replace(request, ledger=ledger), options) for ledger in request.ledger.cautious(request, now.budget))
    if now.start.compiles:
        yield from ((change, options) for change in eager(request))


def _other_options(now: MemoryTimeline) -> Iterator[Change]:
    request, options, start = now.request, now.options, now.start
    if not request.hardware.unified:
        return
    if start.direct_loader and not options.direct_io:
        yield request, replace(options, direct_io=True)
    if not options.drops_caches and not options.direct_io:
        yield request, replace(options, drops_caches=True)
    for jobs in range(_jobs(now) - 1, 0, -1):
        yield request, replace(options, compile_jobs=jobs)
    if options.host_tier_bytes:
        yield request, replace(options, host_tier_bytes=0)
    if options.host_cache(start):
        yield request, replace(options, host_cache_bytes=0)


def _jobs(now: MemoryTimeline) -> int:
    usual = now.request.hardware.nvcc_jobs
    if now.options.compile_jobs is not None:
        return now.options.compile_jobs
    return 0 if usual is None else int(usual.value)


def _in_words(before: MemoryTimeline, after: MemoryTimeline) -> Iterator[str]:
    """Yield what to say, write or do to get from one start to the other."""
    old, new = before.options, after.options
    if new.compile_jobs != old.compile_jobs:
        yield f"MAX_JOBS={new.compile_jobs}"
    if flags := as_flags(before.request, after.request):
        yield flags
    if new.direct_io and not old.direct_io:
        yield after.start.direct_loader
    if new.drops_caches and not old.drops_caches:
        yield "drop page caches while it loads (echo 3 > /proc/sys/vm/drop_caches)"
    if new.host_cache(after.start) < old.host_cache(before.start):
        yield after.start.host_cache_off
    if new.host_tier_bytes < old.host_tier_bytes:
        yield "no tier in CPU memory"
