"""What stands where in the site's menu: every page but those that only show a file."""

import api_pages
import cli_pages
import notebook_pages

_HOWTO = (
    *("utilization", "preemption", "does-it-fit", "block-size", "fp8-kv", "vllm-or-llama-cpp", "memory-waterfall"),
    *("your-own-measurements", "replay-a-trace", "add-an-allocator"),
)
CONTENTS: dict[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "index.md": (
        ("Start", ("getting-started", "concepts", "memory-map", "notebooks/index")),
        ("How to", ("howto/index",)),
        ("Guides", ("workloads", "traces", "models", "hardware", "engines", "allocator", "A real model <runtime>", "serving")),
        ("Reference", ("reference/cli/index", "reference/api/index", "metrics", "assumptions", "invariants", "architecture")),
        ("Proof", ("validation", "Sayings, tested <sayings>", "Formula and people <static-vs-dynamic>", "benchmarks")),
        ("Project", ("README <readme>", "contributing")),
    ),
    "howto/index.md": (("", _HOWTO),),
    "validation.md": (("", ("validation/rows", "validation/loads")),),
    "notebooks/index.md": (("", tuple(map(notebook_pages.menu_entry, notebook_pages.notebooks()))),),
    "reference/cli/index.md": (("", (cli_pages.ITSELF, *sorted(cli_pages.commands()))),),
    "reference/api/index.md": (("", tuple(api_pages.PAGES)),),
}
"""By page: the captions and pages below it."""


def with_navigation(text: str, page: str) -> str:
    """Return the text of `page` with its part of the menu."""
    parts = [text.rstrip()]
    if page.endswith(".rst"):
        for _, pages in CONTENTS.get(page.replace(".rst", ".md"), ()):
            parts.append("\n".join([".. toctree::", "   :hidden:", "", *(f"   {name}" for name in pages)]))
    else:
        for caption, pages in CONTENTS.get(page, ()):
            options = [":hidden:", *([f":caption: {caption}"] if caption else [])]
            parts.append("\n".join(["```{toctree}", *options, "", *pages, "```"]))
    return "\n\n".join(parts) + "\n"
