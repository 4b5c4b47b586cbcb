"""Bodies of answers. Source: OpenAI's API reference, the objects text_completion, chat.completion and chat.completion.chunk."""

import json
import time
import uuid
from collections.abc import Sequence
from typing import Any, TypeAlias

from pagedkv.sims.serve.serve_loop import Answer

StopReason: TypeAlias = str | int | None
"""The stop text or token of the request that ended an answer. Source: `stop_reason` of vLLM."""
DONE = b"data: [DONE]\n\n"
"""The last event of a stream."""


def event(document: dict[str, Any]) -> bytes:
    """Return a server-sent event."""
    return b"data: " + json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace") + b"\n\n"


def usage(answers: Sequence[Answer]) -> dict[str, Any]:
    """Return how many tokens answers took; n answers to one prompt count it once, as the first of them found it."""
    prompts = {id(answer.ask.prompt): answer for answer in reversed(answers)}.values()
    prompt_tokens, output_tokens = sum(len(each.ask.prompt) for each in prompts), sum(answer.num_tokens for answer in answers)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": output_tokens,
        "total_tokens": prompt_tokens + output_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(each.num_cached_tokens for each in prompts)},
    }


class CompletionFormat:
    """Answers of POST /v1/completions."""

    prefix, kind, chunk_kind = "cmpl", "text_completion", "text_completion"

    def __init__(self, model_name: str) -> None:
        """Draw an id."""
        self._head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model_name}

    def whole(self, texts: Sequence[tuple[str, str, StopReason]], answers: Sequence[Answer]) -> dict[str, Any]:
        """Return the body for texts of (text, why it ended, which stop ended it), by index."""
        choices = [{"index": i, **self._choice(*each)} for i, each in enumerate(texts)]
        return {**self._head, "object": self.kind, "choices": choices, "usage": usage(answers)}

    def opening(self, index: int) -> dict[str, Any] | None:
        """Return the chunk before the first token of an answer, None if there is none."""
        del index
        return None

    def chunk(self, index: int, text: str, finish_reason: str | None, stop_reason: StopReason = None) -> dict[str, Any]:
        """Return a part of an answer."""
        return self._chunk({"index": index, **self._part(text, finish_reason, stop_reason)})

    def closing(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """Return the chunk with the tokens of all answers."""
        return {**self._head, "object": self.chunk_kind, "choices": [], "usage": usage(answers)}

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        return {**self._head, "object": self.chunk_kind, "choices": [choice], "usage": None}

    def _choice(self, text: str, finish_reason: str | None, stop_reason: StopReason) -> dict[str, Any]:
        return {"text": text, "logprobs": None, "finish_reason": finish_reason, "stop_reason": stop_reason}

    def _part(self, text: str, finish_reason: str | None, stop_reason: StopReason) -> dict[str, Any]:
        return self._choice(text, finish_reason, stop_reason)


class ChatFormat(CompletionFormat):
    """Answers of POST /v1/chat/completions."""

    prefix, kind, chunk_kind = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self, index: int) -> dict[str, Any]:
        """Return the chunk that says who speaks."""
        delta = {"role": "assistant", "content": ""}
        return self._chunk({"index": index, "delta": delta, "logprobs": None, "finish_reason": None})

    def _choice(self, text: str, finish_reason: str | None, stop_reason: StopReason) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"message": message, "logprobs": None, "finish_reason": finish_reason, "stop_reason": stop_reason}

    def _part(self, text: str, finish_reason: str | None, stop_reason: StopReason) -> dict[str, Any]:
        return {"delta": {"content": text}, "logprobs": None, "finish_reason": finish_reason, "stop_reason": stop_reason}
