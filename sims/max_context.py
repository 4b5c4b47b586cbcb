"""The longest context at which a number of users fits."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pagedkv.catalogue import load_model
from pagedkv.errors import ConfigError
from pagedkv.sims.capacity_answer import CapacityAnswer, answer, check_attain
from pagedkv.sims.command import changed
from pagedkv.sims.config import SimulationConfig

DEFAULT_OUTPUT_LEN = 256
"""Output tokens of every request when none are given."""
RESOLUTION = 0.01
"""Relative precision of the answer; a block at least."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextAnswer:
    """The longest context, for one allocator."""

    users: int
    output_len: int
    """Tokens of the answer, part of the context."""
    found: CapacityAnswer
    """Values are contexts: prompt and output together, in whole blocks."""

    @property
    def prompt_len(self) -> int:
        """Tokens of the longest prompt; 0 if none fits."""
        return max(self.found.value - self.output_len, 0)

    def document(self) -> dict[str, Any]:
        """Return the answer in JSON types."""
        return {"users": self.users, "prompt_len": self.prompt_len, "output_len": self.output_len, **self.found.document()}


def with_context(config: SimulationConfig, context: int, *, output_len: int) -> SimulationConfig:
    """Return `config` with requests of `context` tokens, `output_len` of them output."""
    model_len = config.serving.max_model_len or context
    return changed(config, random_input_len=context - output_len, random_output_len=output_len, max_model_len=model_len)


def max_context(
    config: SimulationConfig, allocator: str, *, attain: float, progress: Callable[[float], None] | None = None
) -> ContextAnswer:
    """Return the longest context, prompt and output, at which the users of `config` fit when every request has it.

    Within the goals of `config`; without goals, stable and without preemptions. max-model-len is the context itself where `config`
    does not give one: contiguous allocators then reserve what is needed.

    Raises:
        ConfigError: If `config` says otherwise how long requests are, or cannot work.
    """
    load = config.load
    if load.users is None:
        raise ConfigError("max-context needs a number of users: give --users N")
    for name in ("request_rate", "trace", "workload", "lengths", "random_input_len", "random_range_ratio"):
        if getattr(load, name) is not None:
            raise ConfigError(
                f"--{name.replace('_', '-')} contradicts max-context, which looks for the length of the requests of --users N: "
                "give the output with --random-output-len, and nothing else about lengths"
            )
    check_attain(attain)
    output_len = DEFAULT_OUTPUT_LEN if load.random_output_len is None else load.random_output_len
    longest = config.serving.max_model_len or load_model(config.serving.model).max_context
    block = config.serving.block_size
    first = output_len // max(block, 1) + 1
    if output_len < 1 or block < 1 or first * block > longest:
        raise ConfigError(
            f"--random-output-len is {output_len}: needs 1 or more, and a prompt beside it within {longest} tokens and whole blocks"
        )

    found = answer(
        lambda context: with_context(config, context, output_len=output_len),
        allocator,
        attain=attain,
        first=first,
        most=longest // block,
        scale=block,
        resolution=RESOLUTION,
        without_preemption=True,
        preemption_most=lambda value: max(value, first) + max(value // 2, 1),
        progress=progress,
    )
    return ContextAnswer(users=load.users, output_len=output_len, found=found)
