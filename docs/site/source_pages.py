"""Pages that show files and folders of the repository to which others link."""

import ast
import re
from pathlib import PurePosixPath

from repository_links import ROOT, page_of

_LANGUAGES = {".py": "python", ".toml": "toml", ".sh": "bash", ".md": "markdown", ".svg": "xml"}
_HIDDEN = ("__pycache__",)


def source_page(path: str) -> tuple[str, list[str]]:
    """Return the Markdown of the page of `path`, and the paths of the files that it lists."""
    return _folder_page(path) if (ROOT / path).is_dir() else (_file_page(path), [])


def first_line(path: str) -> str:
    """Return the first sentence of what a Python file says of itself, "" if it says nothing."""
    if not path.endswith(".py"):
        return ""
    said = ast.get_docstring(ast.parse((ROOT / path).read_text("utf-8"))) or ""
    return re.split(r"(?<=[.:]) |\n", said.partition("\n\n")[0].replace("\n", " "))[0]


def _file_page(path: str) -> str:
    text = (ROOT / path).read_text("utf-8")
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    language = _LANGUAGES.get(PurePosixPath(path).suffix, "text")
    return f"---\norphan: true\n---\n\n# {path}\n\n{fence}{language}\n{text.rstrip()}\n{fence}\n"


def _folder_page(path: str) -> tuple[str, list[str]]:
    inside = sorted(child for child in (ROOT / path).iterdir() if child.name not in _HIDDEN and not child.name.startswith("."))
    files = [f"{path}/{child.name}" for child in inside if child.is_file()]
    here = PurePosixPath(page_of(path)).parent
    rows = [f"* [{PurePosixPath(file).name}]({PurePosixPath(page_of(file)).relative_to(here)})" for file in files]
    said = [f": {line}" if (line := first_line(file)) else "" for file in files]
    return f"---\norphan: true\n---\n\n# {path}/\n\n" + "\n".join(map("".join, zip(rows, said, strict=True))) + "\n", files
