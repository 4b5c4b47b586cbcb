"""Rates that a user gives on the command line instead of a file."""

from pagedkv.errors import ConfigError
from pagedkv.sims.measurements import MeasuredRate

USUAL_CONTEXT = 512
"""Tokens in the cache where nobody says: the middle of a long answer to a short question."""
USUAL_PROMPT = 2048
"""Tokens of a prompt where nobody says: what most benchmarks prefill."""


def given_rates(
    *, tokens_per_s: float | None, prefill_tokens_per_s: float | None, batch: int, context: int | None, prompt: int | None
) -> list[MeasuredRate]:
    """Return the rates that flags give.

    Raises:
        ConfigError: If a value cannot be, or belongs to a rate that is not given.
    """
    for flag, rate in (("tokens-per-s", tokens_per_s), ("prefill-tokens-per-s", prefill_tokens_per_s)):
        if rate is not None and not 0 < rate < float("inf"):
            raise ConfigError(f"--{flag} {rate:g} is no rate: needs tokens a second, more than 0")
    for flag, count in (("batch", batch), ("context", context), ("prompt", prompt)):
        if count is not None and not 1 <= count <= 2**24:
            raise ConfigError(f"--{flag} {count}: needs 1 to {2**24:,}")
    if context is not None and tokens_per_s is None:
        raise ConfigError("--context says where --tokens-per-s was measured: give that too")
    if prompt is not None and prefill_tokens_per_s is None:
        raise ConfigError("--prompt says where --prefill-tokens-per-s was measured: give that too")
    if batch != 1 and tokens_per_s is None and prefill_tokens_per_s is None:
        raise ConfigError("--batch says where --tokens-per-s or --prefill-tokens-per-s was measured: give one of them")
    rates = []
    if tokens_per_s is not None:
        depth = USUAL_CONTEXT if context is None else context
        rates.append(MeasuredRate(where="--tokens-per-s", kind="decode", batch=batch, depth=depth, tokens_per_s=tokens_per_s))
    if prefill_tokens_per_s is not None:
        length = USUAL_PROMPT if prompt is None else prompt
        rates.append(
            MeasuredRate(
                where="--prefill-tokens-per-s",
                kind="prefill",
                batch=batch,
                prompt_tokens=length,
                tokens_per_s=prefill_tokens_per_s,
            )
        )
    return rates
