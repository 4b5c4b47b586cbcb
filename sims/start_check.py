"""Whether settings that somebody would propose start well: a proposal that freezes its host, or is refused, is none."""

from pagedkv.errors import ConfigError
from pagedkv.memory_timeline import MemoryTimeline
from pagedkv.sims.budget_timeline import headline
from pagedkv.sims.config import ServingConfig
from pagedkv.sims.deployment import memory_request
from pagedkv.start_timeline import memory_timeline
from pagedkv.timeline_advice import advise_start, safe_start, worse_start


def start_worsened(before: ServingConfig, after: ServingConfig) -> str | None:
    """Return the moment at which the start of `after` endangers its host, and that of `before` does not so much; or None.

    Starts of the usual kind, with nothing compiled before, as `simulate budget --timeline` shows them.
    """
    if after == before:
        return None
    was, now = _timeline(before), _timeline(after)
    return None if was is None or now is None else worse_start(was, now)


def start_note(serving: ServingConfig) -> str | None:
    """Return how the start of `serving` endangers its host, and what avoids it; None: it does not."""
    timeline = _timeline(serving)
    if timeline is None or timeline.danger is None:
        return None
    start = safe_start(timeline.request)
    avoided = "nothing that is known avoids it with these settings" if start.danger else f"{', '.join(start.settings)} avoids it"
    return f"{headline(timeline)} {timeline.danger}; {avoided} (simulate budget --timeline)"


def start_warnings(serving: ServingConfig) -> tuple[str, ...]:
    """Return in a line how the start of `serving` endangers its host, and what avoids it; none if the budget says so itself.

    What avoids it may be a setting, if no option of the start does.
    """
    timeline = _timeline(serving)
    if timeline is None or timeline.danger is None or _is_warned_of(timeline):
        return ()
    settings = safe_start(timeline.request).settings
    if not settings and (advice := advise_start(timeline)) is not None and advice.timeline.danger is None:
        settings = advice.settings
    avoided = f"{', '.join(settings)} avoids it" if settings else "nothing that is known avoids it with these settings"
    first = "at a start with nothing compiled before, " if timeline.worst.worst.parts["compilers"] else "at its start, "
    return (f"{first}{timeline.danger}; {avoided} (simulate budget --timeline shows it)",)


def _is_warned_of(timeline: MemoryTimeline) -> bool:
    """Return whether the start is in no more danger than the engine is when it serves, of which the budget warns already."""
    serving = timeline.phases[-1].worst.mem_available
    return timeline.budget is not None and bool(timeline.budget.warnings) and timeline.worst.worst.mem_available >= serving


def _timeline(serving: ServingConfig) -> MemoryTimeline | None:
    """Return the timeline of a start; None where there is no one start: several models, or settings that cannot work."""
    try:
        return memory_timeline(memory_request(serving))
    except ConfigError:
        return None
