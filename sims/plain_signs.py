"""What a terminal shows whose encoding lacks a sign: one of ASCII that looks like it, of the same width."""

import codecs
import unicodedata

PLAIN = "plain-signs"
"""Name of the error handler, for `reconfigure(errors=...)`."""
_LIKE = {
    "█": "#",
    "▓": "%",
    "■": "=",
    "▒": "+",
    "░": ":",
    "·": ".",
    "▏": "|",
    "×": "x",
    "–": "-",
    "−": "-",
    "—": "-",
    "…": "~",
    "→": ">",
    "≤": "<",
    "≥": ">",
    "±": "~",
    "µ": "u",
    "•": "*",
    "─": "-",
    "━": "-",
    "│": "|",
    "┃": "|",
}
"""The marks of bars and legends differ from each other, as the signs that they stand for do."""


def plain(text: str) -> str:
    """Return `text` with a sign of ASCII for each of its own: the base of a letter, "+" for what draws boxes, else "?"."""
    return "".join(_plain_sign(sign) for sign in text)


def _plain_sign(sign: str) -> str:
    if sign.isascii():
        return sign
    if sign in _LIKE:
        return _LIKE[sign]
    if "BOX DRAWINGS" in unicodedata.name(sign, ""):
        return "+"
    base = unicodedata.normalize("NFKD", sign)[0]
    return base if base.isascii() else "?"


def _replace(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return plain(error.object[error.start : error.end]), error.end


codecs.register_error(PLAIN, _replace)
