"""The reference of the command line, from the commands themselves: a page each."""

import re

from pagedkv.sims.cli import app
from pagedkv.sims.cli_tools import tools

ITSELF = "simulate"
_ABOUT = (
    "`simulate` and `pagedkv` are the same command. Flags of a run are also the keys of its `config.toml`, with underscores. "
    "These pages are generated from the commands themselves; `--help` says the same."
)


def commands() -> list[str]:
    """Return the names of all commands beside `simulate` itself, as they are registered."""
    return [name for name in tools if not name.startswith("-")]


def command_pages() -> dict[str, str]:
    """Return the Markdown of each command's page by its name."""
    pages = {ITSELF: _tidy(app.generate_docs(output_format="markdown", recursive=False))}
    for name in commands():
        command = tools[name]
        text = command.generate_docs(output_format="markdown", recursive=False, usage_name=f"simulate {name}")
        pages[name] = _tidy(text).replace(f"# {name}\n", f"# simulate {name}\n", 1)
    return pages


def index_page() -> str:
    """Return the page that lists the commands."""
    rows = [f"* [`simulate`]({ITSELF}.md): Serve simulated users with paged and with contiguous KV allocation, side by side"]
    for name in sorted(commands()):
        rows.append(f"* [`simulate {name}`]({name}.md): {_first_sentence(tools[name].help)}")
    return "\n\n".join(["# Command line", _ABOUT, "\n".join(rows)]) + "\n"


def _first_sentence(text: str | None) -> str:
    return re.split(r"(?<=[.]) |\n\n", (text or "").strip())[0].rstrip(".").replace("\n", " ")


def _tidy(text: str) -> str:
    """Return the generated Markdown with groups as headings, lines that go on joined, and links to pages."""
    text = re.sub(r"^\*\*([^*\n]+)\*\*:$", r"## \1", text, flags=re.M)
    text = re.sub(r"(?<=\S)\n {4,}(?=\S)", " ", text)
    return re.sub(r"docs/([\w-]+)\.md", r"[\g<0>](../../\1.md)", text).rstrip() + "\n"
