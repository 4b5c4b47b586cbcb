"""One browser for all pages, and result folders of small runs."""

import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from pagedkv.sims.cli import main

from .chromium import CHROMIUM, Browser, browser


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine")
    with browser(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result folder of a small run that preempts, with goals, from a lengths file whose name is HTML."""
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine")
    where = tmp_path_factory.mktemp("report")
    lengths = where / "<img src=x onerror=alert(1)>.csv"
    lengths.write_text("prompt_tokens,output_tokens\n" + "300,200\n900,400\n" * 20)
    load = ["--request-rate", "3", "--lengths", str(lengths), "--duration", "60s", "--warmup", "10s"]
    serving = ["--num-gpu-blocks-override", "600", "--max-model-len", "2048", "--watermark", "0"]
    main([*load, *serving, "--goodput", "ttft:2000", "tpot:100", "--out", str(where / "out")])
    return where / "out"


RUN = "--duration 5s --warmup 0 --hardware rtx-4090"
COMMANDS = {
    "sweep": f"sweep {RUN} --users 2,4 --block-size 16,32 --workers 1 --out .",
    "max-users": f"max-users {RUN} --goodput ttft:300 --num-gpu-blocks-override 300 --max-model-len 2048 --report capacity.html",
}
"""Commands that write other pages."""


@pytest.fixture(scope="session")
def pages(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Every kind of page, by the name of its command."""
    where = tmp_path_factory.mktemp("pages")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(where)
        for command in COMMANDS.values():
            main(shlex.split(command))
    return {"simulate": folder / "report.html", "sweep": where / "sweep.html", "max-users": where / "capacity.html"}
