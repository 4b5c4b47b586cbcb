"""report.html in a real browser: it draws everything, asks for nothing, complains about nothing."""

import json
import re
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path

import pytest

from pagedkv.sims.cli import main
from pagedkv.sims.comparison import comparison

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
QUIET = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--enable-logging=stderr",
]
SECTIONS = ("verdict", "memory", "kv", "map", "occupancy", "latency", "comparison", "assumptions", "glossary")

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result folder of a small run that preempts, with goals, from a lengths file whose name is HTML."""
    where = tmp_path_factory.mktemp("report")
    lengths = where / "<img src=x onerror=alert(1)>.csv"
    lengths.write_text("prompt_tokens,output_tokens\n" + "300,200\n900,400\n" * 20)
    load = ["--request-rate", "3", "--lengths", str(lengths), "--duration", "60s", "--warmup", "10s"]
    serving = ["--num-gpu-blocks-override", "600", "--max-model-len", "2048", "--watermark", "0"]
    main([*load, *serving, "--goodput", "ttft:2000", "tpot:100", "--out", str(where / "out")])
    return where / "out"


@pytest.fixture(scope="module")
def page(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str, list[str]]:
    """The page after its scripts ran: (DOM, what the browser logged, hosts that a blank page does not ask for)."""
    blank = folder / "blank.html"
    blank.write_text("<!DOCTYPE html><title>blank</title>")
    _, _, of_the_browser = browse(blank, tmp_path_factory.mktemp("blank"))
    dom, log, asked = browse(folder / "report.html", tmp_path_factory.mktemp("profile"))
    return dom, log, sorted(asked - of_the_browser)


def browse(file: Path, profile: Path, *, budget_ms: int = 5000) -> tuple[str, str, set[str]]:
    """Return the DOM, the browser's log, and the hosts that were asked for."""
    assert CHROMIUM is not None
    net_log = profile / "net.json"
    options = [*QUIET, f"--virtual-time-budget={budget_ms}", f"--user-data-dir={profile}", f"--log-net-log={net_log}", "--dump-dom"]
    done = subprocess.run([CHROMIUM, *options, file.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, done.stderr, set(re.findall(r'"url":"https?://([^/"]+)', net_log.read_text(errors="replace")))


def test_every_section_is_there_and_every_figure_is_drawn(page: tuple[str, str, list[str]]) -> None:
    dom = page[0]
    assert all(f'<section id="{section}"' in dom for section in SECTIONS)
    assert dom.count('class="main-svg"') >= 6
    assert "preemptions" in dom


def test_no_console_error_and_no_request(page: tuple[str, str, list[str]]) -> None:
    _, log, asked = page
    assert not [line for line in log.splitlines() if "CONSOLE" in line]  # a request would also break the page's own policy
    assert asked == []


def test_the_page_says_what_summary_json_says(folder: Path, page: tuple[str, str, list[str]]) -> None:
    document = json.loads((folder / "summary.json").read_text())
    table = page[0].partition('<section id="comparison"')[2].partition("</section>")[0]
    rows = [[unescape(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)] for row in re.findall(r"<tr.*?</tr>", table)]
    assert rows[0][1:] == [result["allocator"] for result in document["results"]]
    assert rows[1:] == [[row.label, *row.values] for row in comparison(document)]
    for part in ("weights", "kv_cache", "visible"):
        assert f"{document['budget'][part] / 2**30:,.2f} GiB" in page[0]
    for result in document["results"]:
        assert escape(result["verdict"]["text"], quote=False) in page[0]


def moved(folder: Path, profile: Path, action: str) -> list[str]:
    """Return the number of frames, the one that the memory map shows after `action`, a promise, and what its buttons say."""
    script = f"""<script>
    const map = document.getElementById("figure-map");
    const last = map.layout.sliders[0].steps.length - 1, cells = trace => JSON.stringify(trace.customdata.bdata);
    {action}.then(() => {{
      const frames = map._transitionData._frames.map(frame => cells(frame.data[0]));
      const buttons = [...map.querySelectorAll(".updatemenu-button")].map(button => button.textContent).join("");
      document.body.dataset.map = [frames.length, frames.lastIndexOf(cells(map.data[0])), buttons].join(" ");
    }});
    </script>"""
    page = folder / "moved.html"
    page.write_text((folder / "report.html").read_text(encoding="utf-8").replace("</body>", script + "</body>"), encoding="utf-8")
    dom, log, _ = browse(page, profile, budget_ms=30_000)
    assert not [line for line in log.splitlines() if "CONSOLE" in line]
    found = re.search(r'data-map="(.*?)"', dom)
    assert found is not None
    return found[1].split()


def test_the_slider_of_the_memory_map_shows_its_frames(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """It stands at the first frame and does not run away; its last step shows the last one. The play button is drawn."""
    at_start = moved(folder, tmp_path_factory.mktemp("start"), "Promise.resolve()")
    slid = moved(folder, tmp_path_factory.mktemp("slid"), "Plotly.animate(map, ...map.layout.sliders[0].steps[last].args)")
    assert (at_start[:2], slid[:2]) == (["12", "0"], ["12", "11"])
    assert at_start[2] == "▶❚❚"


def test_names_are_text_and_never_markup(page: tuple[str, str, list[str]]) -> None:
    assert "<img src=x" not in page[0]
    assert "&lt;img src=x onerror=alert(1)&gt;" in page[0]


def test_one_file_of_reasonable_size(folder: Path) -> None:
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert len(text.encode()) < 8e6
    assert not re.search(r'<(script|link|img)[^>]+(src|href)=["\']?http', text)
