"""What vLLM's --speculative-config means here: which method drafts, with which model, how many tokens a step."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pagedkv.catalogue import known_model, load_model
from pagedkv.errors import ConfigError

FLAG = "--speculative-config"
_OWN_WEIGHTS = ("eagle", "medusa")
"""Methods whose layer or heads are a repository that is not read: what they usually are stands for them."""


class SpeculativeConfig(NamedTuple):
    """What one says."""

    settings: dict[str, object]
    """By field of `ServingConfig`; empty if nothing of it is modelled."""
    not_modelled: tuple[str, ...]
    """The rest of it, for a reader."""


def joined_parts(parts: Mapping[str, str]) -> str:
    """Return the JSON of what was given key by key: --speculative-config.method ngram."""
    return json.dumps({key: _value(value) for key, value in parts.items()})


def read_speculative_config(text: str, *, target: str) -> SpeculativeConfig:
    """Return what the JSON `text` says of drafts for the model `target`.

    The methods are vLLM's: without one, the model's name decides. Source: SpeculativeConfig.
    """
    whole = SpeculativeConfig({}, (f"{FLAG} {text}",))
    asked = _value(text)
    if not isinstance(asked, dict):
        return whole
    rest = {key: value for key, value in asked.items() if key not in ("method", "model", "num_speculative_tokens")}
    model = asked.get("model")
    method = _method(str(asked.get("method") or ""), str(model or ""))
    number = asked.get("num_speculative_tokens", _own_number(target) if method == "mtp" else None)
    if method is None or type(number) is not int:
        return whole
    if method == "mtp" and not _own_number(target):
        return SpeculativeConfig({}, (f"{FLAG} {text} (no layer for drafting is known of {target})",))
    settings: dict[str, object] = {"num_speculative_tokens": number}
    left = [f"{FLAG} {key} {value if isinstance(value, str) else json.dumps(value)}" for key, value in rest.items()]
    if method == "draft-model":
        if not isinstance(model, str) or not (known_model(model) or Path(model).exists()):
            return whole
        settings["speculative_model"] = model
    else:
        settings["speculative_method"] = method
        if method in _OWN_WEIGHTS and model is not None:
            stand_in = "one more layer of the target" if method == "eagle" else "heads of the target's width"
            left.insert(0, f"{FLAG} model {model} (counts as {stand_in})")
    return SpeculativeConfig(settings, tuple(left))


def _method(method: str, model: str) -> str | None:
    """Return the method by our name; None if it is not modelled."""
    name, of_model = method.lower(), model.lower()
    if not name:
        guesses = (("ngram", "ngram"), ("eagle", "eagle"), ("medusa", "medusa"))
        name = next((guess for part, guess in guesses if part in of_model), "draft_model" if model else "")
    if name.endswith("mtp"):  # deepseek_mtp, qwen3_next_mtp: older names
        return "mtp"
    return {
        "ngram": "ngram",
        "[ngram]": "ngram",
        "draft_model": "draft-model",
        "eagle": "eagle",
        "eagle3": "eagle",
        "medusa": "medusa",
    }.get(name)


def _own_number(target: str) -> int | None:
    """Return the layers for drafting that the weights of `target` bring; None if none are known."""
    try:
        return load_model(target).draft_layers or None
    except ConfigError:
        return None


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text
