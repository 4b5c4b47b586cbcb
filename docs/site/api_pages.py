"""The reference of the library, from its docstrings: api_pages.toml says what is on which page, Sphinx's autodoc reads it."""

import tomllib
from importlib import import_module
from pathlib import Path
from typing import Any

PAGES: dict[str, Any] = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))


def api_pages() -> dict[str, str]:
    """Return the reStructuredText of each page by its name."""
    pages = {}
    for name, page in PAGES.items():
        parts = [_named(page["names_of"], each) for each in public_names(page)]
        pages[name] = _page(page["title"], page["about"], "\n".join(parts + [_module(module) for module in page["modules"]]))
    return pages


def public_names(page: dict[str, Any]) -> list[str]:
    """Return the names of a package that a page shows one by one, functions first."""
    names = import_module(page["names_of"]).__all__ if "names_of" in page else []
    return sorted(names, key=lambda name: (name[0].isupper(), name))


def index_page() -> str:
    """Return the page that lists the others."""
    rows = [f"* :doc:`{name}`: {page['about']}" for name, page in PAGES.items()]
    about = "From the docstrings. Modules are imported by their full names; what begins with an underscore is not for others."
    return _page("Library", about, "\n".join(rows))


def _module(name: str) -> str:
    return f"{_heading(f'``{name}``', '-')}\n.. automodule:: {name}\n   :members:\n"


def _named(package: str, name: str) -> str:
    kind = "autoclass" if name[0].isupper() else "autofunction"  # by its name: what it is made of need not be installed
    return f"{_heading(f'``{name}``', '-')}\n.. {kind}:: {package}.{name}\n" + ("   :members:\n" if kind == "autoclass" else "")


def _page(title: str, about: str, body: str) -> str:
    return f"{_heading(title, '=')}\n{about}\n\n{body}\n"


def _heading(title: str, line: str) -> str:
    return f"{title}\n{line * len(title)}\n"
