"""The largest number that passes a test which is monotone but for noise: doubling, bisection, and a look above the answer."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Bisected:
    """What a search found."""

    good: int
    """The largest number found that passes, all tried below passing too; `first` − 1 if `first` fails."""
    bad: int | None
    """The smallest tried that fails; None if all up to `most` pass."""
    above: tuple[int, ...]
    """Numbers above `bad` that pass, although the test should be monotone: noise, or an anomaly."""


def largest(passes: Callable[[int], bool], *, first: int = 1, most: int, resolution: float = 0.0, guard: bool = False) -> Bisected:
    """Return the largest number from `first` to `most` that passes.

    Doubles from `first`, then bisects until `good` and `bad` differ by 1 or by less than `resolution` × good. O(log answer) tests.

    Args:
        passes: The test; supposed to be monotone.
        first: The smallest number to try, 1 or more.
        most: The largest.
        resolution: Relative precision that is enough.
        guard: Try three numbers above `bad`, by 1, 2 and 4 hundredths of the answer (at least 1, 2 and 4); report any that passes.
    """
    good, bad = first - 1, first
    while bad <= most and passes(bad):
        good, bad = bad, 2 * bad
    if bad > most and good < most:
        bad = most
        if passes(most):
            good = most
    if good == most:
        return Bisected(good=good, bad=None, above=())
    while bad - good > max(1, resolution * good):
        middle = (good + bad) // 2
        good, bad = (middle, bad) if passes(middle) else (good, middle)
    step = max(1, good // 100)
    tried = (bad + i * step for i in (1, 2, 4)) if guard and good >= first else ()
    return Bisected(good=good, bad=bad, above=tuple(n for n in tried if n <= most and passes(n)))
