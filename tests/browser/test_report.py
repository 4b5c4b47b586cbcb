"""report.html in a real browser: it draws everything, asks for nothing, complains about nothing, and every key works."""

import json
import re
from html import escape, unescape
from pathlib import Path
from typing import Any

import pytest

from pagedkv.sims.comparison import comparison

from .chromium import Browser

WIDTHS = (1280, 400)
SCREENS = [(width, dark) for width in WIDTHS for dark in (False, True)]


def contrast(one: list[float], other: list[float]) -> float:
    """Return the contrast of two colours. Source: WCAG 2.2."""

    def luminance(colour: list[float]) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in colour)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.fixture
def page(chromium: Browser, folder: Path) -> Browser:
    """The report on a light screen, as it is just after opening."""
    chromium.screen(1280)
    chromium.open(folder / "report.html")
    return chromium


def test_every_section_is_there_and_every_figure_that_the_page_has_is_drawn(page: Browser) -> None:
    sections = page.run("[...document.querySelectorAll('section')].map(each => each.id)")
    assert sections[:4] == ["verdict", "memory", "timeline", "kv"]  # the others as in tests/test_report.py, without a timeline
    wanted = page.run("[...document.querySelectorAll('[data-figure]')].map(each => each.id)")
    assert {"figure-budget", "figure-timeline", "figure-slowest"} < {*wanted}  # tests/test_report.py names them all
    drawn = "[...document.querySelectorAll('.js-plotly-plot')].filter(each => each.querySelector('.main-svg')).map(each => each.id)"
    assert page.run(drawn) == wanted
    assert page.run("document.querySelector('#figure-requests').textContent.includes('preemptions')")
    goals = "['ttft', 'tpot'].map(each => document.querySelector('#figure-latency-' + each).textContent.includes('goal'))"
    assert page.run(goals) == [True, True]


@pytest.mark.parametrize(
    ("kind", "width", "dark"),
    [*(("simulate", *screen) for screen in SCREENS), *((kind, *SCREENS[i]) for kind in ("sweep", "max-users") for i in (0, 3))],
)
def test_nothing_is_too_wide_no_console_error_no_request(
    chromium: Browser, pages: dict[str, Path], kind: str, width: int, dark: bool, tmp_path: Path
) -> None:
    chromium.screen(width, dark=dark)
    chromium.open(pages[kind])
    assert chromium.run("document.documentElement.scrollWidth") == width
    assert chromium.complaints() == []
    assert chromium.requests() == []
    # What is wider scrolls inside itself, and pictures are as wide as the page.
    wider = """[...document.querySelectorAll('body *')].filter(each => !each.closest('.scroll, .main-svg, .unseen, .skip, script')
        && each.getBoundingClientRect().right > innerWidth + 1).map(each => each.outerHTML.slice(0, 120))"""
    assert chromium.run(wider) == []
    chromium.picture(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 50_000


@pytest.mark.parametrize("dark", [False, True])
def test_text_contrasts_with_the_page(chromium: Browser, folder: Path, dark: bool) -> None:
    """4.5 and more, as WCAG asks of text; in pictures too, where it lies on the page."""
    chromium.screen(1280, dark=dark)
    chromium.open(folder / "report.html")
    colours: list[list[str]] = chromium.run("""(() => {
        const text = [...document.querySelectorAll('h1, h2, p, a, td, th, code, figcaption, summary, .badge, button')];
        const drawn = [...document.querySelectorAll('.xtick text, .ytick text, .legendtext, .xtitle, .gtitle')];
        return [...new Set([...text.map(each => getComputedStyle(each).color), ...drawn.map(each => getComputedStyle(each).fill)])];
    })()""")
    background = chromium.run("getComputedStyle(document.body).backgroundColor")
    numbers = [[float(part) for part in re.findall(r"[0-9.]+", colour)[:3]] for colour in [background, *colours]]
    assert (sum(numbers[0]) < 100) == dark
    assert len(colours) > 4
    assert [colour for colour, value in zip(colours, numbers[1:], strict=True) if contrast(numbers[0], value) < 4.5] == []


def test_the_page_says_what_summary_json_says(folder: Path, page: Browser) -> None:
    document = json.loads((folder / "summary.json").read_text())
    table = page.run("document.querySelector('#comparison table').outerHTML")
    rows = [
        [unescape(re.sub("<[^>]*>", "", cell)) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row)]
        for row in re.findall(r"<tr.*?</tr>", table)
    ]
    assert rows[0][1:] == [result["allocator"] for result in document["results"]]
    assert rows[1:] == [[row.label, *row.values] for row in comparison(document)]
    bars = page.run("document.querySelector('#figure-budget').textContent")
    for part in ("weights", "kv_cache", "visible"):
        assert f"{document['budget'][part] / 2**30:,.2f} GiB" in bars
    verdict = page.run("document.querySelector('#verdict').innerHTML")
    for result in document["results"]:
        assert escape(result["verdict"]["text"], quote=False) in verdict


# --- for everybody --------------------------------------------------------------------------------------------------


def tree(page: Browser) -> list[dict[str, Any]]:
    """Return what a screen reader is told, without what it skips."""
    nodes = page.ask("Accessibility.getFullAXTree")["nodes"]
    return [
        {"role": node["role"]["value"], "name": node.get("name", {}).get("value", ""), "properties": node.get("properties", [])}
        for node in nodes
        if not node["ignored"]
    ]


def test_every_figure_has_a_text_with_its_numbers(folder: Path, page: Browser) -> None:
    document = json.loads((folder / "summary.json").read_text())
    texts: dict[str, str] = page.run("""Object.fromEntries([...document.querySelectorAll('[data-figure]')].map(each =>
        [each.id, each.parentElement.querySelector('.words p').textContent]))""")
    told = [node["name"] for node in tree(page) if node["role"] in ("image", "img") and node["name"]]
    assert told == list(texts.values())
    paged = document["results"][0]
    assert f"KV cache {document['budget']['kv_cache'] / 2**30:,.2f} GiB" in texts["figure-budget"]
    assert f"tokens {paged['kv']['tokens']:.1%}" in texts["figure-kinds"]
    assert f"{paged['num_preemptions']:,} in the measured time" in texts["figure-requests"]
    assert f"{paged['ttft_s']['p50']:.3g} s" in texts["figure-latency-ttft"]
    assert all(re.search("[0-9]", text) and len(text) > 40 for text in texts.values())


def test_headings_go_down_one_level_at_a_time_and_name_the_sections(page: Browser) -> None:
    levels: list[int] = page.run("[...document.querySelectorAll('h1, h2, h3, h4')].map(each => Number(each.tagName[1]))")
    assert levels.count(1) == 1 == levels[0]
    assert all(later - earlier <= 1 for earlier, later in zip(levels, levels[1:], strict=False))
    regions = [node["name"] for node in tree(page) if node["role"] == "region"]
    assert len(set(regions)) == len(regions) >= page.run("document.querySelectorAll('section').length") > 9
    assert all(regions)


def focused(page: Browser) -> str:
    return str(page.run("document.activeElement.outerHTML.slice(0, 160)"))


def test_the_command_is_copied_with_the_keyboard_alone_and_it_is_said(page: Browser) -> None:
    page.ask("Page.bringToFront")
    for _ in range(6):
        page.press("Tab", 9)
        if "data-copy" in focused(page):
            break
    assert 'data-copy="this-run"' in focused(page)
    assert page.run("getComputedStyle(document.activeElement).outlineStyle") != "none"
    page.run("navigator.clipboard.writeText = text => { window.copied = text; return Promise.resolve(); }")
    page.press("Enter", 13, "\r")
    assert page.wait("document.getElementById('said').textContent") == "The command is copied."
    assert page.run("window.copied") == page.run("document.getElementById('this-run').textContent")
    assert page.run("document.getElementById('said').getAttribute('aria-live')") == "polite"
    assert 'data-copy="this-run"' in focused(page)


def test_if_it_cannot_be_copied_the_command_is_selected(page: Browser) -> None:
    page.run("document.execCommand = () => false; navigator.clipboard.writeText = () => Promise.reject(new Error('no'))")
    page.run("document.querySelector('button[data-copy]').click()")
    assert "could not be copied" in page.wait("document.getElementById('said').textContent")
    assert page.run("getSelection().toString()") == page.run("document.getElementById('this-run').textContent")


SHOWN = """['figure-map-paged', 'figure-map-contiguous-max'].map(id => {
    const map = document.getElementById(id), cells = trace => JSON.stringify(trace.customdata.bdata);
    return map._transitionData._frames.map(frame => cells(frame.data[0])).lastIndexOf(cells(map.data[0]));
})"""
"""Which frame each memory map shows."""


def test_the_slider_moves_both_maps_with_arrow_keys_and_says_where_it_is(page: Browser) -> None:
    labels = json.loads(page.run("document.querySelector('.player').dataset.labels"))
    first = int(page.run("document.querySelector('.player input').value"))
    assert page.run(SHOWN) == [first, first]
    page.run("document.querySelector('.player input').focus()")
    page.press("Home", 36)
    page.wait(f"JSON.stringify({SHOWN}) === '[0,0]'")
    for place in (1, 2):
        page.press("ArrowRight", 39)
        page.wait(f"JSON.stringify({SHOWN}) === '[{place},{place}]'")
        assert page.run("document.querySelector('.player input').getAttribute('aria-valuetext')") == labels[place]
    page.press("End", 35)
    page.wait(f"JSON.stringify({SHOWN}) === '[{len(labels) - 1},{len(labels) - 1}]'")
    assert page.run("document.querySelector('.player output').textContent") == labels[-1]


def test_the_play_button_plays_to_the_end_and_can_be_paused(page: Browser) -> None:
    page.run("document.querySelector('.player input').focus()")
    page.press("Home", 36)
    page.run("document.querySelector('.player button').focus()")
    page.press("Enter", 13, "\r")
    assert page.run("document.querySelector('.player button').getAttribute('aria-pressed')") == "true"
    page.wait(f"{SHOWN}[0] >= 2")
    page.press("Enter", 13, "\r")
    assert page.run("document.querySelector('.player button').textContent") == "Play"
    stopped = page.run(SHOWN)
    page.run("new Promise(done => setTimeout(done, 900))")
    assert page.run(SHOWN) == stopped
    page.press("Enter", 13, "\r")
    page.wait(f"{SHOWN}[1] === 11 && document.querySelector('.player button').textContent === 'Play'")


# --- dark, light, paper ---------------------------------------------------------------------------------------------

AXIS = "getComputedStyle(document.querySelector('#figure-requests .ytick text')).fill"


def test_figures_follow_the_screen_from_light_to_dark_and_keep_their_frame(page: Browser) -> None:
    slider = "document.querySelector('.player input')"
    page.run(f"{slider}.value = 5; {slider}.dispatchEvent(new Event('input'))")
    page.wait(f"{SHOWN}[0] === 5")
    before = page.run(AXIS)
    page.screen(1280, dark=True)
    page.wait(f"{AXIS} !== '{before}'")
    page.wait(f"JSON.stringify({SHOWN}) === '[5,5]'")
    page.screen(1280)
    page.wait(f"{AXIS} === '{before}'")


def test_paper_is_light_and_nothing_is_cut_off(chromium: Browser, folder: Path, tmp_path: Path) -> None:
    chromium.screen(1280, dark=True)
    chromium.open(folder / "report.html")
    chromium.run("""addEventListener('beforeprint', () => { window.printed = [
        getComputedStyle(document.querySelector('#figure-requests .ytick text')).fill,
        Math.max(...[...document.querySelectorAll('[data-figure]')].map(each => each._fullLayout.width)),
        [...document.querySelectorAll('.side-by-side [data-figure]')].reduce((sum, each) => sum + each._fullLayout.width, 0)] })""")
    chromium.pdf(tmp_path / "page.pdf")
    assert chromium.run("window.printed") == ["rgb(27, 31, 36)", 680, 664]
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
    chromium.wait(f"{AXIS} === 'rgb(230, 237, 243)'")


# --- the file -------------------------------------------------------------------------------------------------------


def test_names_are_text_and_never_markup(page: Browser) -> None:
    dom = page.run("document.documentElement.outerHTML")
    assert "<img src=x" not in dom
    assert "&lt;img src=x onerror=alert(1)&gt;" in dom


def test_one_file_of_reasonable_size_that_opens_at_once(page: Browser, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Times are told, not judged: they are those of this machine."""
    size = (folder / "report.html").stat().st_size
    assert size < 8e6
    times = page.run("""[performance.getEntriesByType('paint').find(each => each.name === 'first-contentful-paint').startTime,
        performance.timing.loadEventEnd - performance.timing.navigationStart, Number(document.body.dataset.drawn)]""")
    told = dict(zip(("text shown, ms", "loaded, ms", "all figures drawn, ms"), map(round, times), strict=True))
    for name, value in {"size, bytes": size, **told}.items():
        with capsys.disabled():
            print(f"report.html {name}: {value:,}")  # noqa: T201
    assert times[0] <= times[2]
