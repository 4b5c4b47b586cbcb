"""What every view says of a run before its figures: what was asked, how the KV memory comes about, what contiguous would hold."""

from pagedkv.heaps import HEAPS
from pagedkv.hybrid_layout import hybrid_layout
from pagedkv.hybrid_steps import HybridStepAllocator
from pagedkv.sims.deployment import Deployment
from pagedkv.sims.results import Results
from pagedkv.units import MIB, gib


def run_title(results: Results) -> str:
    """Return who asks whom: load, machine, model and engine."""
    scenario, config = results.scenario, results.document()["config"]
    return f"{scenario.load.title} on {scenario.deployment.hardware.title}, {scenario.model_titles}, {config['engine']}"


def load_facts(results: Results) -> str:
    """Return what matters most of the load and of how it is measured, in a line."""
    scenario, config = results.scenario, results.document()["config"]
    if config["workload"] is not None:
        load = f"workload {config['workload']}"
    elif config["users"] is not None:
        load = f"think time {config['think_time']}"
    elif config["request_rate"] is not None:
        load = f"burstiness {config['burstiness']:g}"
    else:
        load = f"trace format {config['trace_format']}, rate × {config['trace_rate'] or 1:g}"
    measured = config["duration"] or "until all are answered"
    return (
        f"{load} · lengths {scenario.load.lengths_name} · warm-up {config['warmup']}, measured {measured} · seed {config['seed']}"
    ) + (f", {config['repeats']} repeats" if config["repeats"] > 1 else "")


def run_facts(results: Results) -> str:
    """Return the settings that matter most, in a line."""
    scenario, config = results.scenario, results.document()["config"]
    return (
        f"{load_facts(results)} · weights {scenario.deployment.weight_format.name}, KV {config['kv_cache_dtype']}"
        f" · max-model-len {scenario.deployment.scheduler.max_model_len:,} · "
        f"block-size {scenario.deployment.pool.block_size} · {_share(scenario.deployment)}"
        f"max-num-seqs {config['max_num_seqs']} · max-num-batched-tokens {config['max_num_batched_tokens']:,} · "
        f"prefix caching {'on' if config['enable_prefix_caching'] else 'off'}"
        + ("" if scenario.deployment.drafting is None else f" · {scenario.deployment.drafting.title}")
        + ("" if scenario.deployment.tier is None else f" · {scenario.deployment.tier.title}")
    )


def _share(deployment: Deployment) -> str:
    """Return the engine's own setting of how much memory it takes, if it has one."""
    setting = deployment.engine.setting
    return "" if setting is None else f"{setting} {deployment.budget.utilization:g} · "


def kv_equation(deployment: Deployment) -> tuple[str, str]:
    """Return how the KV memory comes about, and how many blocks and tokens that is."""
    budget, spec = deployment.budget, deployment.model.kv_spec(deployment.config.kv_cache_dtype)
    if deployment.own_allocator == HybridStepAllocator.name:
        return budget.equation, _blocks_per_group(deployment)
    state = f", and {gib(spec.state_bytes_per_sequence)} of state per request" if spec.state_bytes_per_sequence else ""
    windows = f", and {gib(budget.window_bytes)} for layers with a window" if budget.window_bytes else ""
    return (
        budget.equation,
        f"{budget.num_blocks:,} blocks of {budget.block_size} tokens = {budget.num_kv_tokens:,} tokens "
        f"of {budget.kv_bytes_per_token:,} bytes{windows}{state}",
    )


def _blocks_per_group(deployment: Deployment) -> str:
    """Say how many blocks there are, where each is of one group of layers, and what a request holds of them: as vLLM's log does."""
    pool, longest = deployment.pool_of(HybridStepAllocator.name), deployment.scheduler.max_model_len
    layout = hybrid_layout(pool)
    sizes = sorted({rule.block_size for rule in layout.token_rules})
    peak = layout.peak_blocks(longest, deployment.scheduler.max_num_batched_tokens)
    at_once = pool.num_blocks / peak
    return (
        f"{pool.num_blocks:,} blocks, each of {' or '.join(f'{size:,}' for size in sizes)} tokens in one of {len(layout.rules)} "
        f"groups of layers; a request of {longest:,} tokens holds up to {peak:,}, so that {at_once:.2f} fit at once: "
        f"{int(at_once * longest):,} tokens, as vLLM counts them"
    )


def window_note(deployment: Deployment) -> str | None:
    """Say what windows save here, if the model has some."""
    if not any(group.kind in ("sliding_window", "chunked") for group in deployment.model.layer_groups):
        return None
    engine = deployment.engine.name.partition("@")[0]
    if deployment.own_allocator == HybridStepAllocator.name:
        return None
    if engine == "vllm":
        return "Layers with a window keep all tokens in paged memory; vLLM can give their blocks back: --allocator hybrid."
    if engine in ("llama-cpp", "ollama"):
        return _window_cells(deployment)
    return "Layers with a window are counted at full length: all their tokens are kept."


def _window_cells(deployment: Deployment) -> str:
    """Return how llama.cpp keeps layers with a window."""
    budget = deployment.budget
    if deployment.config.swa_full:
        return "Layers with a window keep all their tokens: --swa-full."
    if not budget.window_cells:
        return "All layers have a window: llama.cpp runs this model without it, and keeps all tokens, as with --swa-full."
    copies = deployment.pool.context_checkpoints
    each = f"{copies} of each slot, {budget.checkpoint_bytes / MIB:,.1f} MiB each in host memory" if copies else "--ctx-checkpoints"
    return (
        f"Layers with a window have cells of their own, {budget.window_cells:,} that take {gib(budget.window_bytes)}; "
        "--swa-full: as many as the others have. So a prompt that parts with what its slot has goes on from a context checkpoint "
        f"({'at most ' if copies else 'turned off: '}{each}), or is computed anew."
    )


def contiguous_max_holds(results: Results) -> str | None:
    """Say how many requests contiguous-max would hold: it depends on nothing but max-model-len. None if it does not run."""
    if "contiguous-max" not in results.by_allocator:
        return None
    pool = results.scenario.deployment.pool
    heap = HEAPS.load(pool.contiguous_heap)(1)
    holds = ", ".join(f"{pool.num_slots // heap.rounded((k << 10) + pool.state_slots)} at {k}k" for k in (8, 32, 128))
    return f"contiguous-max would hold {holds} of max-model-len (here {pool.max_model_len:,})."
