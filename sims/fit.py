"""The static answer, at once: what fits, before anybody has sent a request."""

from dataclasses import dataclass, replace

from pagedkv.errors import ConfigError
from pagedkv.heaps import HEAPS
from pagedkv.memory_plan import plan
from pagedkv.sims.config import ServingConfig
from pagedkv.sims.deployment import Deployment, memory_request
from pagedkv.sims.engine_flags import of_one_engine

CONTEXTS = tuple(1024 << i for i in range(10))
"""Contexts of the table, in tokens: 1k to 512k, as far as the model goes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FitRow:
    """How many requests the KV pool holds at once when each has `context` tokens; max-num-seqs may allow fewer to run."""

    context: int
    """Prompt and output so far, in tokens."""
    paged: int
    """Requests in whole blocks, with their state if the model keeps any."""
    contiguous_max: int
    """Requests that reserve max-model-len each in the contiguous heap, whatever their context."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """What a deployment holds."""

    kv_tokens: int
    """Tokens in usable blocks."""
    formula_users: float
    """KV bytes / (max-model-len × bytes per token): what a formula with every user at full context claims."""
    rows: tuple[FitRow, ...]
    """By context, ascending."""
    users: int | None
    """As asked for."""
    longest_context: int | None
    """The longest context that `users` requests can have at once; None if no number was given."""
    at_context: FitRow | None
    """For a context that was asked for."""


def fit(deployment: Deployment, *, users: int | None = None, context: int | None = None) -> Fit:
    """Return what `deployment` holds; for `users`, their longest context; for `context`, its number of requests.

    Raises:
        ConfigError: If users or context are below 1, or the context is longer than max-model-len; or with replicas or faults.
    """
    if deployment.config.replicas != 1 or deployment.config.fault:
        raise ConfigError("fit is about one machine that runs: leave --replicas and --fault to a simulation, simulate --users 100")
    longest = deployment.scheduler.max_model_len
    if users is not None and users < 1:
        raise ConfigError(f"--users is {users}: needs 1 or more")
    if context is not None and not 1 <= context <= longest:
        raise ConfigError(f"--context is {context}: needs 1 to max-model-len, {longest}")
    budget, state_blocks = deployment.budget, _state_blocks(deployment)
    each = 0 if users is None else max(budget.usable_blocks // users - state_blocks, 0)
    return Fit(
        kv_tokens=budget.usable_blocks * budget.block_size,
        formula_users=budget.kv_cache / (longest * budget.kv_bytes_per_token),
        rows=tuple(_row(deployment, tokens) for tokens in (*(c for c in CONTEXTS if c < longest), longest)),
        users=users,
        longest_context=None if users is None else min(each * budget.block_size, longest),
        at_context=None if context is None else _row(deployment, context),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFit:
    """The same model on the same machine under one engine's memory rule, with that engine's defaults."""

    engine: str
    """As after --engine."""
    kv_tokens: int | None
    """Tokens that requests can hold; None if it does not start."""
    kv_cache_bytes: int | None
    equation: str
    """How the engine computes it, with this machine's numbers; or why it does not start."""


def under_each_rule(deployment: Deployment) -> tuple[EngineFit, ...]:
    """Return what every engine's memory rule gives this model on this machine: what `simulate --engine` with its name starts from.

    Settings of `deployment` that an engine has as well are kept, but for those that say how many requests it takes at once.
    """
    asked = replace(deployment.config, max_num_seqs=None, max_num_batched_tokens=None)
    own = deployment.engine.name
    return tuple(_under(asked, own if own.partition("@")[0] == name else name) for name in _RULES)


_RULES = ("vllm", "sglang", "tensorrt-llm", "llama-cpp", "ollama", "naive")


def _under(asked: ServingConfig, engine: str) -> EngineFit:
    try:
        budget = plan(memory_request(of_one_engine(asked, engine)))
    except ConfigError as error:
        return EngineFit(engine=engine, kv_tokens=None, kv_cache_bytes=None, equation=str(error).partition(" What fits:")[0])
    tokens = budget.usable_blocks * budget.block_size
    return EngineFit(engine=engine, kv_tokens=tokens, kv_cache_bytes=budget.kv_cache, equation=budget.equation)


def _state_blocks(deployment: Deployment) -> int:
    return -(-deployment.pool.state_slots // deployment.pool.block_size)


def _row(deployment: Deployment, context: int) -> FitRow:
    budget, pool = deployment.budget, deployment.pool
    heap = HEAPS.load(pool.contiguous_heap)(1)
    return FitRow(
        context=context,
        paged=budget.usable_blocks // (-(-context // budget.block_size) + _state_blocks(deployment)),
        contiguous_max=pool.num_slots // heap.rounded(pool.max_model_len + pool.state_slots),
    )
