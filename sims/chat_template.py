"""Conversations as a model was trained on them: its tokenizer's own template. The tokenizer, of transformers, is handed in."""

from collections.abc import Sequence
from typing import Any

from pagedkv.errors import ConfigError


def chat_tokens(tokenizer: Any, messages: Sequence[tuple[str, str]]) -> list[int]:
    """Return the token ids of a conversation, (role, content) by message, up to where the answer begins.

    Raises:
        ConfigError: If the tokenizer has no chat template, or the template refuses the conversation.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError("this model has no chat template")
    turns = [{"role": role, "content": content} for role, content in messages]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates are programs, and refuse by any exception
        raise ConfigError(f"the chat template refuses these messages: {error}") from error
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])  # the template has written the special ones
