"""What `reality` is asked for. Every field is a flag."""

from dataclasses import dataclass
from pathlib import Path

from pagedkv.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class RealityConfig:
    """A model that really runs, and how often."""

    model: Path | None = None
    """Folder with config.json and safetensors."""
    random_weights: Path | None = None
    """Instead: a config.json, or its folder, of a model with random weights."""
    num_requests: int = 40
    """Requests of each load."""
    repeats: int = 3
    """How often each load is really served: how far these runs lie apart is part of the bar."""
    seed: int = 0
    """Of random weights, prompts, lengths and arrivals."""
    dtype: str = "auto"
    """Type of the weights: float32, bfloat16, float16; auto: the configuration's."""
    device: str = "auto"
    """cpu or cuda; auto: a GPU if there is one."""
    block_size: int = 16
    """Tokens per block."""
    num_gpu_blocks_override: int = 600
    """Number of KV blocks."""
    max_num_batched_tokens: int = 512
    """Most tokens of a step."""
    processor_clock: bool = False
    """Let one thread compute, and let its processor time be the clock: for a processor that others use too, where identical runs
    differ by more than predictions do. Waiting for an arrival passes at once."""

    def __post_init__(self) -> None:
        """Refuse what contradicts itself.

        Raises:
            ConfigError: With what would work.
        """
        if (self.model is None) == (self.random_weights is None):
            raise ConfigError("give one of --model FOLDER and --random-weights CONFIG")
        for name, least in (("num_requests", 8), ("repeats", 2)):
            if getattr(self, name) < least:
                raise ConfigError(f"--{name.replace('_', '-')} is {getattr(self, name)}: needs {least} or more")
