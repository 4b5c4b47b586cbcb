"""The tables of docs/metrics.md that define words: written from the glossary, so that page, report and `simulate explain` agree.

`python -m pagedkv.sims.glossary_page docs/metrics.md` rewrites the page. What stands outside the marks is by hand.
"""

import re
import sys
from pathlib import Path

from pagedkv.sims.glossary import GLOSSARY

_BLOCK = re.compile(r"(<!-- glossary: ([a-z0-9_ ]+) -->\n).*?(<!-- end -->\n)", re.DOTALL)


def markdown(names: list[str]) -> str:
    """Return the words `names` as a table.

    Raises:
        KeyError: If one of them is not in the glossary.
    """
    lines = ["| field | formula | |", "|---|---|---|"]
    for name in names:
        entry = GLOSSARY[name]
        lines.append(f"| `{name}` | {_cell(entry.formula)} | {_cell(entry.meaning)} |")
    return "\n".join(["", *lines, "", ""])


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def rewritten(page: str) -> str:
    """Return the page with every table of words written anew."""
    return _BLOCK.sub(lambda found: f"{found[1]}{markdown(found[2].split())}{found[3]}", page)


def defined_in(page: str) -> list[str]:
    """Return the words that the tables of a page define."""
    return [name for found in _BLOCK.finditer(page) for name in found[2].split()]


if __name__ == "__main__":
    file = Path(sys.argv[1])
    file.write_text(rewritten(file.read_text(encoding="utf-8")), encoding="utf-8")
