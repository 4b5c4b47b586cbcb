"""Read a `vllm serve` command line: what it means here, and which of its flags we leave out."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, replace

from pagedkv.catalogue import known_model, load_hardware, load_model, quantized_repository
from pagedkv.errors import ConfigError
from pagedkv.sims.config import ServingConfig
from pagedkv.sims.serve_command import read_placeholder
from pagedkv.sims.vllm_drafts import joined_parts, read_speculative_config
from pagedkv.sims.vllm_versions import vllm_version

_MULTIPLIERS = {"k": 1000, "K": 1 << 10, "m": 10**6, "M": 1 << 20, "g": 10**9, "G": 1 << 30, "t": 10**12, "T": 1 << 40}
_SWITCHES = (
    "enable_chunked_prefill",
    "enable_prefix_caching",
    "enforce_eager",
    "scheduler_reserve_full_isl",
    "disable_hybrid_kv_cache_manager",
)
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
_SHORT = {"tp": "tensor_parallel_size", "q": "quantization", "sc": "speculative_config"}
_DRAFTS = "speculative_config"

_NO_EFFECT = frozenset(
    """
    host port uds api_key served_model_name trust_remote_code download_dir load_format revision tokenizer
    tokenizer_mode tokenizer_revision chat_template chat_template_content_format response_role enable_auto_tool_choice
    tool_call_parser tool_parser_plugin reasoning_parser disable_log_requests disable_log_stats enable_log_requests
    max_log_len uvicorn_log_level allowed_origins allowed_methods allowed_headers allow_credentials ssl_keyfile
    ssl_certfile ssl_ca_certs root_path middleware return_tokens_as_token_ids generation_config
    override_generation_config seed hf_token hf_config_path code_revision disable_uvicorn_access_log
    enable_server_load_tracking enable_request_id_headers max_logprobs logits_processors task runner convert
    disable_fastapi_docs show_hidden_metrics_for_version otlp_traces_endpoint collect_detailed_traces
    structured_outputs_config guided_decoding_backend
    """.split()
)
"""Flags of `vllm serve` that change neither memory nor scheduling: leaving them out loses nothing."""

_OFFLOADS = ("cpu_offload_gb", "kv_offloading_size", "swap_space")
"""Flags that put weights or KV blocks into the processor's memory."""

_BARE = re.compile(
    r"(no|enable|disable|skip|use)_.*|allow_credentials|async_scheduling|headless|return_tokens_as_token_ids|trust_.*"
)
"""Flags that take no value, so that the word behind them may be the model."""
_LISTS = frozenset(["served_model_name", "lora_modules", "logits_processors", "cudagraph_capture_sizes"])
"""Flags that take all words up to the next flag."""

# How a command looks in a shell, a script or a container.
_CONTINUATION = re.compile(r"\\[ \t]*\r?\n|\n(?=[ \t]*-)")  # lines of flags go on without a backslash, too
_COMMENT_OR_DESCRIPTOR = re.compile(r"(?m)(?<!\S)(#.*$|[0-9](?=[<>]))")
_OPERATORS = frozenset(";|&<>\n")
_CONTAINERS = frozenset(["docker", "podman", "nerdctl"])
_IMAGE = re.compile(r"(?=.*[/:])([\w.-]+(:[0-9]+)?/)*vllm[\w.-]*(:[\w.-]+)?(@sha256:\w+)?")
_MODULE = re.compile(r".*vllm.*api_server(\.py)?")
_FLAG = re.compile(r"--?[A-Za-z].*", re.DOTALL)


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
        text: `vllm serve MODEL --flag value ...`, also behind environment variables, in `bash -c` or in a container, a container
            whose image serves (`docker run vllm/vllm-openai --model MODEL ...`), or the older
            `python -m vllm.entrypoints.openai.api_server --model MODEL ...`. It ends where the shell would end it.
        base: Settings for what the command does not say.

    Raises:
        ConfigError: If it is no such command, or a value cannot be read.
    """
    try:
        words = _arguments(text)
    except ValueError as error:
        raise ConfigError(f"cannot read the command: {error}; paste it as you would type it into a shell") from error
    if words is None:
        raise ConfigError(f"{text!r} is no vLLM server command: it should contain 'vllm serve MODEL'")
    settings: dict[str, object] = {}
    positional: list[str] = []
    without_effect: list[str] = []
    not_modelled: list[str] = []
    drafts, draft_parts = "", dict[str, str]()
    for flag, value in _flags(words):
        name = _name(flag)
        on, shown = name.removeprefix("no_"), flag if value is None else f"{flag} {value}"
        if not flag:
            positional.append(value or "")
        elif on in _SWITCHES and (value or "true").lower() in ("true", "false"):
            settings[on] = (on == name) == (value is None or value.lower() == "true")
        elif name == _DRAFTS and value is not None:
            drafts = value
        elif name.startswith(f"{_DRAFTS}.") and value is not None:
            draft_parts[name.removeprefix(f"{_DRAFTS}.")] = value
        elif name == "max_model_len" and value in ("auto", "-1"):  # the longest that fits
            not_modelled.append(shown)
        elif name in (*_INTEGERS, *_SHARES, *_TEXTS):
            settings[name] = _value(flag, value)
        elif name == "dtype" and value in ("float32", "float"):
            settings.setdefault("quantization", "fp32")
            not_modelled.append(f"{shown} (of the KV cache)")
        elif on in _NO_EFFECT or name == "dtype":
            without_effect.append(shown)
        else:
            not_modelled.append(shown)
    if positional and "model" not in settings:
        settings["model"] = positional.pop(0)
    if "model" not in settings:
        raise ConfigError(f"{text!r} names no model: write 'vllm serve MODEL'")
    quantized = read_placeholder(str(settings["model"])) or quantized_repository(str(settings["model"]))
    if quantized is not None and not known_model(str(settings["model"])):
        settings["model"] = quantized[0]
        settings.setdefault("quantization", quantized[1])
    if drafts or draft_parts:
        read = read_speculative_config(drafts or joined_parts(draft_parts), target=str(settings["model"]))
        settings |= read.settings
        not_modelled += read.not_modelled
    serving = replace(base, **settings)  # type: ignore[arg-type]
    return VllmCommand(serving=serving, without_effect=tuple(without_effect), not_modelled=(*not_modelled, *positional))


def offload_note(read: VllmCommand) -> str | None:
    """Return what is to be said of tiers in the processor's memory that the command asks for; None: nothing.

    Raises:
        ConfigError: If the machine is unknown.
    """
    asked = [flag for flag in read.not_modelled if _name(flag.partition(" ")[0].partition("=")[0]) in _OFFLOADS]
    if not asked or not load_hardware(read.serving.hardware).unified:
        return None
    return f"On unified memory {', '.join(asked)} frees nothing: it is the same memory (simulate budget --timeline)."


def with_vllm_defaults(serving: ServingConfig) -> tuple[ServingConfig, tuple[str, ...]]:
    """Return `serving` with vLLM's own choice where it differs from ours and nothing is set, and those choices as flags.

    Raises:
        ConfigError: If the model is unknown.
    """
    defaults: dict[str, object] = {}
    if serving.gpu_memory_utilization is None and serving.kv_cache_memory_bytes is None:
        defaults["gpu_memory_utilization"] = vllm_version(serving.engine).gpu_memory_utilization
    if serving.max_model_len is None:
        defaults["max_model_len"] = load_model(serving.model).max_context
    flags = tuple(f"--{name.replace('_', '-')} {value}" for name, value in defaults.items())
    return replace(serving, **defaults), flags  # type: ignore[arg-type]


def _arguments(text: str) -> list[str] | None:
    """Return the words behind `vllm serve`, or what else starts the server, to the end of the command; None if nothing does.

    Raises:
        ValueError: If a quotation does not end.
    """
    text = _COMMENT_OR_DESCRIPTOR.sub("", _CONTINUATION.sub(" ", text))
    lexer = shlex.shlex(text, posix=True, punctuation_chars="".join(_OPERATORS))
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t\r", True, ""
    words = list(lexer)
    start = None
    for i, (before, word) in enumerate(zip(["", *words], words, strict=False)):
        if (word == "serve" and "vllm" in before) or _MODULE.fullmatch(word):
            start = i
            break
        if re.fullmatch(r"-\w*c", before) and " " in word and (inner := _arguments(word)) is not None:  # bash -c "vllm serve ..."
            return inner
        if start is None and _IMAGE.fullmatch(word) and "run" in words[:i] and _CONTAINERS.intersection(words[:i]):
            start = i  # unless a command follows
    if start is None:
        return None
    behind = words[start + 1 :]
    end = next((i for i, word in enumerate(behind) if word and _OPERATORS.issuperset(word)), len(behind))
    return behind[:end]


def _name(flag: str) -> str:
    name = flag.lstrip("-").replace("-", "_")
    return _SHORT.get(name, name)


def _flags(words: list[str]) -> Iterator[tuple[str, str | None]]:
    """Yield (flag as typed, value); a word that belongs to no flag comes with the flag ""."""
    i = 0
    while i < len(words):
        word, i = words[i], i + 1
        if not _FLAG.fullmatch(word):
            if word != "--":
                yield "", word
            continue
        flag, equals, value = word.partition("=")
        name, values = _name(flag), [value] if equals else []
        switch = name in _SWITCHES or _BARE.fullmatch(name) is not None
        while i < len(words) and not equals and not _FLAG.fullmatch(words[i]) and (not values or name in _LISTS):
            if switch and words[i].lower() not in ("true", "false"):
                break
            values.append(words[i])
            i += 1
        yield flag, " ".join(values) if values else None


def _value(flag: str, value: str | None) -> object:
    name = _name(flag)
    if value is None:
        raise ConfigError(f"{flag} has no value in the vLLM command")
    if name in _TEXTS and name != "kv_cache_memory_bytes":
        return value
    try:
        if name in _SHARES:
            return float(value)
        scale = _MULTIPLIERS.get(value[-1:], 1)
        number = round(float(value[:-1]) * scale) if scale > 1 else int(value)
    except (ValueError, OverflowError):
        if name == "kv_cache_memory_bytes":  # perhaps in our words, such as 16GiB
            return value
        raise ConfigError(f"{flag} {value!r} in the vLLM command is not a number") from None
    return str(number) if name == "kv_cache_memory_bytes" else number
