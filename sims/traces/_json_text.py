"""JSON in files: one value a line, or documents one behind the other."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pagedkv.errors import TraceFormatError
from pagedkv.sims.traces._rows import shown

_SPACE = re.compile(r"\s*")


def json_lines(path: Path, text: str) -> Iterator[tuple[int, str, Any]]:
    """Yield the number, the text and the value of each line that is not blank; raises TraceFormatError for one that is no JSON."""
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:  # RecursionError: thousands of nested brackets
            raise TraceFormatError(f"{path}, line {number}: not JSON ({error})") from error
        yield number, line.strip(), value


def json_documents(path: Path, text: str) -> list[tuple[int, Any]]:
    """Return the first line and the value of each document in `text`; raises TraceFormatError where it is no JSON."""
    decoder = json.JSONDecoder()
    documents: list[tuple[int, Any]] = []
    at, line, counted = 0, 1, 0
    while True:
        space = _SPACE.match(text, at)
        at = space.end() if space else at
        line, counted = line + text.count("\n", counted, at), at
        if at == len(text):
            return documents
        try:
            value, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            where = error.lineno if isinstance(error, json.JSONDecodeError) else line
            raise TraceFormatError(f"{path}, line {where}: not JSON ({error})") from error
        documents.append((line, value))


def json_document(path: Path, text: str) -> Any:
    """Return the one document in `text`; raises TraceFormatError if it is no JSON, or more than one."""
    documents = json_documents(path, text)
    if len(documents) > 1:
        line, value = documents[1]
        raise TraceFormatError(f"{path}, line {line}: one JSON document is needed, and {shown(value)} begins another")
    return documents[0][1] if documents else None


def at(value: object, *keys: str) -> object:
    """Return what is under `keys`, one inside the other, or None where one of them is missing."""
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def list_at(path: Path, where: str, value: object) -> list[Any]:
    """Return `value`, which stands at `where`; raises TraceFormatError if it is no list."""
    if isinstance(value, list):
        return value
    missing = f"no {where}" if value is None else f"{where}: {shown(value)} is not a list"
    raise TraceFormatError(f"{path}: {missing}")
