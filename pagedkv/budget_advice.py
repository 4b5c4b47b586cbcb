"""What to change when a model does not fit: every suggestion was planned again, fits, and does not freeze its host at the start."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, combinations, islice

from pagedkv.memory_request import MemoryRequest
from pagedkv.remedies import fits, narrower_weights, no_drafting, other_hardware, smaller_model
from pagedkv.request_flags import as_flags
from pagedkv.timeline_advice import safe_start

NUM_SUGGESTIONS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Suggestions:
    """Changes to a request that does not fit, as flags."""

    fit: tuple[str, ...]
    """Up to `NUM_SUGGESTIONS` that fit, the mildest first, with what else their start needs."""
    dangerous: str | None
    """The first that fits and whose start may freeze the host, with the moment at which; None if there was none before the last
    of `fit`."""


def settings_that_fit(request: MemoryRequest) -> Suggestions:
    """Return changes to `request` that fit.

    One setting is changed, then two of those that do not help alone, then the machine or the model.
    """
    suggestions: dict[str, str] = {}
    dangerous: list[str] = []

    def starts(change: MemoryRequest) -> bool:
        """Return whether it fits and starts; keep the words of the first that fits and endangers its host."""
        if not fits(change):
            return False
        danger = safe_start(change).danger
        if danger is not None:
            dangerous.append(f"{as_flags(request, change)} holds it, but its start does not go well ({danger})")
        return danger is None

    for change in _changes_that_start(request, starts):
        flags, settings = as_flags(request, change), safe_start(change).settings
        suggestions[flags] = f"{flags} (at its start: {', '.join(settings)})" if settings else flags
        if len(suggestions) == NUM_SUGGESTIONS:
            break
    return Suggestions(fit=tuple(suggestions.values()), dangerous=next(iter(dangerous), None))


def _changes_that_start(request: MemoryRequest, starts: Callable[[MemoryRequest], bool]) -> Iterator[MemoryRequest]:
    helpless = []
    for remedy in (no_drafting, *request.ledger.remedies()):
        change = next(filter(starts, remedy(request)), None)
        if change is None:
            helpless.append(remedy)
        else:
            yield change
    for first, second in combinations(helpless, 2):
        both = chain.from_iterable(map(second, first(request)))
        yield from islice(filter(starts, both), 1)
    narrower = list(narrower_weights(request))
    larger_steps = [
        filter(starts, other_hardware(request)),
        filter(starts, chain.from_iterable(map(other_hardware, narrower))),
        filter(starts, smaller_model(request)),
    ]
    for changes in larger_steps:
        yield from islice(changes, 1)
    yield from chain(*larger_steps, filter(starts, chain.from_iterable(map(smaller_model, narrower))))
