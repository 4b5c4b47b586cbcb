"""Prompts from a file: a text a line, or JSON lines of texts, token ids, or objects with a `prompt` or `messages`."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pagedkv.errors import ConfigError

MOST_TOKENS = 2**31 - 1
"""Most new tokens that can be asked for: more than any model takes. Chosen as for requests of `serve`."""
_MOST_TOKEN = 2**31 - 1
"""Largest token id: ids are int32."""
_MOST_DIGITS = 18
"""Of a number in a file: more than any token id has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What somebody asks."""

    text: str | None = None
    """As text; or else `messages` or `tokens`."""
    messages: tuple[tuple[str, str], ...] = ()
    """As a conversation: (role, content) by message."""
    tokens: tuple[int, ...] = ()
    """As token ids."""
    max_tokens: int | None = None
    """Most new tokens; None: what all have."""


def read_prompts(path: Path) -> list[Prompt]:
    """Return the prompts of a file.

    A name that ends in .jsonl has a JSON value a line: "text", [1, 2, 3], {"prompt": either, "max_tokens": 20}, or a
    conversation, {"messages": [{"role": "user", "content": "text"}]}. Any other file has a prompt a line; one of numbers alone is
    token ids. Empty lines count for nothing.

    Raises:
        ConfigError: With the line that is no prompt.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines() would cut at characters inside JSON texts too
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ConfigError(f"cannot read --prompts {str(path)!r}: {reason}") from error
    read = _of_json if path.suffix == ".jsonl" else _of_text
    prompts = [read(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1) if line.strip()]
    if not prompts:
        raise ConfigError(f"--prompts {str(path)!r} has no prompt: write one a line")
    return prompts


def _of_text(line: str, where: str) -> Prompt:
    words = line.split()
    if not all(word.isascii() and word.isdigit() for word in words):
        return Prompt(text=line)
    if (longest := max(map(len, words))) > _MOST_DIGITS:  # int() refuses thousands of digits in other words
        raise ConfigError(f"{where}: a number of {longest} digits: needs token ids up to {_MOST_TOKEN}")
    return Prompt(tokens=_token_ids([int(word) for word in words], where))


def _of_json(line: str, where: str) -> Prompt:
    try:
        value: Any = json.loads(line)
    except (ValueError, RecursionError) as error:  # RecursionError: thousands of brackets
        raise ConfigError(f"{where}: {error}; needs a JSON value a line") from error
    max_tokens, messages = None, None
    if isinstance(value, dict):
        max_tokens, messages, value = (value.get(name) for name in ("max_tokens", "messages", "prompt"))
    if max_tokens is not None and (type(max_tokens) is not int or not 1 <= max_tokens <= MOST_TOKENS):
        raise ConfigError(f"{where}: max_tokens is {max_tokens!r}: needs a whole number from 1 to {MOST_TOKENS}")
    if messages is not None:
        if value is not None:
            raise ConfigError(f"{where}: has a prompt and messages: give one of them")
        return Prompt(messages=_conversation(messages, where), max_tokens=max_tokens)
    if isinstance(value, str) and value:
        return Prompt(text=value, max_tokens=max_tokens)
    if isinstance(value, list) and value and all(type(token) is int and token >= 0 for token in value):
        return Prompt(tokens=_token_ids(value, where), max_tokens=max_tokens)
    raise ConfigError(f'{where}: needs a text, a list of token ids, {{"prompt": either of them}}, or {{"messages": [...]}}')


def _token_ids(ids: list[int], where: str) -> tuple[int, ...]:
    if max(ids) > _MOST_TOKEN:
        raise ConfigError(f"{where}: a token id beyond {_MOST_TOKEN}: needs ids up to there, and below the size of the vocabulary")
    return tuple(ids)


def _conversation(messages: object, where: str) -> tuple[tuple[str, str], ...]:
    if not isinstance(messages, list) or not messages:
        raise ConfigError(f'{where}: messages needs a list such as [{{"role": "user", "content": "text"}}]')
    turns = [(each.get("role"), each.get("content")) if isinstance(each, dict) else (None, None) for each in messages]
    for i, (role, content) in enumerate(turns):
        if not (isinstance(role, str) and role and isinstance(content, str)):
            raise ConfigError(f'{where}: messages[{i}] needs texts for "role", such as user, and for "content"')
    return tuple((str(role), str(content)) for role, content in turns)
