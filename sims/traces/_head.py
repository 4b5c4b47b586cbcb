"""The beginning of a file, by which its format is recognised."""

import re
from dataclasses import dataclass

_HEAD_CHARACTERS = 1 << 20
"""How much is looked at: a benchmark's result names its lists within it, whatever prompts stand before them."""
_START = re.compile(r"\s*")
_JSON_TOKEN = re.compile(r'"((?:[^"\\]|\\.)*)"(\s*:)?|[{}\[\]]', re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """What the beginning of a file shows; a file that is damaged further down is recognised all the same."""

    first_line: str
    """The first line that is not blank, "" if there is none."""
    keys: frozenset[str]
    """Keys of the JSON object that the file begins with, or of the first one in its list; empty if it is no JSON."""
    is_list: bool
    """Whether the file begins with a JSON list."""

    @classmethod
    def of(cls, text: str) -> "Head":
        """Return the head of a file with this text."""
        space = _START.match(text)
        start = space.end() if space else 0
        head = text[start : start + _HEAD_CHARACTERS]
        return cls(first_line=head.partition("\n")[0], keys=_outer_keys(head), is_list=head.startswith("["))

    @property
    def is_object(self) -> bool:
        """Whether the file begins with a JSON object."""
        return self.first_line.startswith("{")

    @property
    def csv_names(self) -> frozenset[str]:
        """The column names of a CSV header, in lower case."""
        return frozenset(name.strip().strip('"').lower() for name in self.first_line.split(","))


def _outer_keys(head: str) -> frozenset[str]:
    """Return the keys of the outermost object of `head`, as far as it goes."""
    keys: set[str] = set()
    wanted = {"{": 1, "[": 2}.get(head[:1], 0)
    depth = 0
    for token in _JSON_TOKEN.finditer(head) if wanted else ():
        text = token.group()
        if text in ("{", "["):
            depth += 1
        elif text in ("}", "]"):
            depth -= 1
            if depth < wanted:
                break
        elif depth == wanted and token.group(2):
            keys.add(token.group(1))
    return frozenset(keys)
