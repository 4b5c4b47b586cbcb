"""What fewer bits of weights would reach where goals are missed: shown apart from advice, since the answers change."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pagedkv.errors import ConfigError
from pagedkv.sims.command import changed
from pagedkv.sims.config import SimulationConfig
from pagedkv.sims.deployment import deploy
from pagedkv.sims.gain import gain_words
from pagedkv.sims.next_command import narrower_formats
from pagedkv.sims.probe import Probe
from pagedkv.sims.serve_command import serve_command
from pagedkv.sims.start_check import start_worsened


@dataclass(frozen=True, slots=True, kw_only=True)
class NarrowerWeights:
    """One format tried."""

    quantization: str
    attained: float | None
    """Share of the requests that meet the goals; None: it was not tried, or nothing is known."""
    output_tokens_per_s: float | None
    meets: bool
    """Whether the goals are met."""
    reason: str
    """The measured change; or why it was not tried."""
    serve: str
    """The `vllm serve` command with it."""


def narrower_weights(
    config: SimulationConfig, best: Probe, *, attain: float, run: Callable[[SimulationConfig], Probe]
) -> tuple[NarrowerWeights, ...]:
    """Return what narrower formats do for `config`, whose run is `best`, the widest first, up to the first that meets the goals.

    None are tried if the goals are met, there are no goals, or the format is the user's.
    """
    if not best.terms or (best.attained or 0.0) >= attain or config.serving.quantization is not None:
        return ()
    found: list[NarrowerWeights] = []
    for name, serve in _formats(config):
        candidate = changed(config, quantization=name)
        tried = None
        if danger := start_worsened(config.serving, candidate.serving):
            reason = f"not tried: its start does not go well ({danger})"
        else:
            tried = run(candidate)
            reason = gain_words(best, tried)
        found.append(
            NarrowerWeights(
                quantization=name,
                attained=None if tried is None else tried.attained,
                output_tokens_per_s=None if tried is None else tried.figures["output_tokens_per_s"],
                meets=tried is not None and tried.fits,
                reason=reason,
                serve=serve,
            )
        )
        if found[-1].meets:
            break
    return tuple(found)


def _formats(config: SimulationConfig) -> Iterator[tuple[str, str]]:
    """Yield the formats that vLLM can serve this model in, each with its command."""
    for name in narrower_formats(deploy(config.serving)):
        try:
            yield name, serve_command(changed(config, quantization=name).serving)
        except ConfigError:
            continue
