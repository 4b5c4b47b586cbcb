"""Texts as token ids, and conversations by the template of the model's tokenizer, of transformers, which is handed in."""

from collections.abc import Sequence
from typing import Any

from pagedkv.errors import ConfigError


def text_tokens(tokenizer: Any, text: str, *, special: bool = True) -> list[int]:
    """Return the token ids of a text, with those that the tokenizer adds around every text if `special`.

    Raises:
        ConfigError: If it is no text: JSON can hold half of a surrogate pair.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(f"a text with {text[error.start]!a} alone, half of a surrogate pair: needs Unicode characters") from error
    return list(tokenizer(text, add_special_tokens=special)["input_ids"])


def chat_tokens(tokenizer: Any, messages: Sequence[tuple[str, str]]) -> list[int]:
    """Return the token ids of a conversation, (role, content) by message, up to where the answer begins.

    Raises:
        ConfigError: If the tokenizer has no chat template, or the template refuses the conversation, or it is no text.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError("this model has no chat template")
    turns = [{"role": role, "content": content} for role, content in messages]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates are programs, and refuse by any exception
        raise ConfigError(f"the chat template refuses these messages: {error}") from error
    return text_tokens(tokenizer, text, special=False)  # the template has written the special ones
