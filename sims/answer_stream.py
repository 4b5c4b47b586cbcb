"""Answers as they come, one after the other."""

from collections.abc import Callable
from typing import TextIO

from pagedkv.sims.real_load import Answer


class AnswerStream:
    """Writes a text as it grows, and nothing that the next token may still change; without a tokenizer, token ids."""

    def __init__(self, decode: Callable[[list[int]], str] | None, out: TextIO) -> None:
        self._decode, self._out, self._shown, self._prompt = decode, out, 0, -1

    def told(self, answer: Answer) -> None:
        """Write what is new."""
        if answer.prompt != self._prompt:
            self._prompt, self._shown = answer.prompt, 0
        text = " ".join(map(str, answer.tokens)) if self._decode is None else self._decode(answer.tokens)
        if not text.endswith("\ufffd") or answer.finish_reason is not None:
            self._out.write(text[self._shown :])
            self._shown = len(text)
        if answer.finish_reason is not None:
            self._out.write("\n\n")
        self._out.flush()
