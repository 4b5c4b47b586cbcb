"""What `serve` is asked for besides model, machine and engine. Every field is a flag, by vLLM's names where it has one."""

from dataclasses import dataclass
from pathlib import Path

from pagedkv.errors import ConfigError
from pagedkv.sims.config import parse_seconds

DEFAULT_MAX_QUEUE = 512
"""Source: OLLAMA_MAX_QUEUE; vLLM has no limit."""
_MOST_PORT = 65_535
_MOST_SEED = 2**63 - 1
"""Source: torch.manual_seed takes 64 bits, with a sign."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """Where it listens, its limits, and which of the two modes."""

    simulated: bool = False
    """Answer with filler words at the speed that the model would have on the machine: neither need be there."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is every one of this machine's."""
    port: int = 8000
    """Port; 0: any that is free. Default as of vLLM."""
    served_model_name: str | None = None
    """What clients call the model [default: what --model says]."""
    max_body_bytes: int = 16 << 20
    """Largest body of a request; more is answered with 413. The default holds a million token ids as text."""
    shutdown_timeout: str = "0s"
    """How long answers may go on after SIGINT or SIGTERM before they are ended. Default as of vLLM: not at all."""
    speed: float | None = None
    """Simulated: let time pass so many times as fast [default: 1]."""
    lengths: str | None = None
    """Simulated: let answers end at lengths drawn from this, azure-conv, sharegpt or a file, if max_tokens does not end them
    before [default: at max_tokens; chats that give none: azure-conv]."""
    random_weights: Path | None = None
    """Real: instead of --model, a config.json, or its folder, of a model with random weights."""
    dtype: str | None = None
    """Real: type of the weights: float32, bfloat16, float16 [default: the configuration's]."""
    device: str | None = None
    """Real: cpu or cuda [default: a GPU if there is one]."""
    seed: int = 0
    """Of random weights, of drawn lengths, and of which drafts are accepted."""

    def __post_init__(self) -> None:
        """Refuse what contradicts itself.

        Raises:
            ConfigError: With what would work.
        """
        others = ("random_weights", "dtype", "device") if self.simulated else ("speed", "lengths")
        for name in others:
            if (value := getattr(self, name)) is not None:
                mode = "goes without" if self.simulated else "needs"
                raise ConfigError(f"--{name.replace('_', '-')} {value} {mode} --simulated")
        if not 0 <= self.port <= _MOST_PORT:
            raise ConfigError(f"--port is {self.port}: needs 0 (any that is free) to {_MOST_PORT}")
        if not 0 <= self.seed <= _MOST_SEED:
            raise ConfigError(f"--seed is {self.seed}: needs 0 to {_MOST_SEED}")
        if self.max_body_bytes < 1:
            raise ConfigError(f"--max-body-bytes is {self.max_body_bytes}: needs 1 or more")
        if self.speed is not None and not 0 < self.speed < float("inf"):
            raise ConfigError(f"--speed is {self.speed}: needs more than 0; 1 is the machine's own")

    @property
    def grace_s(self) -> float:
        """The shutdown timeout in seconds."""
        return parse_seconds(self.shutdown_timeout, name="shutdown-timeout")
