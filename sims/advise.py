"""Settings that serve given users better, found by trying them: one at a time, each kept only if a simulation gains from it."""

import shlex
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from pagedkv.errors import ConfigError
from pagedkv.sims.capacity_answer import check_attain
from pagedkv.sims.command import changed, command_line, flat
from pagedkv.sims.config import ServingConfig, SimulationConfig
from pagedkv.sims.deployment import Deployment, deploy
from pagedkv.sims.flat_figures import interval
from pagedkv.sims.probe import Probe, probe
from pagedkv.units import parse_bytes

SCHEMA_VERSION = 1
GAIN = 0.01
"""A smaller gain, absolute in the share within the goals and relative in throughput, is no reason to change a default."""
BLOCK_SIZES = (8, 16, 32, 64, 128)
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
class Advice:
    """What was tried, and what is left of it."""

    users: int
    serve: str
    """A `vllm serve` command with the settings that gained, and those asked for."""
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
    verdict: str
    """Of what is kept."""
    meets: bool
    """Whether what is kept meets the goals (without goals: is stable)."""

    def document(self) -> dict[str, Any]:
        """Return it in JSON types."""
        return {"schema_version": SCHEMA_VERSION, **asdict(self)}


def advise(config: SimulationConfig, *, attain: float, progress: Callable[[float], None] | None = None) -> Advice:
    """Try settings of the paged engine one at a time from those of `config`, and keep what gains.

    More requests within the goals are a gain, up to the share `attain`; then more throughput. A setting that `config` gives is the
    user's, and is not tried. With repeats, a gain must also be beyond both 95 % intervals.

    Raises:
        ConfigError: If `config` cannot work, or has no users.
    """
    check_attain(attain)
    users = config.load.users
    if users is None:
        raise ConfigError("advise is for a number of users: give --users N")
    start = deploy(config.serving)
    plan = list(_candidates(config.serving, start))
    trials: list[Trial] = []
    kept: dict[str, Trial] = {}

    def run(candidate: SimulationConfig) -> Probe:
        done = len(trials)
        tell = None if progress is None else lambda _, __, share: progress((done + share) / (len(plan) + 1))
        return probe(candidate, "paged", attain=attain, progress=tell)

    first = best = run(config)
    for name, value in plan:
        before = kept[name].value if name in kept else _in_force(start, name)
        candidate = changed(config, **{name: value})
        tried, gains = None, False
        try:
            if warnings := set(deploy(candidate.serving).budget.warnings) - set(start.budget.warnings):
                reason = "not tried: " + "; ".join(sorted(warnings))
            else:
                tried = run(candidate)
                gains, reason = _gain(best, tried, attain)
        except ConfigError as error:
            reason = str(error)
        trials.append(_trial(name, value, before, tried, kept=gains, reason=reason))
        if tried is not None and gains:
            config, best, kept[name] = candidate, tried, trials[-1]
    return Advice(
        users=users,
        serve=serve_command(config.serving),
        simulate=command_line(changed(config, allocator=("paged",))),
        kept=tuple(kept.values()),
        trials=tuple(trials),
        attained=(first.attained, best.attained),
        output_tokens_per_s=(first.figures["output_tokens_per_s"], best.figures["output_tokens_per_s"]),
        verdict=best.verdict.text,
        meets=best.fits,
    )


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


def _in_force(deployment: Deployment, name: str) -> Any:
    if name == "gpu_memory_utilization":
        return deployment.budget.utilization
    if name in ("max_num_seqs", "max_num_batched_tokens"):
        return getattr(deployment.scheduler, name)
    return getattr(deployment.config, name)


def _gain(best: Probe, tried: Probe, attain: float) -> tuple[bool, str]:
    """Return whether `tried` is better than `best`, and the figures that say so."""
    words = []
    if best.refused != tried.refused:
        words.append(f"requests turned away {best.refused:,} → {tried.refused:,}")
    if best.attained is not None and tried.attained is not None:
        words.append(f"within the goals {best.attained:.1%} → {tried.attained:.1%}")
    rates = [each.figures["output_tokens_per_s"] or 0.0 for each in (best, tried)]
    relative = f" ({rates[1] / rates[0] - 1:+.1%})" if rates[0] else ""
    words.append(f"output tokens/s {rates[0]:,.1f} → {rates[1]:,.1f}{relative}")
    reason = ", ".join(words)
    if tried.refused != best.refused:
        return tried.refused < best.refused, reason
    shares = [min(each.attained or 0.0, attain) for each in (best, tried)] if best.terms else [0.0, 0.0]
    if abs(shares[1] - shares[0]) >= GAIN or (shares[1] >= attain) != (shares[0] >= attain):
        beyond = best.attained_ci95 is None or tried.attained_ci95 is None or tried.attained_ci95[0] > best.attained_ci95[1]
        return shares[1] > shares[0] and beyond, reason
    known, other = (interval(each.figures, "output_tokens_per_s") for each in (best, tried))
    beyond = known is None or other is None or other[0] > known[1]
    return rates[1] > rates[0] * (1 + GAIN) and beyond, reason


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


def serve_command(serving: ServingConfig) -> str:
    """Return the `vllm serve` command for `serving`: what differs from the defaults here, utilization and context always.

    vLLM's own defaults for those two differ from ours. The machine, and what vLLM has no flag for, are left out.
    """
    deployment, defaults = deploy(serving), flat(SimulationConfig())
    values: dict[str, Any] = {name: getattr(serving, name) for name in _SERVE_FLAGS}
    values = {name: value for name, value in values.items() if value != defaults[name]}
    values["max_model_len"] = deployment.scheduler.max_model_len
    if serving.kv_cache_memory_bytes is None:
        values["gpu_memory_utilization"] = deployment.budget.utilization
    words = ["vllm", "serve", deployment.model.hf_id or serving.model]
    for name in _SERVE_FLAGS:
        if name not in values:
            continue
        flag, value = name.replace("_", "-"), values[name]
        words += [f"--{flag}" if value else f"--no-{flag}"] if isinstance(value, bool) else [f"--{flag}", _vllm_value(name, value)]
    return shlex.join(words)


_SERVE_FLAGS = (
    "quantization",
    "kv_cache_dtype",
    "max_model_len",
    "block_size",
    "gpu_memory_utilization",
    "kv_cache_memory_bytes",
    "num_gpu_blocks_override",
    "max_num_seqs",
    "max_num_batched_tokens",
    "enable_chunked_prefill",
    "long_prefill_token_threshold",
    "enforce_eager",
    "tensor_parallel_size",
)
"""Settings that `vllm serve` has a flag for."""


def _vllm_value(name: str, value: Any) -> str:
    return str(parse_bytes(value, name=name)) if name == "kv_cache_memory_bytes" else str(value)
