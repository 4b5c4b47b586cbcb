"""The static answer, at once: what fits, before anybody has sent a request."""

from dataclasses import dataclass

from pagedkv.errors import ConfigError
from pagedkv.heaps import HEAPS
from pagedkv.ledgers.llama_cpp import DEFAULT_SLOTS, LlamaCppLedger
from pagedkv.ledgers.sglang import SGLangLedger, default_chunked_prefill_size
from pagedkv.ledgers.tensorrt_llm import TensorRTLLMLedger
from pagedkv.ledgers.transformers import TransformersLedger
from pagedkv.ledgers.vllm import VLLMLedger
from pagedkv.memory_plan import plan
from pagedkv.memory_request import Ledger, MemoryRequest
from pagedkv.sims.deployment import Deployment
from pagedkv.sims.engines import load_engine
from pagedkv.sims.vllm_versions import vllm_version

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

    ledger: str
    """Name of the rule in `pagedkv.ledgers`."""
    kv_tokens: int | None
    """Tokens that requests can hold; None if it does not start."""
    kv_cache_bytes: int | None
    equation: str
    """How the engine computes it, with this machine's numbers; or why it does not start."""


def under_other_rules(deployment: Deployment) -> tuple[EngineFit, ...]:
    """Return what every engine's memory rule gives this model on this machine, defaults where they differ from vLLM's."""
    hardware, serving = deployment.hardware, deployment.config
    chunk = default_chunked_prefill_size(hardware.visible_bytes)
    longest = deployment.scheduler.max_model_len
    # llama.cpp's -c sizes the whole cache: here for as many requests of max-model-len as it has slots.
    rules: dict[str, tuple[Ledger, int]] = {
        "vllm": (
            VLLMLedger(
                block_size=serving.block_size,
                gpu_memory_utilization=load_engine(serving.engine).default_utilization(hardware),
                cuda_graphs_set_aside=vllm_version(serving.engine).cuda_graphs_set_aside,
            ),
            deployment.scheduler.max_num_batched_tokens,
        ),
        "sglang": (SGLangLedger(), chunk),
        "tensorrt-llm": (TensorRTLLMLedger(), deployment.scheduler.max_num_batched_tokens),
        "llama-cpp": (LlamaCppLedger(ctx_size=DEFAULT_SLOTS * longest), 512),
        "transformers": (TransformersLedger(), longest),
    }
    return tuple(_under(deployment, name, ledger, tokens) for name, (ledger, tokens) in rules.items())


def _under(deployment: Deployment, name: str, ledger: Ledger, max_num_batched_tokens: int) -> EngineFit:
    serving = deployment.config
    request = MemoryRequest(
        model=deployment.model,
        hardware=deployment.hardware,
        ledger=ledger,
        weight_format=deployment.weight_format,
        kv_cache_dtype=serving.kv_cache_dtype,
        max_model_len=deployment.scheduler.max_model_len,
        max_num_seqs=deployment.scheduler.max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        enforce_eager=serving.enforce_eager,
        os_reserve_bytes=deployment.budget.os_reserve,
        other_programs_bytes=deployment.budget.other_programs,
    )
    try:
        budget = plan(request)
    except ConfigError as error:
        return EngineFit(ledger=name, kv_tokens=None, kv_cache_bytes=None, equation=str(error).partition(" What fits:")[0])
    tokens = budget.usable_blocks * budget.block_size
    return EngineFit(ledger=name, kv_tokens=tokens, kv_cache_bytes=budget.kv_cache, equation=budget.equation)


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
