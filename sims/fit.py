"""The static answer, at once: what fits, before anybody has sent a request."""

from bisect import bisect_right
from dataclasses import dataclass, replace

from pagedkv.errors import ConfigError
from pagedkv.heaps import HEAPS
from pagedkv.hybrid_layout import hybrid_layout
from pagedkv.hybrid_steps import HybridStepAllocator
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
    """Requests in whole blocks, with their state if the model keeps any; of each group of layers where layers differ."""
    contiguous_max: int
    """Requests that reserve max-model-len each in the contiguous heap, whatever their context."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """What a deployment holds."""

    kv_tokens: int
    """Tokens in usable blocks; where layers that differ have blocks of their own, those of requests of max-model-len, as in vLLM's
    log."""
    formula_users: float
    """KV bytes in blocks / (max-model-len × bytes per token): what a formula with every user at full context claims."""
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
    budget = deployment.budget
    return Fit(
        kv_tokens=memory_request(deployment.config).tokens_held(budget),
        formula_users=(budget.kv_cache - budget.window_bytes) / (longest * budget.kv_bytes_per_token),
        rows=tuple(_row(deployment, tokens) for tokens in (*(c for c in CONTEXTS if c < longest), longest)),
        users=users,
        longest_context=None if users is None else _longest_context(deployment, users),
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
        request = memory_request(of_one_engine(asked, engine))
        budget = plan(request)
    except ConfigError as error:
        return EngineFit(engine=engine, kv_tokens=None, kv_cache_bytes=None, equation=str(error).partition(" What fits:")[0])
    tokens = request.tokens_held(budget)
    return EngineFit(engine=engine, kv_tokens=tokens, kv_cache_bytes=budget.kv_cache, equation=budget.equation)


def _requests_held(deployment: Deployment, context: int) -> int:
    """Return how many requests of `context` tokens each the blocks hold."""
    pool = deployment.pool_of(deployment.own_allocator)
    if deployment.own_allocator == HybridStepAllocator.name:
        peak = hybrid_layout(pool).peak_blocks(context, deployment.scheduler.max_num_batched_tokens)
        return (pool.num_blocks - 1) // peak
    return deployment.budget.usable_blocks // (-(-context // pool.block_size) + -(-pool.state_slots // pool.block_size))


def _longest_context(deployment: Deployment, users: int) -> int:
    """Return the most tokens that `users` requests can have each; 0 if not even one."""
    contexts = range(1, deployment.scheduler.max_model_len + 1)
    return bisect_right(contexts, 0, key=lambda context: int(_requests_held(deployment, context) < users))


def _row(deployment: Deployment, context: int) -> FitRow:
    pool = deployment.pool
    heap = HEAPS.load(pool.contiguous_heap)(1)
    return FitRow(
        context=context,
        paged=_requests_held(deployment, context),
        contiguous_max=pool.num_slots // heap.rounded(pool.max_model_len + pool.state_slots),
    )
