"""How much faster drafts make decoding, by the size of the batch, and from which size on they do not."""

from dataclasses import dataclass, replace

from pagedkv.sims.config import ServingConfig
from pagedkv.sims.deployment import Deployment, deploy
from pagedkv.step_batch import empty_batch

WITHOUT = {
    "speculative_method": None,
    "speculative_model": None,
    "num_speculative_tokens": None,
    "acceptance_rate": None,
    "acceptance_spread": None,
}
"""Settings of a deployment that drafts nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculationGain:
    """Seconds per token without drafts / with them, of requests that all decode."""

    title: str
    """What drafts."""
    context: int
    """Tokens that each request has."""
    by_batch: tuple[tuple[int, float], ...]
    """(requests in the batch, gain), powers of two up to max-num-seqs."""
    stops_at: int | None
    """The smallest batch without a gain; None: there is one up to max-num-seqs."""

    def in_words(self, running: float | None) -> str:
        """Return where it stops paying, and what that means with `running` requests on average."""
        shown = ", ".join(f"{gain:.2f} × at {batch}" for batch, gain in self.by_batch if batch in (1, 8, 64, 256))
        text = f"{self.title}: tokens of requests of {self.context:,} come {shown}"
        if self.stops_at == 1:
            return f"{text}; that does not pay, even for one request"
        text += (
            "; pays at every size of the batch"
            if self.stops_at is None
            else f"; it stops paying at {self.stops_at:,} requests at once"
        )
        if running is not None and self.stops_at is not None:
            text += f", and here {running:.0f} run on average"
        return text


def speculation_gain(serving: ServingConfig, context: int) -> SpeculationGain | None:
    """Return what the drafts of `serving` gain for requests of `context` tokens; None if it drafts nothing.

    Raises:
        ConfigError: If `serving` cannot work.
    """
    drafts, plain = deploy(serving), deploy(replace(serving, **WITHOUT))  # type: ignore[arg-type]
    if drafts.drafting is None:
        return None

    def gain(batch: int) -> float:
        return _seconds_per_token(plain, batch, context) / _seconds_per_token(drafts, batch, context)

    sizes = [1 << i for i in range(drafts.scheduler.max_num_seqs.bit_length())]
    by_batch = tuple((size, gain(size)) for size in sizes)
    low = max((size for size, each in by_batch if each > 1), default=0)
    stops_at = None
    if low < sizes[-1]:
        high = min(2 * low, sizes[-1]) if low else 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if gain(middle) > 1 else (low, middle)
        stops_at = high
    return SpeculationGain(title=drafts.drafting.title, context=context, by_batch=by_batch, stops_at=stops_at)


def _seconds_per_token(deployment: Deployment, batch: int, context: int) -> float:
    drafting = deployment.drafting
    drafts, tokens = (0, 1.0) if drafting is None else (drafting.num_tokens, drafting.expected_tokens())
    entries = empty_batch(batch)
    entries["num_known_tokens"], entries["num_slots_needed"], entries["num_scheduled_tokens"] = (
        context,
        context + drafts,
        1 + drafts,
    )
    return deployment.step_time.cost(entries, batch).total_s / tokens
