"""The built site: every link leads somewhere, every page has a title, a browser neither complains nor asks for anything."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import cli_pages
import map_figure
import notebook_pages
import pytest
from net_log import CHROMIUM, browse, complaints

MOST_BYTES = 30e6
NARROW = 400
TELL = """<script>
const count = what => document.querySelectorAll(what).length, since = Date.now();
const told = setInterval(() => {
  const drawn = count(".plotly-target .main-svg"), figures = count(".plotly-figure"), found = count("ul.search li");
  const ready = document.readyState === "complete" && drawn >= figures && (found || !location.search);
  if (!ready && Date.now() < since + 20000) return;
  clearInterval(told);
  parent.postMessage([document.documentElement.scrollWidth, figures, drawn, found], "*");
}, 50);
</script></body>"""
DRIVER = """<!DOCTYPE html><title>none</title><body><iframe width="%d" height="800" style="border:0"></iframe><script>
const pages = %s, seen = {}, frame = document.querySelector("iframe");
let at = -1;
function next() { at += 1; if (at < pages.length) frame.src = pages[at]; else document.title = JSON.stringify(seen); }
window.addEventListener("message", event => { seen[pages[at]] = event.data; next(); });
next();
</script>"""

SLIDE = """<script>
const started = setInterval(() => {
  const map = document.querySelector(".plotly-target"), cells = trace => trace.customdata.bdata;
  if (!map || !map._transitionData || !map._transitionData._frames.length || !map.querySelector(".updatemenu-button")) return;
  clearInterval(started);
  const frames = map._transitionData._frames.map(frame => cells(frame.data[0]));
  const before = frames.indexOf(cells(map.data[0]));
  Plotly.animate(map, ...map.layout.sliders[0].steps.at(-1).args).then(() => {
    const buttons = [...map.querySelectorAll(".updatemenu-button")].map(button => button.textContent).join("");
    const shown = map.parentElement.dataset.shown;
    document.body.dataset.moved = [shown, frames.length, before, frames.lastIndexOf(cells(map.data[0])), buttons].join(" ");
  });
}, 50);
</script>"""


class Page(HTMLParser):
    """What a page links to and loads, and what can be linked to in it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors = {""}
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if "id" in given:
            self.anchors.add(given["id"])
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        self.loads += [given[name] for name in ("src", "href") if name in given and tag != "a"]


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path.read_text("utf-8")) for path in sorted(site.rglob("*.html"))}


def test_every_link_leads_to_a_page_and_a_place_in_it(pages: dict[Path, Page]) -> None:
    broken = []
    for path, page in pages.items():
        for link in page.links:
            target, _, anchor = link.partition("#")
            if re.match(r"[a-z]+:", link):
                continue
            there = (path.parent / unquote(target)).resolve() if target else path
            if not there.is_file() or (there in pages and unquote(anchor) not in pages[there].anchors):
                broken.append(f"{path.name}: {link}")
    assert not broken


def test_nothing_is_loaded_from_elsewhere(site: Path, pages: dict[Path, Page]) -> None:
    for path, page in pages.items():
        for load in page.loads:
            assert not re.match(r"[a-z]+:|//", load) or load.startswith("data:"), f"{path.name}: {load}"
            assert (path.parent / unquote(load.partition("?")[0].partition("#")[0])).exists() or load.startswith("data:"), load
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:|//)|@import", style.read_text("utf-8")), style.name


def test_every_page_has_a_title_of_its_own(pages: dict[Path, Page]) -> None:
    titles = [re.search(r"<title>(.+?)</title>", path.read_text("utf-8"), re.S) for path in pages]
    assert all(titles)
    assert len({title[1] for title in titles if title}) == len(pages)


def test_every_command_has_a_page(site: Path) -> None:
    for name in (cli_pages.ITSELF, *cli_pages.commands()):
        assert (site / "reference" / "cli" / f"{name}.html").is_file()


def test_the_library_is_there_without_torch(site: Path) -> None:
    runtime, kernels = ((site / "reference" / "api" / f"{name}.html").read_text("utf-8") for name in ("runtime", "kernels"))
    assert 'id="pagedkv.runtime.PagedCache"' in runtime
    assert 'id="pagedkv.kernels.paged_attention"' in kernels


def test_the_search_finds_words_without_a_server(site: Path) -> None:
    index = (site / "searchindex.js").read_text("utf-8")
    assert index.startswith("Search.setIndex(")
    assert "preempt" in index


def test_plotly_is_there_once(site: Path) -> None:
    assert [path.name for path in site.rglob("*.js") if path.stat().st_size > 3e6] == ["plotly.min.js"]
    assert sum(path.stat().st_size for path in site.rglob("*") if path.is_file()) < MOST_BYTES


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_what_a_page_asks_for_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "asks.html"
    page.write_text(
        '<!DOCTYPE html><title>asks</title><img src="https://nowhere.invalid/a.png"><script>console.error("oh")</script>'
    )
    _, log, asked = browse(page, tmp_path / "profile")
    assert asked == ["https://nowhere.invalid/a.png"]
    assert len(complaints(log)) == 1


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_in_a_browser_pages_fit_a_telephone_draw_their_figures_and_ask_for_nothing(
    site: Path, pages: dict[Path, Page], tmp_path: Path
) -> None:
    copy = tmp_path / "site"
    shutil.copytree(site, copy)
    names = [path.relative_to(site).as_posix() for path in pages if path.relative_to(site).parts[0] not in ("source", "_modules")]
    for name in names:
        text = (copy / name).read_text("utf-8")
        (copy / name).write_text(text.replace("</body>", TELL), "utf-8")
    search = "search.html?q=preempted"
    (copy / "driver.html").write_text(DRIVER % (NARROW, json.dumps([*names, search])), "utf-8")
    dom, log, asked = browse(copy / "driver.html", tmp_path / "profile", budget_ms=300_000, timeout_s=280)
    assert not complaints(log)
    assert asked == []
    title = re.search(r"<title>(\{.*?\})</title>", dom)
    assert title is not None, dom[:200]
    seen = json.loads(title[1])
    assert set(seen) == {*names, search}
    assert {name: width for name, (width, *_) in seen.items() if width > NARROW} == {}
    assert seen[search][-1] > 3, "what is searched is found, without a server"
    drawn = {name: (figures, svgs) for name, (_, figures, svgs, _) in seen.items() if figures}
    assert all(svgs >= figures for figures, svgs in drawn.values())
    assert {"memory-map.html", *(f"notebooks/{Path(path).stem}.html" for path in notebook_pages.notebooks())} == set(drawn)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_memory_map_starts_at_its_first_frame_and_slides_to_its_last(theme: str, site: Path, tmp_path: Path) -> None:
    shutil.copytree(site / "_static", tmp_path / "_static")
    page = tmp_path / "memory-map.html"
    text = (site / "memory-map.html").read_text("utf-8")
    chosen = 'localStorage.getItem("theme") || "auto"'
    assert chosen in text
    page.write_text(text.replace(chosen, f'"{theme}"').replace("</body>", SLIDE + "</body>"), "utf-8")
    dom, log, _ = browse(page, tmp_path / "profile", budget_ms=30_000)
    assert not complaints(log)
    moved = re.search(r'data-moved="(.*?)"', dom)
    assert moved is not None
    assert moved[1] == f"{theme} {map_figure.NUM_FRAMES} 0 {map_figure.NUM_FRAMES - 1} ▶❚❚"
