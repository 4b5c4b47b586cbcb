"""Whether one setting serves better than another: in the goals, if there are some that are missed, else in throughput."""

from pagedkv.sims.probe import Probe
from pagedkv.sims.statistics import ci95

GAIN = 0.01
"""A smaller gain, absolute in the share within the goals and relative in throughput, is no reason to change a default."""


def gain(best: Probe, tried: Probe, attain: float) -> tuple[bool, str]:
    """Return whether `tried` is better than `best` beyond chance, and the figures that say so.

    Both ran with the same seeds. A gain counts if the 95 % interval of its mean over the repeats is above 0 (paired, Student's t).
    Where goals are missed, throughput that brings nobody within them is none.
    """
    reason = gain_words(best, tried)
    if tried.refused != best.refused:
        return tried.refused < best.refused, reason
    shares = [min(each.attained or 0.0, attain) for each in (best, tried)] if best.terms else [attain, attain]
    if abs(shares[1] - shares[0]) >= GAIN or (shares[1] >= attain) != (shares[0] >= attain):
        better, which = shares[1] > shares[0], 0
    elif shares[0] < attain:
        return False, f"{reason}: nothing gained in the goals"
    else:
        rates = _rates(best, tried)
        better, which = rates[1] > rates[0] * (1 + GAIN), 1
    if not better:
        return False, reason
    pairs = [(a[which], b[which]) for a, b in zip(best.by_repeat, tried.by_repeat, strict=True)]
    interval = ci95([after - before for before, after in pairs if before is not None and after is not None])
    sure = interval is not None and interval[0] > 0
    return sure, reason if sure else f"{reason}: within chance, over {len(pairs)} repeats"


def gain_words(best: Probe, tried: Probe) -> str:
    """Return what changes from `best` to `tried`."""
    words = []
    if best.refused != tried.refused:
        words.append(f"requests turned away {best.refused:,} → {tried.refused:,}")
    if best.attained is not None and tried.attained is not None:
        words.append(f"within the goals {best.attained:.1%} → {tried.attained:.1%}")
    before, after = _rates(best, tried)
    relative = f" ({after / before - 1:+.1%})" if before else ""
    words.append(f"output tokens/s {before:,.1f} → {after:,.1f}{relative}")
    return ", ".join(words)


def _rates(best: Probe, tried: Probe) -> tuple[float, float]:
    return best.figures["output_tokens_per_s"] or 0.0, tried.figures["output_tokens_per_s"] or 0.0
