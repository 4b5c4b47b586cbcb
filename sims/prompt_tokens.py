"""Prompts as token ids, by a tokenizer of transformers, which is handed in."""

from typing import Any

from pagedkv.errors import ConfigError
from pagedkv.sims.chat_template import chat_tokens, text_tokens
from pagedkv.sims.prompt_file import Prompt


def prompt_tokens(prompt: Prompt, tokenizer: Any | None, *, number: int, as_chat: bool) -> list[int]:
    """Return the token ids of a prompt.

    Args:
        prompt: Its text, conversation or token ids.
        tokenizer: None if the model has none.
        number: Its place in the file, for messages.
        as_chat: A text is what a user says, and goes through the chat template, as conversations always do.

    Raises:
        ConfigError: If a tokenizer or a template is needed and not there, or the template refuses the conversation.
    """
    if prompt.tokens:
        return list(prompt.tokens)
    if tokenizer is None:
        what = "conversation" if prompt.text is None else "text"
        raise ConfigError(f"prompt {number} is a {what}, and the model's folder has no tokenizer: write token ids, e.g. 12 7 105")
    messages = (("user", prompt.text),) if as_chat and prompt.text is not None else prompt.messages
    try:
        return chat_tokens(tokenizer, messages) if messages else text_tokens(tokenizer, prompt.text or "")
    except ConfigError as error:
        way = "; a text, without --apply-chat-template, or token ids need none" if messages else ""
        raise ConfigError(f"prompt {number}: {error}{way}") from error
