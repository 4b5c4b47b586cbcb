"""report.html, read without a browser: well-formed, self-contained, escaped, and with the numbers of the result document."""

import base64
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pagedkv.allocators import ALLOCATORS
from pagedkv.sims.budget_parts import PARTS
from pagedkv.sims.cli import main
from pagedkv.sims.comparison import advantages, comparison
from pagedkv.sims.config import LoadConfig, MeasurementConfig, ServingConfig, SimulationConfig
from pagedkv.sims.error_interval import calibration_lines
from pagedkv.sims.glossary import GLOSSARY
from pagedkv.sims.recording import KV_KINDS
from pagedkv.sims.records import Outcome
from pagedkv.sims.report import html
from pagedkv.sims.results import Results, simulate
from pagedkv.sims.run_texts import run_facts
from pagedkv.sims.scenario import resolve

SECTIONS = ["verdict", "memory", "kv", "map", "occupancy", "latency", "slowest", "comparison", "assumptions", "glossary"]
VOID = {"meta", "br", "input"}
LOADS = {"src", "srcset", "data", "action", "poster", "background", "xlink:href", "ping", "formaction"}


class Page(HTMLParser):
    """The elements of a page; fails where one is not closed in its turn."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.ids: list[str] = []
        self.texts: dict[str, str] = {}
        """By id of the innermost enclosing element that has one: its text."""
        self.rows: dict[str, list[list[str]]] = {}
        """By id of a section: the cells of its table rows."""
        self._inside: list[str] = [""]
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in VOID:
            return
        self.open.append(tag)
        anchor = dict(attrs).get("id")
        if anchor:
            self.ids.append(anchor)
        self._inside.append(anchor or self._inside[-1])
        if tag == "tr":
            self.rows.setdefault(self._inside[-1], []).append([])
        elif tag in ("td", "th"):
            self.rows[self._inside[-1]][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self._inside.pop()

    def handle_data(self, data: str) -> None:
        where = self._inside[-1]
        self.texts[where] = self.texts.get(where, "") + data
        if {"td", "th"} & set(self.open):
            self.rows[where][-1][-1] += data


def simulated(load: LoadConfig, measurement: dict[str, Any], **serving: Any) -> Results:
    small: dict[str, Any] = {"hardware": "rtx-4090", "model": "qwen2.5-0.5b", "max_model_len": 2048} | serving
    window: dict[str, Any] = {"duration": "20s", "warmup": "4s", "allocator": ("paged", "contiguous-max")} | measurement
    return simulate(resolve(SimulationConfig(load=load, serving=ServingConfig(**small), measurement=MeasurementConfig(**window))))


FIXED: dict[str, Any] = {"random_input_len": 900, "random_output_len": 300}
BUSY = LoadConfig(request_rate=20.0, random_range_ratio=0.5, **FIXED)
LONG = "prompt_tokens,output_tokens\n9000,10\n"


@pytest.fixture(scope="module")
def busy() -> Results:
    """Requests wait and are preempted; two goals."""
    return simulated(BUSY, {"goodput": ("ttft:500", "e2el:9000")}, num_gpu_blocks_override=600)


@pytest.fixture(scope="module")
def text(busy: Results) -> str:
    return html(busy)


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


def spec(text: str, name: str) -> dict[str, Any]:
    """Return what the browser gets of a picture: data, layout, perhaps frames."""
    script = text.partition(f'<script type="application/json" id="figure-{name}-data">')[2].partition("</script>")[0]
    found: dict[str, Any] = json.loads(script)
    return found


def traces(text: str, name: str) -> list[dict[str, Any]]:
    """Return the traces of a picture."""
    found: list[dict[str, Any]] = spec(text, name)["data"]
    return found


def numbers(column: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return the numbers of a trace: a list, or plotly's packed array."""
    if isinstance(column, dict):
        return np.frombuffer(base64.b64decode(column["bdata"]), np.dtype(column["dtype"])).astype(float)
    return np.asarray(column, float)


def drawn(page: Page) -> list[str]:
    """Return the pictures of a page."""
    return [attributes["id"] or "" for _, attributes in page.tags if "data-figure" in attributes]


PICTURES = [
    "budget",
    "kinds",
    "map-paged",
    "map-contiguous-max",
    "requests",
    "latency-ttft",
    "latency-tpot",
    "latency-e2el",
    "slowest",
]


# --- the page -------------------------------------------------------------------------------------------------------


def test_every_section_is_there_once(page: Page) -> None:
    assert [attributes["id"] for tag, attributes in page.tags if tag == "section"] == SECTIONS
    assert len(set(page.ids)) == len(page.ids)
    assert drawn(page) == [f"figure-{name}" for name in PICTURES]
    buttons = [attributes["data-copy"] for tag, attributes in page.tags if tag == "button" and "data-copy" in attributes]
    assert set(buttons) <= set(page.ids)
    assert [anchor for anchor in page.ids if anchor.startswith("word-")] == [f"word-{name}" for name in GLOSSARY]


def test_nothing_is_loaded_from_anywhere(text: str, page: Page) -> None:
    assert {tag for tag, _ in page.tags} & {"link", "img", "iframe", "object", "embed", "base", "form"} == set()
    targets = {attributes["href"] for tag, attributes in page.tags if "href" in attributes and tag == "a"}
    assert all(target and target.startswith("#") and target[1:] in page.ids for target in targets)
    assert not [tag for tag, attributes in page.tags if "href" in attributes and tag != "a"]
    assert [(tag, attributes) for tag, attributes in page.tags if LOADS & attributes.keys()] == []
    style = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    assert not any(word in rules for rules in style for word in ("url(", "@import"))
    (policy,) = [a["content"] or "" for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    directives = dict(each.split(maxsplit=1) for each in policy.split(";"))
    assert directives["default-src"] == "'none'"
    assert not re.search(r"https?:|\*|'self'|unsafe-eval", policy)
    head = [tag for tag, _ in page.tags]
    assert head.index("meta") < head.index("script")  # a policy counts for what follows it
    assert page.tags[[a.get("content") == policy for _, a in page.tags].index(True)][0] == "meta"


def test_one_file_of_reasonable_size() -> None:
    load = LoadConfig(request_rate=1.0, random_input_len=900, random_output_len=1)  # a picture has as many points after a day
    tier = {"offload_size": "1GiB", "offload_bandwidth": "25GB/s"}
    results = simulated(load, {"allocator": ALLOCATORS.names(), "duration": "1500s", "repeats": 2}, **tier)
    text = html(results)
    assert len(text.encode()) < 8e6
    assert min(numbers(trace["x"]).size for trace in traces(text, "requests")) > 700
    assert numbers(traces(text, "latency-ttft")[0]["x"]).size == 400


def test_the_same_seed_gives_the_same_bytes(busy: Results, text: str) -> None:
    assert html(simulate(busy.scenario)) == text
    other = replace(busy.scenario.config, measurement=replace(busy.scenario.config.measurement, seed=1))
    assert html(simulate(resolve(other))) != text


# --- its numbers ----------------------------------------------------------------------------------------------------


def test_tables_and_sentences_say_what_the_document_says(busy: Results, page: Page) -> None:
    document = busy.document()
    assert page.rows["comparison"][0][1:] == [result["allocator"] for result in document["results"]]
    assert page.rows["comparison"][1:] == [[row.label, *row.values] for row in comparison(document)]
    text = page.texts["verdict"]
    first = document["results"][0]["verdict"]
    assert first["text"].startswith(page.texts["verdict-title"])
    for part in (*(result["verdict"]["text"] for result in document["results"]), *advantages(document)):
        assert part in text
    assert page.texts["next-run"] == first["next_command"]
    budget = document["budget"]
    assert f"{budget['num_blocks']:,} blocks of {budget['block_size']} tokens" in page.texts["memory"]
    assert run_facts(busy) in text
    log = busy.by_allocator["paged"].runs[0].measured
    assert f"prompts of {log.prompt_tokens.mean():,.0f} tokens and ask for {log.output_tokens.mean():,.0f}" in text
    assert f"a factor of {document['calibration']['decode_factor']:.2f} in decoding" in text
    assert "contiguous-max would hold" in page.texts["memory"]
    for tag in ("spec", "measured", "estimated"):
        assert tag in {row[2] for row in page.rows["assumptions"][1:]}
    for line in calibration_lines(document):
        assert line in page.texts["assumptions"]
    for name, value in document["config"].items():
        assert value is None or f"{name}=" in page.texts["assumptions"]


def test_the_budget_is_drawn_end_to_end(busy: Results, text: str) -> None:
    (bars,) = traces(text, "budget")
    budget = busy.document()["budget"]
    lengths, starts = numbers(bars["x"]) * 2**30, numbers(bars["base"]) * 2**30
    np.testing.assert_allclose(lengths, [*(budget[part] for part in PARTS), budget["visible"]], rtol=1e-6)
    np.testing.assert_allclose(starts[1:-1], (starts + lengths)[:-2], atol=1024)
    assert (starts[0], starts[-1]) == (0, 0)
    assert bars["text"] == [f"{length / 2**30:,.2f} GiB" for length in lengths]


def test_kinds_are_stacked_to_the_whole_pool(busy: Results, text: str) -> None:
    areas = traces(text, "kinds")
    for i, result in enumerate(busy.document()["results"]):
        mine = [area for area in areas if area.get("yaxis", "y") == ("y" if i == 0 else f"y{i + 1}")]
        assert [area["name"] for area in mine] == [kind for kind in KV_KINDS if kind != "state" and (kind != "cached" or i == 0)]
        shares = {area["name"]: numbers(area["y"]) for area in mine}
        np.testing.assert_allclose(sum(shares.values()), 100, atol=0.01)
        measured = numbers(mine[0]["x"]) > busy.scenario.warmup_s  # bins of a second, all of the same weight
        for kind, share in shares.items():
            assert share[measured].mean() / 100 == pytest.approx(result["kv"][kind], abs=0.001)


def test_occupancy_and_preemptions_are_those_of_the_document(busy: Results, text: str) -> None:
    lines = traces(text, "requests")
    for result in busy.document()["results"]:
        running, waiting = (line for line in lines if line["name"] == result["allocator"])
        measured = numbers(running["x"]) > busy.scenario.warmup_s
        assert numbers(running["y"])[measured].mean() == pytest.approx(result["running_mean"], rel=0.001)
        assert numbers(waiting["y"])[measured].mean() == pytest.approx(result["waiting_mean"], rel=0.001)
        crosses = [line for line in lines if line["name"] == f"{result['allocator']}: preemptions"]
        assert bool(crosses) == (result["num_preemptions"] > 0) == (result["allocator"] == "paged")
        for cross in crosses:
            counted = numbers(cross["customdata"])[numbers(cross["x"]) > busy.scenario.warmup_s]
            assert counted.sum() == pytest.approx(result["num_preemptions"], abs=numbers(cross["customdata"]).max())


def test_distributions_pass_through_the_percentiles(busy: Results, text: str) -> None:
    for field, name in (("ttft_s", "ttft"), ("tpot_s", "tpot"), ("e2e_s", "e2el")):
        curves = traces(text, f"latency-{name}")
        for curve, result in zip(curves, busy.document()["results"], strict=True):
            assert curve["name"] == result["allocator"]
            x, y = numbers(curve["x"]), numbers(curve["y"])
            assert (np.diff(x) >= 0).all()
            assert (y[0], y[-1]) == (0, 100)
            for percent in (50, 90):
                assert np.interp(percent, y, x) == pytest.approx(result[field][f"p{percent}"], rel=0.01)
    assert ("goal 0.5 s" in text, "goal 9 s" in text) == (True, True)


# --- runs in which something is missing -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def too_long(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("lengths") / "long.csv"
    file.write_text(LONG)
    return str(file)


RARE: dict[str, tuple[LoadConfig, dict[str, Any], dict[str, Any]]] = {
    "no goals, nobody waits": (LoadConfig(users=2, **FIXED), {}, {}),
    "nothing finished": (
        LoadConfig(request_rate=9.0, random_input_len=1000, random_output_len=900),
        {"duration": "1s", "warmup": "0"},
        {},
    ),
    "no request": (LoadConfig(users=1, think_time="9h", **FIXED), {}, {}),
    "rejected only": (LoadConfig(request_rate=3.0, lengths="TOO LONG"), {"goodput": ("ttft:100",)}, {}),
    "repeats": (BUSY, {"repeats": 3, "goodput": ("tpot:50",)}, {"num_gpu_blocks_override": 600}),
    "one token": (
        LoadConfig(request_rate=3.0, num_prompts=9, random_input_len=9, random_output_len=1),
        {"duration": None, "warmup": None},
        {},
    ),
    "all at once": (LoadConfig(users=9, think_time="0", **FIXED), {"duration": "500ms", "warmup": "0"}, {}),
    "state": (LoadConfig(users=3, **FIXED), {"allocator": ("contiguous-max",)}, {"hardware": "dgx-spark", "model": "qwen3.5-27b"}),
}


@pytest.mark.parametrize("name", RARE)
def test_a_page_is_whole_whatever_is_missing(name: str, too_long: str) -> None:
    load, measurement, serving = RARE[name]
    results = simulated(replace(load, lengths=too_long) if load.lengths else load, measurement, **serving)
    document, text = results.document(), html(results)
    page = Page(text)
    assert [attributes["id"] for tag, attributes in page.tags if tag == "section" and attributes["id"] != "timeline"] == SECTIONS
    assert page.rows["comparison"][1:] == [[row.label, *row.values] for row in comparison(document)]
    assert not re.search(r"\b(nan|None|inf)\b", " ".join(cell for row in page.rows["comparison"] for cell in row))
    first = document["results"][0]
    assert ("goal " in text.partition('id="latency"')[2].partition('id="comparison"')[0]) == (
        "goodput" in measurement and first["num_rejected"] == 0
    )
    match name:
        case "no goals, nobody waits":
            assert first["kv_when_waiting"] is None
            assert "while requests wait" not in page.texts["comparison"]
            assert "goodput" not in page.texts["comparison"]
        case "nothing finished":
            assert first["num_finished"] == 0 < first["num_injected"]
        case "no request":
            assert first["num_injected"] == 0
            assert "Time to first token: No request was accepted" in page.texts["latency"]
            assert "none to show" in page.texts["slowest"]
        case "rejected only":
            assert first["num_rejected"] == first["num_injected"] > 0
            assert first["verdict"]["status"] == "rejecting"
        case "repeats":
            assert "±" in page.texts["comparison"]
        case "one token":
            assert first["tpot_s"] is None
            assert "figure-latency-tpot" not in drawn(page)
            assert "No request got a second token" in page.texts["latency"]
        case "state":
            assert "state" in {trace["name"] for trace in traces(text, "kinds")}


# --- what a user chose is text --------------------------------------------------------------------------------------

EVIL = "</title><script>alert(1)</script>&amp;\"'"
MACHINE = f"""
memory_kind = "discrete"
visible = "47 GiB"
memory_bandwidth = {{ value = "960 GB/s", tag = "spec", source = "<b>a 'datasheet'</b>" }}
spec_flops.bf16 = "182 TFLOPS"
title = {json.dumps(EVIL)}
"""


def test_names_are_text_and_never_markup(tmp_path: Path, shared_data: Path, page: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = tmp_path / "<img src=x onerror=alert(2)> & co"
    model.mkdir()
    (model / "config.json").write_text((shared_data / "hf_configs" / "Qwen--Qwen3-8B_config.json").read_text())
    (tmp_path / "m.toml").write_text(MACHINE)
    trace = tmp_path / "a: b, <i>c.csv"
    trace.write_text("arrival_s,input_tokens,output_tokens\n0,90,9\n0.4,900,3\n")
    main(["--trace", str(trace), "--hardware", "m.toml", "--model", str(model), "--max-model-len", "2048", "--report", "r.html"])
    text = (tmp_path / "r.html").read_text("utf-8")
    evil = Page(text)
    kinds = {tag for tag, _ in evil.tags}
    assert kinds == {tag for tag, _ in page.tags}
    assert sum(tag == "script" for tag, _ in evil.tags) == sum(tag == "script" for tag, _ in page.tags)
    assert not any(attribute.startswith("on") for _, attributes in evil.tags for attribute in attributes)
    assert f"the 2 requests of {trace.name} fit\n" in evil.texts["verdict-title"] + "\n"
    assert EVIL in evil.texts["verdict"]
    assert f"{model.name}, bf16 weights" in evil.texts["verdict"]
    assert str(model) in evil.texts["this-run"]
    assert "<b>a 'datasheet'</b>" in {cell for row in evil.rows["assumptions"] for cell in row}


# --- several of something -------------------------------------------------------------------------------------------


def test_replicas_have_a_table_and_the_time_when_one_is_down_is_shaded() -> None:
    load = LoadConfig(users=20, think_time="100ms", **FIXED)
    results = simulated(load, {"allocator": ("paged",)}, replicas=2, fault=("9s:5s:1",))
    document, text = results.document(), html(results)
    page = Page(text)
    assert [attributes["id"] for tag, attributes in page.tags if tag == "section"] == [*SECTIONS[:7], "parts", *SECTIONS[7:]]
    rows = page.rows["parts"]
    assert [row[0] for row in rows] == ["replica", "0", "1"]
    assert [int(row[2]) for row in rows[1:]] == [row["num_failed"] for row in document["results"][0]["replicas"]]
    for name in ("kinds", "requests"):
        bands = [shape for shape in spec(text, name)["layout"]["shapes"] if shape["type"] == "rect"]
        assert {(band["x0"], band["x1"]) for band in bands} == {(9.0, 14.0)}
    assert "a replica is down" in page.texts["occupancy"]
    assert "this is the first one's memory" in page.texts["map"]
    assert f"Not among them: {document['results'][0]['num_failed']} that failed" in page.texts["slowest"]


def test_classes_of_users_have_a_table() -> None:
    results = simulated(LoadConfig(users=20, workload="mixed-office"), {"allocator": ("paged",)}, max_model_len=32768)
    page = Page(html(results))
    classes = results.document()["results"][0]["classes"]
    assert [row[:2] for row in page.rows["parts"][1:]] == [[each["name"], f"{each['num_injected']:,}"] for each in classes]


# --- the slowest ----------------------------------------------------------------------------------------------------


def test_the_chart_of_the_slowest_is_their_times(busy: Results, text: str, page: Page) -> None:
    log, end_s = busy.by_allocator["paged"].runs[0].log, busy.by_allocator["paged"].runs[0].end_s
    rows = page.rows["slowest"][1:]
    assert len(rows) == 20
    bars: dict[str, list[tuple[float, float]]] = {}
    for trace in traces(text, "slowest"):
        if trace["type"] == "bar":
            for name, start_s, seconds in zip(trace["y"], numbers(trace["base"]), numbers(trace["x"]), strict=True):
                bars.setdefault(name, []).append((start_s, start_s + seconds))
    assert set(bars) == {row[0] for row in rows}
    for row in rows:
        entry, parts = int(row[0].removeprefix("#")), sorted(bars[row[0]])
        last_s = log.last_token_s[entry] if log.outcome[entry] == Outcome.FINISHED else end_s
        assert parts[0][0] == pytest.approx(log.arrival_s[entry], rel=1e-4)
        assert max(stop_s for _, stop_s in parts) == pytest.approx(last_s, rel=1e-4)
        for (_, stop_s), (start_s, _) in zip(parts, parts[1:], strict=False):
            assert start_s == pytest.approx(stop_s, abs=0.005)
        assert float(row[3].removeprefix("≥ ")) == pytest.approx(last_s - log.arrival_s[entry], abs=0.06)
        assert int(row[8]) == log.num_preemptions[entry]
    (unfinished,) = [trace for trace in traces(text, "slowest") if trace["type"] == "scatter"]
    assert set(unfinished["y"]) == {row[0] for row in rows if row[3].startswith("≥")}
