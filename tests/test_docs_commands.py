"""The how-to pages and the first steps: every command that they show is run, and says what they show."""

import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from pagedkv.allocators import ALLOCATORS
from pagedkv.sims.cli import app
from pagedkv.sims.config import LoadConfig, MeasurementConfig, ServingConfig, SimulationConfig
from pagedkv.sims.scenario import resolve

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [DOCS / "getting-started.md", *sorted((DOCS / "howto").glob("*.md"))]
QUESTIONS = [page for page in PAGES[1:] if page.name != "index.md"]
SHOWN = re.compile(r"^```bash\n((?:simulate|pagedkv) [^\n]*)\n```\n(?:\n```text\n(.*?)^```$)?", re.M | re.S)
LEFT_OUT = "[...]"
README = (ROOT / "README.md").read_text("utf-8")
OF_THE_READER = ("azure.csv.gz", "run1/config.toml")
"""Files that a line of the README names and nobody has."""
README_RUNS = [
    line
    for line in re.split(r" && |; | \| | +#|\n", "\n".join(re.findall(r"^simulate .*$", README, re.M)))
    if line.startswith("simulate --") and not any(file in line for file in OF_THE_READER)
]


def shown(page: Path) -> list[tuple[str, str]]:
    """The commands of a page, each with the output behind it, or ""."""
    return SHOWN.findall(page.read_text("utf-8"))


def pattern(output: str) -> str:
    """The expression of what an output shows: `[...]` is any lines, and inside a line any characters."""
    lines = [r"(?:.*\n)*?" if line == LEFT_OUT else _line(line) for line in output.splitlines()]
    return "".join(lines) + ("" if output.endswith(f"{LEFT_OUT}\n") else r"\n*\Z")


def _line(line: str) -> str:
    return "[^\n]*".join(map(re.escape, line.split(LEFT_OUT))) + r"\n"


COMMANDS = [pytest.param(*each, id=f"{page.stem}-{number}") for page in PAGES for number, each in enumerate(shown(page))]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands are run where the page's files are, on a terminal of 80 columns, after what the page says to do before."""
    (tmp_path / "docs").symlink_to(DOCS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    names: dict[str, object] = {"__name__": "toy_allocator"}
    exec((DOCS / "examples" / "toy_allocator.py").read_text("utf-8"), names)
    monkeypatch.setitem(ALLOCATORS._registered, "toy-allocator", names["ToyAllocator"])
    monkeypatch.setattr(type(ALLOCATORS), "names", _with_the_toy(type(ALLOCATORS).names))


def _with_the_toy(names: Callable[[object], tuple[str, ...]]) -> Callable[[object], tuple[str, ...]]:
    return lambda self: tuple(sorted({*names(self), "toy-allocator"})) if self is ALLOCATORS else names(self)


@pytest.mark.parametrize(("command", "output"), COMMANDS)
def test_a_command_says_what_the_page_shows(command: str, output: str, said: Callable[..., tuple[str, str]]) -> None:
    out, err = said(*shlex.split(command)[1:])
    if output.startswith("error: "):
        out = err
    assert out
    assert not err.startswith("error: ") or out == err
    assert not output or re.match(pattern(output), out), f"{command} says\n{out}\nand the page shows\n{output}"


def test_a_changed_output_is_noticed() -> None:
    shows = "[...]\nTTFT P99, ms   419\n[...]\n"
    assert re.match(pattern(shows), "a\nb\nTTFT P99, ms   419\nmore\n")
    assert not re.match(pattern(shows), "a\nb\nTTFT P99, ms   420\nmore\n")
    assert re.match(pattern("x [...] y\n"), "x 12 y\n\n")
    assert not re.match(pattern("x [...] y\n"), "x 12 y\nand more\n")


@pytest.mark.parametrize("command", README_RUNS)
def test_a_simulation_of_the_readme_could_run(command: str) -> None:
    _, asked, _ = app.parse_args(shlex.split(command)[1:], exit_on_error=False, print_error=False)
    load, measurement = asked.kwargs.get("load", LoadConfig()), asked.kwargs.get("measurement", MeasurementConfig())
    serving = asked.kwargs.get("serving", ServingConfig())
    for engine in serving.engine.split(","):
        config = SimulationConfig(load=load, serving=replace(serving, engine=engine), measurement=measurement)
        assert resolve(config).load.title


def test_the_readme_says_how_many_people_fit_as_the_first_steps_do() -> None:
    found = re.search(r"^paged: (\d+) users", (DOCS / "getting-started.md").read_text("utf-8"), re.M)
    assert found is not None
    assert f"[{found[1]} fit](docs/getting-started.md" in README
    assert f"{found[1]} in the first case" in (DOCS / "static-vs-dynamic.md").read_text("utf-8")


@pytest.mark.parametrize("page", QUESTIONS, ids=lambda page: page.stem)
def test_a_page_answers_first_then_shows_why_and_where_to_go(page: Path) -> None:
    title, answer, *_ = page.read_text("utf-8").split("\n\n")
    assert title.startswith("# ")
    assert answer.startswith("**")
    text = page.read_text("utf-8")
    assert text.index("```bash") < text.index("\n## ")
    assert any(output for _, output in shown(page))
    assert "](" in text.partition("\n## Next\n")[2]


def test_there_are_ten_and_the_index_names_them() -> None:
    index = (DOCS / "howto" / "index.md").read_text("utf-8")
    assert sorted(re.findall(r"\]\((.*?)\)", index)) == [page.name for page in QUESTIONS]
    assert len(QUESTIONS) == 10


def test_the_lines_of_the_trace_are_those_of_the_file() -> None:
    lines = re.search(r"^arrival_s,.*?(?=^```)", (DOCS / "howto" / "replay-a-trace.md").read_text("utf-8"), re.M | re.S)
    assert lines is not None
    assert (DOCS / "examples" / "my-trace.csv").read_text("utf-8").startswith(lines[0])
