"""Read a `vllm serve` command line: what it means here, and which of its flags we leave out."""

import shlex
from dataclasses import dataclass, fields, replace

from pagedkv.errors import ConfigError
from pagedkv.sims.config import ServingConfig

_MULTIPLIERS = {"k": 1000, "K": 1024, "m": 10**6, "M": 2**20, "g": 10**9, "G": 2**30}
_SWITCHES = ("enable_chunked_prefill", "enforce_eager", "scheduler_reserve_full_isl")
_INTEGERS = (
    "max_model_len",
    "block_size",
    "max_num_seqs",
    "max_num_batched_tokens",
    "long_prefill_token_threshold",
    "num_gpu_blocks_override",
    "tensor_parallel_size",
)
_SHARES = ("gpu_memory_utilization", "watermark")
_TEXTS = ("model", "quantization", "kv_cache_dtype", "kv_cache_memory_bytes")

# Flags of `vllm serve` that change neither memory nor scheduling: leaving them out loses nothing.
_NO_EFFECT = frozenset(
    [
        "host",
        "port",
        "uds",
        "api_key",
        "served_model_name",
        "trust_remote_code",
        "download_dir",
        "load_format",
        "revision",
        "tokenizer",
        "tokenizer_mode",
        "tokenizer_revision",
        "chat_template",
        "chat_template_content_format",
        "response_role",
        "enable_auto_tool_choice",
        "tool_call_parser",
        "tool_parser_plugin",
        "reasoning_parser",
        "disable_log_requests",
        "disable_log_stats",
        "enable_log_requests",
        "max_log_len",
        "uvicorn_log_level",
        "allowed_origins",
        "allowed_methods",
        "allowed_headers",
        "allow_credentials",
        "ssl_keyfile",
        "ssl_certfile",
        "ssl_ca_certs",
        "root_path",
        "middleware",
        "return_tokens_as_token_ids",
        "generation_config",
        "override_generation_config",
        "seed",
        "hf_token",
        "hf_config_path",
        "code_revision",
        "disable_uvicorn_access_log",
        "enable_server_load_tracking",
        "enable_request_id_headers",
        "max_logprobs",
        "logits_processors",
        "task",
        "runner",
        "convert",
        "disable_fastapi_docs",
        "show_hidden_metrics_for_version",
        "otlp_traces_endpoint",
        "collect_detailed_traces",
        "structured_outputs_config",
        "guided_decoding_backend",
    ]
)
_SHORT = {"tp": "tensor_parallel_size", "q": "quantization"}


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmCommand:
    """What a `vllm serve` command line says."""

    serving: ServingConfig
    """Its settings here."""
    without_effect: tuple[str, ...]
    """Flags that change neither memory nor scheduling."""
    not_modelled: tuple[str, ...]
    """Flags that may change the answer and are not modelled."""


def parse_vllm_command(text: str, *, base: ServingConfig) -> VllmCommand:
    """Return what `text` means, on top of `base` (which gives the machine).

    Args:
        text: `vllm serve MODEL --flag value ...`, also with environment variables or a container command before it, or the older
            `python -m vllm.entrypoints.openai.api_server --model MODEL ...`.
        base: Settings for what the command does not say.

    Raises:
        ConfigError: If it is no such command, or a value cannot be read.
    """
    try:
        words = shlex.split(text.replace("\\\n", " "))
    except ValueError as error:
        raise ConfigError(f"cannot read the command: {error}; paste it as you would type it into a shell") from error
    start = next((i for i, word in enumerate(words) if word == "serve" or word.endswith(".api_server")), None)
    if start is None:
        raise ConfigError(f"{text!r} is no vLLM server command: it should contain 'vllm serve MODEL'")
    settings: dict[str, object] = {}
    without_effect: list[str] = []
    not_modelled: list[str] = []
    for flag, value in _flags(words[start + 1 :]):
        name = _SHORT.get(flag, flag)
        off = name.removeprefix("no_")
        if flag == "":
            settings["model"] = value
        elif off in _SWITCHES and value in (None, "true", "True", "false", "False"):
            settings[off] = (off == name) == (value in (None, "true", "True"))
        elif name in (*_INTEGERS, *_SHARES, *_TEXTS):
            settings[name] = _value(name, value)
        else:
            known = without_effect if name in _NO_EFFECT or (name == "dtype" and value != "float32") else not_modelled
            known.append(f"--{flag.replace('_', '-')}" + (f" {value}" if value is not None else ""))
            if name == "dtype" and value == "float32":
                settings["quantization"] = "fp32"
                not_modelled.pop()
    if "model" not in settings:
        raise ConfigError(f"{text!r} names no model: write 'vllm serve MODEL'")
    known_names = {field.name for field in fields(ServingConfig)}
    serving = replace(base, **{name: value for name, value in settings.items() if name in known_names})  # type: ignore[arg-type]
    return VllmCommand(serving=serving, without_effect=tuple(without_effect), not_modelled=tuple(not_modelled))


def _flags(words: list[str]) -> list[tuple[str, str | None]]:
    """Return (flag name, value) pairs; the model, which has no flag, comes with the name ""."""
    pairs: list[tuple[str, str | None]] = []
    i = 0
    while i < len(words):
        word = words[i]
        i += 1
        if not word.startswith("-"):
            pairs.append(("", word))
            continue
        name, equals, value = word.lstrip("-").partition("=")
        name = name.replace("-", "_")
        if equals:
            pairs.append((name, value))
        elif name not in _SWITCHES and name.removeprefix("no_") == name and i < len(words) and not words[i].startswith("-"):
            pairs.append((name, words[i]))
            i += 1
        else:
            pairs.append((name, None))
    # A second word without a flag is the value of a list-valued flag; only the first can be the model.
    models = [pair for pair in pairs if pair[0] == ""]
    return [pair for pair in pairs if pair[0] != "" or pair is models[0]]


def _value(name: str, value: str | None) -> object:
    flag = f"--{name.replace('_', '-')}"
    if value is None:
        raise ConfigError(f"{flag} has no value in the vLLM command")
    if name in _TEXTS:
        return _bytes(value) if name == "kv_cache_memory_bytes" else value
    if name == "max_model_len" and value in ("auto", "-1"):
        return None
    try:
        if name in _SHARES:
            return float(value)
        scale = _MULTIPLIERS.get(value[-1:], 1)
        return round(float(value[:-1]) * scale) if scale > 1 else int(value)
    except ValueError:
        raise ConfigError(f"{flag} {value!r} in the vLLM command is not a number") from None


def _bytes(value: str) -> str:
    """Return vLLM's way to write bytes (16G is binary, 16g decimal) in ours."""
    scale = _MULTIPLIERS.get(value[-1:])
    return value if scale is None else str(round(float(value[:-1]) * scale))
