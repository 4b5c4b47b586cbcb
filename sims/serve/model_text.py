"""Between the texts and the token ids of a model that is really there. The tokenizer, of transformers, is handed in."""

from collections.abc import Sequence
from typing import Any

from pagedkv.errors import ConfigError
from pagedkv.sims.chat_template import chat_tokens, text_tokens
from pagedkv.sims.serve.errors import BAD_REQUEST, ApiError
from pagedkv.sims.serve.served_engine import Decoder, Tokenizer

_UNFINISHED = "\ufffd"
"""What a text ends with while bytes of its last character are still to come."""


def model_tokenizer(tokenizer: Any | None, *, max_model_len: int) -> Tokenizer:
    """Return the tokenizer of a model, which may have none: then prompts must be token ids, and answers are ids as text.

    A text with more characters than `max_model_len` of its longest tokens have is refused: all texts are encoded one after the
    other, and one of some megabytes without a blank takes minutes.
    """
    return _NoTokenizer() if tokenizer is None else _ModelTokenizer(tokenizer, max_model_len)


class _NoTokenizer:
    def encode(self, text: str) -> list[int]:
        raise ApiError(BAD_REQUEST, "this model has no tokenizer: give the prompt as token ids, e.g. [12, 7, 105]", param="prompt")

    def encode_chat(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        raise ApiError(BAD_REQUEST, "this model has no tokenizer: use /v1/completions with token ids", param="messages")

    def decoder(self) -> Decoder:
        return _IdDecoder()


class _IdDecoder:
    """Writes ids with blanks between them."""

    def __init__(self) -> None:
        self._blank = ""

    def push(self, tokens: Sequence[int], *, last: bool) -> str:
        del last
        text = "".join(f"{self._blank if i == 0 else ' '}{token}" for i, token in enumerate(tokens))
        self._blank = " " if text else self._blank
        return text


class _ModelTokenizer:
    def __init__(self, tokenizer: Any, max_model_len: int) -> None:
        self._tokenizer = tokenizer
        self._most_characters = max_model_len * max(map(len, tokenizer.get_vocab()))

    def _check_length(self, num_characters: int) -> None:
        if num_characters > self._most_characters:
            message = f"{num_characters} characters: no text of more than {self._most_characters} has room (--max-model-len)"
            raise ApiError(BAD_REQUEST, message, code="context_length_exceeded")

    def encode(self, text: str) -> list[int]:
        self._check_length(len(text))
        try:
            return text_tokens(self._tokenizer, text)
        except ConfigError as error:
            raise ApiError(BAD_REQUEST, f"prompt: {error}", param="prompt") from error

    def encode_chat(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        self._check_length(sum(len(content) for _, content in messages))
        try:
            return chat_tokens(self._tokenizer, messages)
        except ConfigError as error:
            raise ApiError(BAD_REQUEST, f"{error}; /v1/completions takes a prompt as it is", param="messages") from error

    def decoder(self) -> Decoder:
        return _ModelDecoder(self._tokenizer)


class _ModelDecoder:
    """Decodes the last tokens together, since a token's text depends on those before it. O(1) per token on average.

    Source: the two offsets of Hugging Face's text-generation-inference, `decode_token`; vLLM has the same.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self._tokens = tokenizer, list[int]()
        self._from, self._shown = 0, 0
        """Where the tokens that are decoded together begin, and those of them whose text has not been shown."""

    def push(self, tokens: Sequence[int], *, last: bool) -> str:
        self._tokens += tokens
        before, now = self._text(self._shown), self._text(len(self._tokens))
        if not last and (now.endswith(_UNFINISHED) or len(now) <= len(before)):
            return ""
        self._from, self._shown = self._shown, len(self._tokens)
        return now[len(before) :]

    def _text(self, end: int) -> str:
        return str(self._tokenizer.decode(self._tokens[self._from : end], skip_special_tokens=True))
