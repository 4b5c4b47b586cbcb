"""What a user of SGLang's scheduler sets."""

from dataclasses import dataclass

from pagedkv.errors import ConfigError, unknown_name
from pagedkv.scheduling.sglang_budgets import NO_LIMIT, PassNumbers
from pagedkv.scheduling.sglang_queue import QUEUE_POLICIES


@dataclass(frozen=True, slots=True, kw_only=True)
class SGLangSettings:
    """Limits and rules, by SGLang's names and defaults."""

    max_running_requests: int = 256
    """Most requests in the running batch, a prompt in pieces included."""
    max_model_len: int
    """Longest prompt + output, in tokens: SGLang's context length."""
    schedule_policy: str = "fcfs"
    """Whose turn it is: a name in `QUEUE_POLICIES`."""
    chunked_prefill_size: int | None = 8192
    """Prompt tokens of a step, a prompt being cut to it; None: prompts are computed whole."""
    max_prefill_tokens: int = 16384
    """Prompt tokens of a step, whole prompts; the last one admitted may exceed it."""
    prefill_max_requests: int | None = None
    """Most prompts in a step; None: no limit."""
    enable_mixed_chunk: bool = False
    """Let running requests decode in steps that prefill; else they wait meanwhile."""
    num_speculative_tokens: int = 0
    """Tokens that are drafted for each request that decodes, and verified in its next step; 0: none."""
    schedule_conservativeness: float = 1.0
    """How much of their possible output running requests are expected to make at first, of 70 %."""

    def __post_init__(self) -> None:
        """Refuse what cannot work.

        Raises:
            ConfigError: With the values that would.
        """
        for name in ("max_running_requests", "max_model_len", "max_prefill_tokens", "prefill_max_requests", "chunked_prefill_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                limit = ", and None is no limit" if name in ("prefill_max_requests", "chunked_prefill_size") else ""
                raise ConfigError(f"{name.replace('_', '-')} is {value}: needs 1 or more{limit}")
        if self.num_speculative_tokens < 0:
            raise ConfigError(f"num-speculative-tokens is {self.num_speculative_tokens}: needs 0 or more")
        if self.num_speculative_tokens and self.enable_mixed_chunk:
            raise ConfigError("enable-mixed-chunk and speculative decoding do not go together in SGLang: leave one of them out")
        if self.schedule_policy not in QUEUE_POLICIES:
            raise unknown_name("schedule-policy", self.schedule_policy, QUEUE_POLICIES)
        if not 0 < self.schedule_conservativeness < float("inf"):
            raise ConfigError(f"schedule-conservativeness is {self.schedule_conservativeness}: needs more than 0; 1 is the default")
        if self.enable_mixed_chunk and self.chunked_prefill_size is None:
            raise ConfigError("enable-mixed-chunk needs chunked prefill: set chunked-prefill-size, e.g. 8192")

    @property
    def max_num_seqs(self) -> int:
        """`max_running_requests`, by vLLM's name."""
        return self.max_running_requests

    def pass_limits(self, *, caches_prefixes: bool, state_slots: int) -> PassNumbers:
        """Return what bounds every prefill pass."""
        return PassNumbers(
            int(self.max_prefill_tokens),
            NO_LIMIT if self.chunked_prefill_size is None else int(self.chunked_prefill_size),
            NO_LIMIT if self.prefill_max_requests is None else int(self.prefill_max_requests),
            bool(caches_prefixes),
            self.schedule_policy == "shortest-prefill-first",
            int(state_slots),
        )

    def check_memory(self, *, num_rows: int, max_model_len: int, block_size: int, caches_prefixes: bool) -> None:
        """Refuse memory that these settings do not go with.

        Raises:
            ConfigError: With what would.
        """
        for name, wanted, room in (
            ("max-running-requests", self.max_running_requests, num_rows),
            ("max-model-len", self.max_model_len, max_model_len),
        ):
            if wanted > room:
                raise ConfigError(f"{name} is {wanted}, the allocator was built for {room}")
        if self.chunked_prefill_size is not None and self.chunked_prefill_size % block_size:
            below = self.chunked_prefill_size // block_size * block_size
            raise ConfigError(
                f"chunked-prefill-size is {self.chunked_prefill_size}: chunks end with a block of {block_size} tokens, "
                f"so it must be a multiple; {below or block_size} would work"
            )
        if self.schedule_policy == "shortest-prefill-first" and not caches_prefixes:
            raise ConfigError("schedule-policy shortest-prefill-first needs prefix caching: enable it, or use fcfs")
