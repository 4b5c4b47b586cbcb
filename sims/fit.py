"""The static answer, at once: what fits, before anybody has sent a request."""

from collections.abc import Sequence
from dataclasses import dataclass

from pagedkv.errors import ConfigError
from pagedkv.heaps import HEAPS
from pagedkv.sims.deployment import Deployment

CONTEXTS = tuple(1024 << i for i in range(10))
"""Contexts of the table, in tokens: 1k to 512k, as far as the model goes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FitRow:
    """How many requests the KV pool holds at once when each has `context` tokens."""

    context: int
    """Prompt and output so far, in tokens."""
    paged: int
    """Requests in whole blocks."""
    contiguous_max: int
    """Requests that reserve max-model-len in the contiguous heap; 0 if the context is longer than that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """What a deployment holds."""

    kv_tokens: int
    """Tokens in usable blocks."""
    formula_users: float
    """KV bytes / (max-model-len × bytes per token): what a formula with every user at full context claims."""
    rows: tuple[FitRow, ...]
    """By context, ascending."""
    longest_context: int | None
    """For a number of users: the longest context that all of them can have at once; None if no number was given."""
    paged_at_context: FitRow | None
    """For a context: the requests it allows; None if none was given."""


def fit(deployment: Deployment, *, users: int | None = None, context: int | None = None) -> Fit:
    """Return what `deployment` holds; for `users`, their longest context; for `context`, its number of requests.

    Raises:
        ConfigError: If users or context are below 1, or the context is longer than max-model-len.
    """
    longest = deployment.scheduler.max_model_len
    if users is not None and users < 1:
        raise ConfigError(f"--users is {users}: needs 1 or more")
    if context is not None and not 1 <= context <= longest:
        raise ConfigError(f"--context is {context}: needs 1 to max-model-len, {longest}")
    budget = deployment.budget
    return Fit(
        kv_tokens=budget.usable_blocks * budget.block_size,
        formula_users=budget.kv_cache / (longest * budget.kv_bytes_per_token),
        rows=tuple(_row(deployment, each) for each in _contexts(longest)),
        longest_context=None if users is None else min(budget.usable_blocks // users * budget.block_size, longest),
        paged_at_context=None if context is None else _row(deployment, context),
    )


def _contexts(longest: int) -> Sequence[int]:
    return [*(c for c in CONTEXTS if c < longest), longest]


def _row(deployment: Deployment, context: int) -> FitRow:
    budget, pool = deployment.budget, deployment.pool
    heap = HEAPS.load(pool.contiguous_heap)(1)
    return FitRow(
        context=context,
        paged=budget.usable_blocks // -(-context // budget.block_size),
        contiguous_max=pool.num_slots // heap.rounded(pool.max_model_len),
    )
