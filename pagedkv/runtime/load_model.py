"""Models and tokenizers from local folders; nothing is downloaded, no code of theirs is run."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from pagedkv.errors import ConfigError
from pagedkv.runtime.model_layers import model_layers
from pagedkv.runtime.storage import DTYPES, FP8

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
"""A folder with one of them has a tokenizer."""


def load_model(folder: Path, *, dtype: str = "auto", device: str = "auto") -> Any:
    """Return the model of a folder with config.json and safetensors, ready to be run.

    Raises:
        ConfigError: If it is not there, or not supported.
    """
    config = _config(folder)
    if config.get_text_config(decoder=True) is config:
        model_layers(config, with_states=True)  # refused before its weights are read
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=_dtype(dtype, config), local_files_only=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot load the weights in {str(folder)!r}: {error}") from error
    return _ready(model, device)


def random_model(path: Path, *, dtype: str = "auto", device: str = "auto", seed: int = 0) -> Any:
    """Return a model with random weights, from a config.json or its folder alone; of one of several parts the language model.

    Raises:
        ConfigError: If there is none, or it is not supported.
    """
    config = _config(path).get_text_config(decoder=True)
    model_layers(config, with_states=True)
    torch.manual_seed(seed)
    try:
        model = AutoModelForCausalLM.from_config(config, dtype=_dtype(dtype, config))
    except ValueError as error:
        raise ConfigError(f"{type(config).__name__} has no causal language model: {error}") from error
    return _ready(model, device)


def load_tokenizer(path: Path) -> Any:
    """Return the tokenizer in a model's folder, None if there is none.

    Raises:
        ConfigError: If it cannot be read.
    """
    folder = path if path.is_dir() else path.parent
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"cannot load the tokenizer in {str(folder)!r}: {error}") from error


def end_tokens(model: Any) -> tuple[int, ...]:
    """Return the token ids that end a text, as the model's generation settings or configuration say."""
    settings = getattr(model, "generation_config", None)
    ends = getattr(settings, "eos_token_id", None)
    ends = getattr(model.config, "eos_token_id", None) if ends is None else ends
    return () if ends is None else (ends,) if isinstance(ends, int) else tuple(ends)


def _config(path: Path) -> Any:
    file = path / "config.json" if path.is_dir() else path
    try:
        fields: Any = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {str(file)!r}: {error.strerror}; needs a config.json or the folder with it") from error
    except ValueError as error:
        raise ConfigError(f"{str(file)!r} is no JSON: {error}") from error
    if not isinstance(fields, dict) or not isinstance(fields.get("model_type"), str):
        raise ConfigError(f"{str(file)!r} names no model_type: needs a config.json of transformers")
    kind = fields.pop("model_type")
    try:
        return AutoConfig.for_model(kind, **fields)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{str(file)!r}: transformers makes no configuration of model_type {kind!r}: {error}") from error


def _dtype(name: str, config: Any) -> torch.dtype:
    if name == "auto":
        dtype: torch.dtype | None = getattr(config, "dtype", None)
        return torch.float32 if dtype is None else dtype
    if name not in DTYPES or DTYPES[name] is FP8:
        raise ConfigError(f"--dtype {name}: needs auto, float32, bfloat16 or float16")
    return DTYPES[name]


def _ready(model: Any, device: str) -> Any:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return model.to(device).eval()
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {device}: {str(error).splitlines()[0]}; cpu works everywhere") from error
