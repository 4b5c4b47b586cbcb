"""ShareGPT's conversations, a list of `{"id": ..., "conversations": [{"from": "human", "value": ...}, ...]}`.

As in vLLM's benchmark a request is what the first two turns say: a prompt, and a text as long as the answer. Unlike there,
short and long ones are kept. The file has no times, and texts instead of token counts: counting needs a model's tokenizer,
so that lengths are estimates.
Sources: anon8231489123/ShareGPT_Vicuna_unfiltered (ShareGPT_V3); vLLM, vllm/benchmarks/datasets/sharegpt.py.
"""

from pathlib import Path
from typing import ClassVar

from pagedkv.errors import TraceFormatError
from pagedkv.sims.traces import TRACE_FORMATS
from pagedkv.sims.traces._head import Head
from pagedkv.sims.traces._json_text import at, json_document, list_at
from pagedkv.sims.traces._rows import Column, Rows, left_out, shown

CHARACTERS_PER_TOKEN = 4
"""Characters of English text that make a token. Source: OpenAI, help article 4936856, "What are tokens and how to count them?"."""


@TRACE_FORMATS.register("sharegpt-json")
class ShareGptJson:
    """Lengths only, estimated; conversations without a question and an answer are left out."""

    first_line: ClassVar[str] = '[{"id": "...", "conversations": [{"from": "human", "value": "..."}, ...]}, ...] (lengths only)'

    @staticmethod
    def matches(head: Head) -> bool:
        """Return whether the file is a list of objects with conversations."""
        return head.is_list and "conversations" in head.keys

    @staticmethod
    def rows(path: Path, text: str) -> Rows:
        """Split the file; see `TraceFormat.rows`."""
        document = json_document(path, text)
        if not isinstance(document, list):
            raise TraceFormatError(f"{path}: {shown(document)} is not a list of conversations")
        kept: list[int] = []
        turns: list[tuple[object, object]] = []
        for number, entry in enumerate(document):
            pair = _first_turns(path, number, entry)
            if pair is not None:
                kept.append(number)
                turns.append(pair)
        prompt, output = (_text_column(turn, kept, [pair[turn] for pair in turns]) for turn in (0, 1))
        estimate = f"tokens estimated, {CHARACTERS_PER_TOKEN} characters each"
        return Rows(
            line_numbers=[number + 1 for number in kept],
            prompt=prompt,
            output=output,
            arrival=None,
            no_arrival="ShareGPT's conversations have no arrival times, and texts instead of token counts",
            notes=(estimate, *left_out(len(document) - len(kept), "conversation{s} without question and answer")),
        )


def estimated_tokens(text: object) -> int | None:
    """Return about how many tokens `text` has, at least 1; None if it is no text."""
    return max(1, round(len(text) / CHARACTERS_PER_TOKEN)) if isinstance(text, str) else None


def _first_turns(path: Path, number: int, entry: object) -> tuple[object, object] | None:
    """Return what the first two turns say, None where there are no two or one is empty."""
    turns = list_at(path, f"[{number}].conversations", at(entry, "conversations"))
    said = [at(turn, "value") for turn in turns[:2]]
    return None if len(said) < 2 or "" in said else (said[0], said[1])


def _text_column(turn: int, kept: list[int], texts: list[object]) -> Column:
    """Return the texts of all requests' first or second `turn`."""
    return Column(
        name=f"conversations[{turn}].value",
        cells=texts,
        parse=estimated_tokens,
        needed="a text",
        place=lambda row: f"[{kept[row]}].conversations[{turn}].value",
    )
