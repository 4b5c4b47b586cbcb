"""What `generate` is asked for. Every field is a flag, by vLLM's names where it has one."""

from dataclasses import dataclass
from pathlib import Path

from pagedkv.errors import ConfigError, expect_one_or_more
from pagedkv.sims.prompt_file import MOST_TOKENS

DEFAULT_KV_CACHE = "4GiB"
"""Source: VLLM_CPU_KVCACHE_SPACE of vLLM's CPU backend, 4 GiB unless set (docs/getting_started/installation/cpu)."""

_MOST_SEED = 2**62
"""Texts are drawn by seeds above it too, which have 64 bits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateConfig:
    """A model that really runs, and who asks it."""

    prompts: Path
    """File of prompts: a text (or token ids) a line, or .jsonl with {"prompt": ..., "max_tokens": ...} or {"messages": [...]}."""
    model: Path | None = None
    """Folder with config.json, safetensors and a tokenizer."""
    random_weights: Path | None = None
    """Instead: a config.json, or its folder, of a model with random weights."""
    apply_chat_template: bool = False
    """Give each text to the tokenizer's chat template, as what a user says; conversations (messages) always go through it."""
    speculative_model: Path | None = None
    """Folder of a smaller model of the same words, that drafts; with --random-weights a config.json, with random weights too."""
    num_speculative_tokens: int | None = None
    """Drafts of each answer per step, for the model to verify."""
    users: int = 1
    """Each asks the next prompt as soon as the answer before it is there."""
    max_tokens: int = 16
    """Most tokens of an answer. Default as of vLLM's SamplingParams."""
    ignore_eos: bool = False
    """Go on behind tokens that end a text."""
    n: int = 1
    """Texts for each prompt, which share its blocks; with --beam-width the best ones."""
    beam_width: int | None = None
    """Search the likeliest texts with so many beams."""
    length_penalty: float | None = None
    """A beam's score is the sum of its log-probabilities / tokens ** this [default: 1]."""
    temperature: float = 0.0
    """0: always the likeliest token."""
    top_k: int = 0
    """Draw from the likeliest so many; 0: all."""
    top_p: float = 1.0
    """Draw from the likeliest that together reach this probability."""
    seed: int = 0
    """Of random weights and of what is drawn."""
    dtype: str = "auto"
    """Type of the weights: float32, bfloat16, float16; auto: the configuration's."""
    device: str = "auto"
    """cpu or cuda; auto: a GPU if there is one."""
    block_size: int = 16
    """Tokens per block."""
    kv_cache_memory_bytes: str | None = None
    """Size of the KV cache [default: 4GiB]."""
    num_gpu_blocks_override: int | None = None
    """Number of KV blocks, instead of what the memory holds."""
    max_model_len: int | None = None
    """Longest prompt + output [default: what the model takes, and the cache holds]."""
    max_num_seqs: int = 256
    """Most requests that run at once."""
    max_num_batched_tokens: int = 2048
    """Most tokens of a step."""
    disable_hybrid_kv_cache_manager: bool = False
    """One block table for all layers: windowed ones keep all tokens."""
    enable_prefix_caching: bool | None = None
    """Keep what was computed, for prompts that begin alike [default: on, but for models with linear attention]."""
    stream: bool = False
    """Print the answer as it comes (one user)."""

    def __post_init__(self) -> None:
        """Refuse what contradicts itself.

        Raises:
            ConfigError: With what would work.
        """
        if (self.model is None) == (self.random_weights is None):
            raise ConfigError("give one of --model FOLDER and --random-weights CONFIG")
        expect_one_or_more(self, "users", "max_tokens", "n", flag="--")
        if self.max_tokens > MOST_TOKENS:
            raise ConfigError(f"--max-tokens is {self.max_tokens}: needs 1 to {MOST_TOKENS}")
        if not abs(self.seed) <= _MOST_SEED:
            raise ConfigError(f"--seed is {self.seed}: needs -{_MOST_SEED} to {_MOST_SEED}")
        if self.kv_cache_memory_bytes is not None and self.num_gpu_blocks_override is not None:
            raise ConfigError("--kv-cache-memory-bytes and --num-gpu-blocks-override contradict each other: give one")
        if (self.speculative_model is None) != (self.num_speculative_tokens is None):
            raise ConfigError("speculation needs --speculative-model and --num-speculative-tokens, e.g. 3: give both, or none")
        if self.stream and max(self.users, self.n) > 1:
            mixed = f"--users {self.users}" if self.users > 1 else f"--n {self.n}"
            raise ConfigError(f"--stream goes with one user and one text, not with {mixed}: texts would be mixed")
        if self.n > 1 and self.beam_width is None and not self.temperature:
            raise ConfigError(f"--n {self.n} with temperature 0: all texts would be the same; give --temperature, or --beam-width")
        if self.length_penalty is not None and self.beam_width is None:
            raise ConfigError(f"--length-penalty {self.length_penalty} is for beams: give --beam-width, e.g. 4")
