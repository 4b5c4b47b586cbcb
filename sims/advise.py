"""Settings that serve given users better, found by trying them: one at a time, each kept only if a simulation gains from it."""

from bisect import bisect_left
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from pagedkv.errors import ConfigError
from pagedkv.hybrid_layout import hybrid_layout
from pagedkv.hybrid_steps import HybridStepAllocator
from pagedkv.sims.block_sizes import kernel_words, unfilled_share
from pagedkv.sims.capacity_answer import check_attain
from pagedkv.sims.command import changed, command_line
from pagedkv.sims.config import ServingConfig, SimulationConfig
from pagedkv.sims.deployment import Deployment, deploy
from pagedkv.sims.gain import gain
from pagedkv.sims.narrower_weights import NarrowerWeights, narrower_weights
from pagedkv.sims.probe import Probe, probe
from pagedkv.sims.serve_command import checkpoint_note, serve_command
from pagedkv.sims.speculation_gain import speculation_gain
from pagedkv.sims.start_check import start_note, start_worsened

SCHEMA_VERSION = 1
BLOCK_SIZES = (16, 32, 64, 128)
"""Multiples of 16: what vLLM's attention backends on GPUs take."""
REPEATS = 5
"""Every setting is tried with as many seeds at least: one run does not tell a gain from chance."""
UTILIZATION_STEPS = (-0.05, 0.05, 0.1)
"""Tried around the machine's default gpu-memory-utilization."""
FACTORS = (0.5, 2.0, 4.0)
"""Tried on max-num-seqs and max-num-batched-tokens."""
NOTES = {
    "kv_cache_dtype": "a narrower KV cache changes what the model computes: check its answers, too",
    "gpu_memory_utilization": "leaves less to other programs",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One setting tried on top of those kept before it."""

    setting: str
    """Field name."""
    value: Any
    before: Any
    """The value that it competes with."""
    kept: bool
    attained: float | None
    """Share of the requests that meet the goals."""
    output_tokens_per_s: float | None
    reason: str
    """The measured gain or loss; or why it cannot run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Value:
    """One value of the command, and why it has it."""

    setting: str
    """Field name."""
    value: Any
    reason: str
    """The user's wish, the measured gain, or what was tried in its place."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """What was tried, and what is left of it."""

    users: int
    serve: str
    """A `vllm serve` command with the settings that gained, and those asked for."""
    serve_note: str | None
    """What to mend in it by hand."""
    start_note: str | None
    """How its start endangers the host, as that with the defaults does, and what avoids it; None: it does not."""
    values: tuple[Value, ...]
    """Of what sizes the cache and the steps, each with its reason."""
    simulate: str
    """The same as a `simulate` command."""
    kept: tuple[Trial, ...]
    """The settings that gained, in the order tried, one each."""
    trials: tuple[Trial, ...]
    """All of them."""
    attained: tuple[float | None, float | None]
    """Share of the requests that meet the goals: with the defaults, and with what is kept."""
    output_tokens_per_s: tuple[float | None, float | None]
    """With the defaults, and with what is kept."""
    narrower_weights: tuple[NarrowerWeights, ...]
    """What fewer bits of weights would reach with what is kept, if that misses the goals: no advice, they change answers."""
    speculation: str | None
    """Where drafts stop paying; None if nothing drafts."""
    verdict: str
    """Of what is kept."""
    meets: bool
    """Whether what is kept meets the goals (without goals: is stable)."""

    def document(self) -> dict[str, Any]:
        """Return it in JSON types."""
        return {"schema_version": SCHEMA_VERSION, **asdict(self)}


def advise(config: SimulationConfig, *, attain: float, progress: Callable[[float], None] | None = None) -> Advice:
    """Try settings of the paged engine one at a time from those of `config`, and keep what gains.

    More requests within the goals are a gain, up to the share `attain`; once that is reached, or without goals, more throughput;
    either beyond chance, over `REPEATS` seeds at least. A setting that `config` gives is the user's, and is not tried.

    Raises:
        ConfigError: If `config` cannot work, or has no users.
    """
    check_attain(attain)
    users = config.load.users
    if users is None:
        raise ConfigError("advise is for a number of users: give --users N")
    start, asked = deploy(config.serving), config.serving
    serve_command(asked)  # refuses what vLLM cannot serve, before anything runs
    config = changed(config, repeats=max(config.measurement.repeats, REPEATS))
    plan = list(_candidates(config.serving, start))
    trials: list[Trial] = []
    kept: dict[str, Trial] = {}

    def run(candidate: SimulationConfig) -> Probe:
        done = len(trials)
        tell = None if progress is None else lambda _, __, share: progress(min((done + share) / (len(plan) + 1), 1.0))
        return probe(candidate, start.own_allocator, attain=attain, progress=tell)

    first = best = run(config)
    unfilled = {config.serving.block_size: unfilled_share(first.figures)}
    for name, value in plan:
        before = kept[name].value if name in kept else _in_force(start, name)
        candidate = changed(config, **{name: value})
        tried, gains = None, False
        try:
            deploy(candidate.serving)  # before its start is judged: what cannot run has its own reason
            if danger := start_worsened(config.serving, candidate.serving):
                reason = f"not tried: its start does not go well ({danger})"
            else:
                tried = run(candidate)
                gains, reason = gain(best, tried, attain)
                if name == "block_size":
                    unfilled[value] = unfilled_share(tried.figures)
        except ConfigError as error:
            reason = str(error)
        trials.append(_trial(name, value, before, tried, kept=gains, reason=reason))
        if tried is not None and gains:
            config, best, kept[name] = candidate, tried, trials[-1]
    return Advice(
        users=users,
        serve=serve_command(config.serving),
        serve_note=checkpoint_note(config.serving),
        start_note=start_note(config.serving),
        values=tuple(_values(asked, deploy(config.serving), kept, trials, unfilled)),
        simulate=command_line(changed(config, allocator=(start.own_allocator,))),
        kept=tuple(kept.values()),
        trials=tuple(trials),
        attained=(first.attained, best.attained),
        output_tokens_per_s=(first.figures["output_tokens_per_s"], best.figures["output_tokens_per_s"]),
        narrower_weights=narrower_weights(config, best, attain=attain, run=run),
        speculation=_speculation(config.serving, best),
        verdict=best.verdict.text,
        meets=best.fits,
    )


def _speculation(serving: ServingConfig, best: Probe) -> str | None:
    """Return where drafts stop paying, for contexts as long as those of the requests that ran."""
    kv, running = best.figures["kv"], best.figures["running_mean"]
    context = _mean_context(deploy(serving), kv["tokens"] / running) if kv and running else 1
    gain = speculation_gain(serving, context)
    return None if gain is None else gain.in_words(running)


def _mean_context(deployment: Deployment, share: float) -> int:
    """Return the tokens of a request that takes this share of the pool for its tokens."""
    pool = deployment.pool_of(deployment.own_allocator)
    if deployment.own_allocator != HybridStepAllocator.name:
        return max(1, round(share * (pool.num_slots - pool.block_size)))
    layout, contexts = hybrid_layout(pool), range(1, deployment.scheduler.max_model_len + 1)
    slots = share * (pool.num_blocks - 1) * layout.unit_slots

    def held(context: int) -> int:
        return sum(context - rule.first_block(context) * rule.block_size for rule in layout.token_rules)

    return contexts[min(bisect_left(contexts, slots, key=held), len(contexts) - 1)]


def _candidates(serving: ServingConfig, start: Deployment) -> Iterator[tuple[str, Any]]:
    """Yield (setting, value) to try: those that `serving` leaves to their defaults, memory first."""
    defaults = ServingConfig()
    if serving.kv_cache_dtype == defaults.kv_cache_dtype:
        yield "kv_cache_dtype", "fp8"
    if serving.num_gpu_blocks_override is None and serving.kv_cache_memory_bytes is None and serving.gpu_memory_utilization is None:
        for step in UTILIZATION_STEPS:
            yield "gpu_memory_utilization", round(start.budget.utilization + step, 3)
    # A given number of blocks would be more memory with larger blocks: no fair comparison.
    if serving.block_size == defaults.block_size and serving.num_gpu_blocks_override is None:
        yield from (("block_size", size) for size in BLOCK_SIZES if size != serving.block_size)
    for name in ("max_num_seqs", "max_num_batched_tokens"):
        if getattr(serving, name) is None:
            yield from ((name, max(1, int(getattr(start.scheduler, name) * factor))) for factor in FACTORS)


def _values(
    asked: ServingConfig, end: Deployment, kept: dict[str, Trial], trials: list[Trial], unfilled: dict[int, float | None]
) -> Iterator[Value]:
    """Yield what sizes the cache and the steps with the reason for each value."""
    sized = [name for name in ("kv_cache_memory_bytes", "num_gpu_blocks_override") if getattr(asked, name) is not None]
    for name in (*(sized or ["gpu_memory_utilization"]), "kv_cache_dtype", "block_size", "max_num_seqs", "max_num_batched_tokens"):
        others = [trial for trial in trials if trial.setting == name and not trial.kept]
        if name in kept:
            reason = f"instead of {kept[name].before}: {kept[name].reason}"
        elif name in sized or getattr(asked, name) != getattr(ServingConfig(), name):
            reason = "as you set it"
        else:
            reason = f"the default for this machine; {_in_vain(others)}"
        if name == "block_size":
            shares = ", ".join(f"{size}: {share:.1%}" for size, share in sorted(unfilled.items()) if share is not None)
            reason += f"; unfilled slots of the blocks taken here, {shares}" if shares else ""
            reason += f"; {kernel_words(end.hardware)}"
        yield Value(setting=name, value=_in_force(end, name), reason=reason)


def _in_vain(others: list[Trial]) -> str:
    """Return what became of the values tried in place of a default."""
    if not others:
        return "nothing else was tried"
    ran = [trial for trial in others if trial.output_tokens_per_s is not None]
    if not ran:
        return f"{', '.join(str(trial.value) for trial in others)} cannot run here"
    best = max(ran, key=lambda trial: (trial.attained or 0.0, trial.output_tokens_per_s))
    return f"of {', '.join(str(trial.value) for trial in ran)} none gains; the nearest, {best.value}: {best.reason}"


def _in_force(deployment: Deployment, name: str) -> Any:
    if name == "gpu_memory_utilization":
        return deployment.budget.utilization
    if name in ("max_num_seqs", "max_num_batched_tokens"):
        return getattr(deployment.scheduler, name)
    return getattr(deployment.config, name)


def _trial(name: str, value: Any, before: Any, tried: Probe | None, *, kept: bool, reason: str) -> Trial:
    return Trial(
        setting=name,
        value=value,
        before=before,
        kept=kept,
        attained=None if tried is None else tried.attained,
        output_tokens_per_s=None if tried is None else tried.figures["output_tokens_per_s"],
        reason=reason,
    )
