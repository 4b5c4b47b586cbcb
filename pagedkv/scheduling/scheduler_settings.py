"""What bounds a step of vLLM's scheduler, and whose turn it is."""

from dataclasses import dataclass

from pagedkv.errors import ConfigError, expect_one_or_more, unknown_name

POLICIES = ("fcfs", "priority")


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerSettings:
    """Limits of one step, by vLLM's names."""

    max_num_seqs: int = 256
    """Most requests in the running batch."""
    max_num_batched_tokens: int = 2048
    """Most tokens that a step computes."""
    max_model_len: int
    """Longest prompt + output, in tokens."""
    enable_chunked_prefill: bool = True
    """Let a prompt be computed in several steps."""
    long_prefill_token_threshold: int = 0
    """Most tokens of one request in a step while others are there; 0 means no limit."""
    num_speculative_tokens: int = 0
    """Tokens that are drafted for each request that decodes, and verified in its next step (paged memory only); 0: none."""
    adaptive_long_prefill_threshold: bool = False
    """Let that limit be max-num-batched-tokens / (running + waiting) where this is more."""
    policy: str = "fcfs"
    """Whose turn it is, and who is preempted: "fcfs", or "priority" (the lower the number the more urgent)."""

    def __post_init__(self) -> None:
        """Refuse limits under which some request could never run.

        Raises:
            ConfigError: With the values that would work.
        """
        expect_one_or_more(self, "max_num_seqs", "max_num_batched_tokens", "max_model_len")
        if self.policy not in POLICIES:
            raise unknown_name("scheduling-policy", self.policy, POLICIES)
        if self.num_speculative_tokens < 0:
            raise ConfigError(f"num-speculative-tokens is {self.num_speculative_tokens}: needs 0 or more")
        if self.long_prefill_token_threshold < 0:
            raise ConfigError(
                f"long-prefill-token-threshold is {self.long_prefill_token_threshold}: needs 0 or more, and 0 is no limit"
            )
        if not self.enable_chunked_prefill and self.max_num_batched_tokens < self.max_model_len:
            raise ConfigError(
                f"without chunked prefill a prompt of max-model-len {self.max_model_len} must fit into one step: "
                f"max-num-batched-tokens is {self.max_num_batched_tokens}, needs {self.max_model_len} or more"
            )
