"""The pages at the width of a telephone: nothing is wider than the screen."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from pagedkv.sims.cli import main

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
WIDTH = 400
TELL = "<script>setTimeout(() => parent.postMessage(document.documentElement.scrollWidth, '*'), 1500)</script></body>"
FRAME = (
    f'<!DOCTYPE html><title>none</title><body><iframe src="page.html" width="{WIDTH}" height="800" style="border:0"></iframe>'
    '<script>window.addEventListener("message", event => { document.title = "width " + event.data })</script>'
)
RUN = "--duration 5s --warmup 0 --hardware rtx-4090 --users 2"

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")


@pytest.mark.parametrize(
    ("command", "page"),
    [
        (f"{RUN} --out .", "report.html"),
        (f"sweep {RUN},4 --block-size 16,32 --workers 1 --out .", "sweep.html"),
    ],
)
def test_a_page_is_as_wide_as_a_telephone(command: str, page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    main(shlex.split(command))
    (tmp_path / "page.html").write_text((tmp_path / page).read_text("utf-8").replace("</body>", TELL), "utf-8")
    (tmp_path / "frame.html").write_text(FRAME, "utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=10000", f"--user-data-dir={tmp_path}/profile"]
    argv = [str(CHROMIUM), *flags, "--dump-dom", (tmp_path / "frame.html").as_uri()]
    dom = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=True).stdout
    width = re.search(r"<title>width (\d+)", dom)
    assert width, dom[:500]
    assert int(width[1]) <= WIDTH
