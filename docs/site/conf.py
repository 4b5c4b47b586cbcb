"""Sphinx's settings. `python docs/site FOLDER` prepares the pages and calls Sphinx with them."""

from importlib.util import find_spec
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.ext.autodoc.mock import _MockObject

project = "pagedkv"
copyright = "The pagedkv authors"
html_title = "pagedkv"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
source_suffix = {".md": "markdown", ".rst": "restructuredtext"}
root_doc = "index"

myst_heading_anchors = 4
myst_enable_extensions = ["attrs_inline"]
myst_heading_slug_func = "repository_links.github_slug"
suppress_warnings = [
    "myst.header",  # a page may begin with a title and go on with "###"
    "ref.python",  # a short name in a signature may be that of several things
]

# Docstrings have Markdown's `code`.
default_role = "code"
highlight_language = "none"  # of code that does not say what it is
smartquotes = False  # "--users" is a flag
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_mock_imports = [name for name in ("torch", "transformers", "triton", "flashinfer") if find_spec(name) is None]
napoleon_use_rtype = False
napoleon_use_ivar = True
python_maximum_signature_line_length = 100
add_module_names = False

html_theme = "furo"
pygments_dark_style = "github-dark"
html_css_files = ["site.css"]
html_show_sphinx = False
html_copy_source = False
html_show_search_summary = False  # it would fetch pages, which a browser refuses for files
html_theme_options = {"navigation_with_keys": True}


# What stands in for torch when that is not installed must go into annotations such as `torch.Tensor | None`.
_MockObject.__or__ = _MockObject.__ror__ = lambda self, other: self


def literal_blocks(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Mark indented blocks behind a colon as literal, which Markdown does by itself."""
    for number, (line, empty, first) in enumerate(zip(lines, lines[1:], lines[2:], strict=False)):
        indented = len(first) - len(first.lstrip()) >= 4 + len(line) - len(line.lstrip())
        if line.endswith(":") and not line.endswith("::") and not empty.strip() and indented:
            lines[number] += ":"


_AS_WRITTEN: dict[str, list[str]] = {}


def keep(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Keep what an attribute says of itself: Napoleon takes its words before a colon for a type."""
    if what in ("attribute", "data", "property"):
        _AS_WRITTEN[name] = lines.copy()


def put_back(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Undo what Napoleon did to an attribute."""
    lines[:] = _AS_WRITTEN.pop(name, lines)


def no_signature_of_protocols(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, signature: str | None, returns: str | None
) -> tuple[str, None] | None:
    """Leave out the arguments of what is never called."""
    return ("", None) if what == "class" and getattr(obj, "_is_protocol", False) else None


def colons_for_dashes(app: Sphinx, doctree: nodes.document, page: str) -> None:
    """Put a colon between a parameter and what it is, where Sphinx puts two hyphens for typographers."""
    for text in list(doctree.findall(lambda node: isinstance(node, nodes.Text) and node == " -- ")):
        text.parent.replace(text, nodes.Text(": "))


def setup(app: Sphinx) -> None:
    """Tell Sphinx of it."""
    app.connect("autodoc-process-docstring", literal_blocks, priority=100)
    app.connect("autodoc-process-docstring", keep, priority=200)
    app.connect("autodoc-process-docstring", put_back, priority=900)
    app.connect("doctree-resolved", colons_for_dashes)
    app.connect("autodoc-process-signature", no_signature_of_protocols)
