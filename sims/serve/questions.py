"""Reads bodies of requests. Fields of OpenAI's API, and those that vLLM adds; what would change an answer's shape is refused."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pagedkv.sims.serve.errors import BAD_REQUEST, NOT_FOUND, ApiError, bad_value

COMPLETION_MAX_TOKENS = 16
"""Where a completion does not say. Source: OpenAI's API reference; vLLM has the same."""
MOST_STOPS = 4
"""Source: OpenAI's API reference, `stop`."""
MOST_CHOICES = 128
"""Answers to one request. Source: the largest `n` of OpenAI's API reference."""

_MOST_INT = 2**31 - 1
_UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    **dict.fromkeys(("best_of",), (None, 1)),
    **dict.fromkeys(("echo", "logprobs", "use_beam_search"), (None, False)),
    **dict.fromkeys(("top_logprobs", "prompt_logprobs"), (None, 0)),
    **dict.fromkeys(("suffix",), (None, "")),
    **dict.fromkeys(("tools", "functions"), (None, [])),
    **dict.fromkeys(("tool_choice", "function_call"), (None, "none", "auto")),
    **dict.fromkeys(("response_format",), (None, {"type": "text"})),
}
"""By field: values that ask for nothing."""
_STEERING = (
    *("logit_bias", "allowed_token_ids", "bad_words", "truncate_prompt_tokens", "structured_outputs"),
    *("guided_json", "guided_regex", "guided_choice", "guided_grammar"),
    *("chat_template", "chat_template_kwargs", "continue_final_message"),
)
"""Fields that change the answer's tokens. Source: vLLM's protocol of requests, vllm/entrypoints/openai."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A body that was read. Prompts are texts, token ids, or a conversation."""

    prompts: tuple[str | list[int] | tuple[tuple[str, str], ...], ...]
    """An answer each, n times; a conversation is (role, content) by message."""
    settings: dict[str, Any]
    """Of all its answers: fields of `Ask` but for the prompt and their number."""
    n: int
    """Answers to each prompt."""
    stream: bool
    include_usage: bool
    """Tell the tokens in a chunk of their own, behind all others of a stream."""


def read_completion(body: bytes, model_name: str) -> Question:
    """Return what a body of POST /v1/completions asks.

    Raises:
        ApiError: With the field that cannot be.
    """
    fields = _fields(body, model_name)
    prompt = fields.get("prompt")
    many = isinstance(prompt, list) and bool(prompt) and not _is_ids(prompt)
    prompts = prompt if many and isinstance(prompt, list) else [prompt]
    for each in prompts:
        if not (isinstance(each, str) or _is_ids(each)):
            raise bad_value("prompt", each, "a text, a list of token ids, or a list of either of them")
    return _question(fields, tuple(prompts), default_max_tokens=COMPLETION_MAX_TOKENS)


def read_chat(body: bytes, model_name: str) -> Question:
    """Return what a body of POST /v1/chat/completions asks.

    Raises:
        ApiError: With the field that cannot be.
    """
    fields = _fields(body, model_name)
    messages = fields.get("messages")
    if not isinstance(messages, list) or not messages:
        raise bad_value("messages", messages, "a list of one or more messages")
    conversation = tuple(_message(message, f"messages[{i}]") for i, message in enumerate(messages))
    if fields.get("max_completion_tokens") is not None:
        fields["max_tokens"] = fields["max_completion_tokens"]
    return _question(fields, (conversation,), default_max_tokens=None)


def _fields(body: bytes, model_name: str) -> dict[str, Any]:
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(BAD_REQUEST, f"the body is no JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ApiError(BAD_REQUEST, 'the body is no JSON object: needs {"model": ..., ...}')
    model = fields.get("model")
    if model is not None and model != model_name:
        shown = model if isinstance(model, str) else repr(model)
        message = f"the model {shown[:200]!r} does not exist: this server has {model_name!r}"
        raise ApiError(NOT_FOUND, message, param="model", code="model_not_found")
    for name, nothing in _UNSUPPORTED.items():
        asked = fields.get(name)
        if not any(asked == value and type(asked) is type(value) for value in nothing):  # logprobs: 0 is not false
            raise ApiError(BAD_REQUEST, f"{name} is not supported here: leave it out", param=name)
    return fields


def _question(fields: dict[str, Any], prompts: tuple[Any, ...], *, default_max_tokens: int | None) -> Question:
    n = _whole(fields, "n", 1, least=1, most=MOST_CHOICES)
    if len(prompts) * n > MOST_CHOICES:
        raise ApiError(BAD_REQUEST, f"{len(prompts)} prompts, {n} answers each: at most {MOST_CHOICES} in one request", param="n")
    stream, options = _flag(fields, "stream"), fields.get("stream_options")
    if options is not None and not isinstance(options, dict):
        raise bad_value("stream_options", options, 'an object such as {"include_usage": true}')
    if options is not None and not stream:
        raise ApiError(BAD_REQUEST, "stream_options goes with stream: true only", param="stream_options")
    max_tokens = default_max_tokens
    if fields.get("max_tokens") is not None:
        max_tokens = _whole(fields, "max_tokens", 1, least=1)
    min_tokens = _whole(fields, "min_tokens", 0, least=0)
    if max_tokens is not None and min_tokens > max_tokens:
        raise bad_value("min_tokens", min_tokens, f"no more than max_tokens, {max_tokens}")
    settings = {
        "max_tokens": max_tokens,
        "min_tokens": min_tokens,
        "ignore_eos": _flag(fields, "ignore_eos"),
        "temperature": _number(fields, "temperature", 1.0, least=0.0, most=2.0),
        "top_p": _number(fields, "top_p", 1.0, least=0.0, most=1.0),
        "top_k": max(_whole(fields, "top_k", 0, least=-1), 0),
        "seed": None if fields.get("seed") is None else _whole(fields, "seed", 0, least=-(2**63), most=2**63 - 1),
        "steered_by": _steered_by(fields),
        "stop": _stops(fields.get("stop")),
        "include_stop": _flag(fields, "include_stop_str_in_output"),
        "stop_token_ids": _stop_ids(fields.get("stop_token_ids")),
        "cache_salt": _text(fields.get("cache_salt"), "cache_salt"),
    }
    if settings["top_p"] == 0.0:
        raise bad_value("top_p", 0.0, "more than 0, and 1 at most")
    return Question(
        prompts=prompts,
        settings=settings,
        n=n,
        stream=stream,
        include_usage=bool(options) and _flag(options or {}, "include_usage"),
    )


def _steered_by(fields: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the fields that want other tokens than the prompt and chance alone give."""
    neutral = {"presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0, "min_p": 0.0}
    asked = [name for name, usual in neutral.items() if _number(fields, name, usual, least=-2.0, most=math.inf) != usual]
    return (*asked, *(name for name in _STEERING if fields.get(name)))


def _message(message: object, where: str) -> tuple[str, str]:
    if not isinstance(message, dict):
        raise bad_value(where, message, 'an object such as {"role": "user", "content": "..."}')
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise bad_value(f"{where}.role", role, "a text such as user")
    if isinstance(content, str):
        return role, content
    if content is None and role == "assistant":
        return role, ""
    if not isinstance(content, list):
        raise bad_value(f"{where}.content", content, "a text, or a list of parts of type text")
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content]
    if not all(isinstance(text, str) for text in texts):
        raise bad_value(f"{where}.content", content, "parts of type text only")
    return role, "\n".join(map(str, texts))


def _is_ids(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(each) is int for each in value)


def _whole(fields: Mapping[str, Any], name: str, usual: int, *, least: int, most: int = _MOST_INT) -> int:
    value = fields.get(name)
    if value is None:
        return usual
    if type(value) is not int or not least <= value <= most:
        raise bad_value(name, value, f"a whole number from {least} to {most}")
    return value


def _number(fields: Mapping[str, Any], name: str, usual: float, *, least: float, most: float) -> float:
    value = fields.get(name)
    if value is None:
        return usual
    if type(value) not in (int, float) or not least <= value <= most or math.isinf(value):
        raise bad_value(name, value, f"a number from {least:g}" + ("" if math.isinf(most) else f" to {most:g}"))
    return float(value)


def _flag(fields: Mapping[str, Any], name: str) -> bool:
    value = fields.get(name)
    if not isinstance(value, bool | None):
        raise bad_value(name, value, "true or false")
    return bool(value)


def _stops(value: object) -> tuple[str, ...]:
    stops: Sequence[Any] = [None]
    if value is None or isinstance(value, list):
        stops = value or []
    elif isinstance(value, str):
        stops = [value]
    if len(stops) > MOST_STOPS or not all(isinstance(stop, str) and stop for stop in stops):
        raise bad_value("stop", value, f"a text, or up to {MOST_STOPS} of them, none of them empty")
    return tuple(stops)


def _stop_ids(value: object) -> frozenset[int]:
    if value is None or value == []:
        return frozenset()
    if not isinstance(value, list) or not _is_ids(value):
        raise bad_value("stop_token_ids", value, "a list of token ids")
    return frozenset(value)


def _text(value: object, name: str) -> str:
    if value is not None and not isinstance(value, str):
        raise bad_value(name, value, "a text")
    return value or ""
