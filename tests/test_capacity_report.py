"""The reports of searches and sweeps: their curves are their answers, their commands ask for the same again."""

import json
import math
import re
import shlex
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from pagedkv.sims.capacity_answer import CapacityAnswer, Tried
from pagedkv.sims.cli import main
from pagedkv.sims.cli_report import further_command, question_command
from pagedkv.sims.config import MeasurementConfig, SimulationConfig
from pagedkv.sims.reporting.capacity_curve import Curve, CurvePoint, capacity_curve, curve_words
from pagedkv.sims.reporting.capacity_section import Capacity, capacity_head
from pagedkv.sims.sweep import run_sweep
from pagedkv.sims.sweep_grid import parse_grid
from pagedkv.sims.sweep_plot import html
from pagedkv.sims.sweep_words import sweep_command

FLAGS = (
    "--think-time 1s --random-input-len 400 --random-output-len 60 --random-range-ratio 0.5 --hardware rtx-4090 "
    "--num-gpu-blocks-override 200 --max-model-len 1024 --duration 10s --warmup 2s"
)
WITHOUT_BLOCKS = FLAGS.replace("--num-gpu-blocks-override 200 ", "")
GOALS = "--goodput ttft:400 tpot:40"


def traces(text: str, name: str) -> list[dict[str, Any]]:
    script = text.partition(f'<script type="application/json" id="figure-{name}-data">')[2].partition("</script>")[0]
    found: list[dict[str, Any]] = json.loads(script)["data"]
    return found


def copied(text: str, anchor: str) -> str:
    found = re.search(rf'<code id="{anchor}">(.*?)</code>', text)
    assert found is not None
    return unescape(re.sub("<[^>]*>", "", found[1]))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    """The answer of max-users, and its report."""
    where = tmp_path_factory.mktemp("users")
    main(shlex.split(f"max-users {FLAGS} {GOALS} --attain 0.95 --report {where / 'r.html'} --json {where / 'answer.json'}"))
    return json.loads((where / "answer.json").read_text())["answers"][0], (where / "r.html").read_text("utf-8")


def test_the_curve_is_the_search(found: tuple[dict[str, Any], str]) -> None:
    answer, text = found
    within, rates = traces(text, "capacity")
    assert within["x"] == rates["x"] == [tried["value"] for tried in answer["tried"]]
    assert within["y"] == [100 * tried["attained"] for tried in answer["tried"]]
    assert rates["y"] == [tried["output_tokens_per_s"] for tried in answer["tried"]]
    for symbol, tried in zip(within["marker"]["symbol"], answer["tried"], strict=True):
        assert symbol.startswith("x" if tried["num_preemptions"] else "circle")
        assert symbol.endswith("-open") != tried["fits"]
    head = text.partition("<nav")[0]
    assert f"{answer['value']} users fit" in head
    assert f"preemptions set in at {answer['preemption_from']}" in head
    assert f"at {answer['interval'][1]}: {answer['stops']}".split(",")[0] in unescape(head)
    layout = json.loads(text.partition('id="figure-capacity-data">')[2].partition("</script>")[0])["layout"]
    assert {shape["x0"] for shape in layout["shapes"] if shape["x0"] == shape["x1"]} == {answer["value"], answer["preemption_from"]}
    assert [shape["y0"] for shape in layout["shapes"] if shape["y0"] == shape["y1"]] == [95]


def test_the_rest_is_the_run_at_what_was_found_and_commands_ask_for_both_again(found: tuple[dict[str, Any], str]) -> None:
    answer, text = found
    assert f'<h2 id="verdict-title">{answer["value"]} users fit</h2>' in text
    assert copied(text, "this-run").startswith(f"simulate --users {answer['value']} ")
    assert copied(text, "this-search").startswith("simulate max-users ")
    assert copied(text, "this-search").endswith(" --attain 0.95")
    at = next(tried for tried in answer["tried"] if tried["value"] == answer["value"])
    assert f"{at['output_tokens_per_s']:,.0f}" in text.partition('id="comparison"')[2]


def test_a_search_does_not_propose_what_it_found_not_to_fit(found: tuple[dict[str, Any], str]) -> None:
    """The run at the answer fits, and by itself would propose twice the users, which are known not to fit."""
    answer, text = found
    words = copied(text, "next-run")
    assert answer["remedy"] is None
    assert words == copied(text, "this-search").replace("--goodput", "--repeats 5 --goodput")
    assert "--users" not in words


def test_what_stops_the_next_user_is_proposed_against(tmp_path: Path) -> None:
    few = f"max-users {FLAGS} --max-num-seqs 2 --goodput ttft:1000"
    main(shlex.split(f"{few} --report {tmp_path / 'r.html'} --json {tmp_path / 'a.json'}"))
    answer, text = json.loads((tmp_path / "a.json").read_text())["answers"][0], (tmp_path / "r.html").read_text("utf-8")
    assert (answer["binding"], answer["remedy"]) == ("max_num_seqs", {"max_num_seqs": 4})
    assert copied(text, "next-run") == copied(text, "this-search").replace("--max-num-seqs 2", "--max-num-seqs 4")


def test_without_a_remedy_repeats_are_proposed_and_then_nothing() -> None:
    asked = SimulationConfig(measurement=MeasurementConfig(goodput=("ttft:400",)))
    answer = one_user()
    words = further_command("max-users", asked, answer, attain=0.9)
    assert words == "simulate max-users --repeats 5 --goodput ttft:400 --attain 0.9"
    repeated = SimulationConfig(measurement=MeasurementConfig(repeats=5))
    assert further_command("max-users", repeated, answer, attain=0.99) is None
    helped = replace(answer, remedy={"max_num_seqs": 512})
    assert further_command("max-users", repeated, helped, attain=0.99) == "simulate max-users --max-num-seqs 512 --repeats 5"


def test_max_context_has_one_too(tmp_path: Path) -> None:
    small = "--hardware rtx-4090 --num-gpu-blocks-override 60 --duration 5s --warmup 1s"
    flags = f"--users 2 --random-output-len 60 --think-time 1s {small}"
    main(shlex.split(f"max-context {flags} --report {tmp_path / 'r.html'} --json {tmp_path / 'a.json'}"))
    answer, text = json.loads((tmp_path / "a.json").read_text())["answers"][0], (tmp_path / "r.html").read_text("utf-8")
    assert f"{answer['value']:,} tokens of context fit" in text
    (rates,) = traces(text, "capacity")
    assert rates["x"] == [tried["value"] for tried in answer["tried"] if tried["num_preemptions"] is not None]
    assert f"--random-input-len {answer['prompt_len']}" in copied(text, "this-run")


def test_nothing_fits(tmp_path: Path) -> None:
    main(shlex.split(f"max-users {FLAGS} --goodput ttft:1 --report {tmp_path / 'r.html'} --json {tmp_path / 'a.json'}"))
    text = (tmp_path / "r.html").read_text("utf-8")
    assert "Not even the smallest number of users fits" in text
    assert copied(text, "this-run").startswith("simulate --users 1 ")


def one_user() -> CapacityAnswer:
    tried = Tried(
        value=1, fits=True, status="stable", attained=None, num_preemptions=0, output_tokens_per_s=5.0, ttft_s=1.0, tpot_s=0.1
    )
    return CapacityAnswer(
        allocator="paged",
        value=1,
        criterion="stable",
        interval=(1, None),
        interval_means="the largest that was tried fits",
        calibration_interval=(0, None),
        attained=None,
        binding="bandwidth",
        stops="",
        preemption_from=None,
        preemption_tried=1,
        anomalies=(),
        failing=(),
        tried=(tried,),
    )


def test_one_user_fits_and_nothing_was_tried_that_does_not() -> None:
    head = capacity_head(Capacity(unit="users", answers=[one_user()], attain=0.99, command="simulate max-users"))
    assert ">1 user fits</h1>" in head
    assert "1 users" not in head
    assert "the 1 user that fits" in head
    assert "next limit: memory bandwidth" in head
    assert "0 to more than was tried if all steps" in head


# --- a sweep --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("sweep")
    main(shlex.split(f"sweep {WITHOUT_BLOCKS} {GOALS} --users 2,6,10 --num-gpu-blocks-override 100,200 --workers 1 --out {where}"))
    return where


def test_a_sweep_of_load_draws_its_capacity(swept: Path) -> None:
    document, text = json.loads((swept / "results.json").read_text()), (swept / "sweep.html").read_text("utf-8")
    drawn = {(trace["name"], trace.get("yaxis", "y")): trace for trace in traces(text, "capacity")}
    for blocks in (100, 200):
        runs = [run for run in document["runs"] if run["values"]["num_gpu_blocks_override"] == blocks]
        name = f"num-gpu-blocks-override {blocks}"
        assert drawn[name, "y"]["y"] == [100 * run["result"]["goodput_share"] for run in runs]
        assert drawn[name, "y2"]["y"] == [run["result"]["output_tokens_per_s"] for run in runs]
        assert drawn[name, "y2"]["customdata"] == [run["result"]["num_preemptions"] for run in runs]
    assert "figure-sweep" not in text  # it would be the same again


def test_another_figure_or_another_axis_is_drawn_by_itself(swept: Path, tmp_path: Path) -> None:
    again = copied((swept / "sweep.html").read_text("utf-8"), "this-sweep").replace("FOLDER", str(swept))
    main([*shlex.split(again)[1:], "--workers", "1", "--metric", "ttft_s.p99"])
    assert "figure-sweep" in (swept / "sweep.html").read_text("utf-8")
    sweep = run_sweep(parse_grid(shlex.split(f"{WITHOUT_BLOCKS} --users 2 --num-gpu-blocks-override 100,200")), tmp_path, workers=1)
    assert "figure-capacity" not in html(sweep, "output_tokens_per_s")


@pytest.mark.parametrize(
    "flags",
    [
        f"{FLAGS} --users 2,4 {GOALS}",
        "--users 20 --goodput ttft:2000 tpot:100,ttft:500 tpot:50 --enforce-eager true,false",
        "--request-rate 1,2.5 --burstiness 0.5,2",
        "--users 10 --think-time 5s..20s:5s --model llama-3.1-8b,qwen2.5-7b --allocator paged,contiguous-max",
        "--users 5 --fault 10s:5s,20s:5s --replicas 2",
    ],
)
def test_the_command_of_a_sweep_asks_for_the_same_grid(flags: str) -> None:
    grid = parse_grid(shlex.split(flags))

    class Done:
        def __init__(self) -> None:
            self.grid = grid

    words = shlex.split(sweep_command(Done()))  # type: ignore[arg-type]
    assert words[:2] == ["simulate", "sweep"]
    assert words[-2:] == ["--out", "FOLDER"]
    again = parse_grid(words[2:-2])
    assert again.axes == grid.axes
    assert [point.config for point in again] == [point.config for point in grid]


# --- the curve, by itself -------------------------------------------------------------------------------------------


def point(value: float, *, fits: bool, attained: float | None = None, preemptions: int = 0) -> CurvePoint:
    return CurvePoint(value=value, attained=attained, output_tokens_per_s=10 * value, num_preemptions=preemptions, fits=fits)


def test_without_goals_there_is_one_panel() -> None:
    curve = Curve(name="paged", points=(point(1, fits=True), point(2, fits=False, preemptions=3)), chosen=1)
    assert len(capacity_curve([curve], unit="users", attain=0.99).data) == 1
    assert curve.onset == 2
    words = curve_words([curve], unit="users")
    assert words == "paged: 1 user fit; preemptions from 2 users on; at most 20 output tokens/s."
    assert "nothing could run" in curve_words([Curve(name="x", points=(), chosen=None)], unit="users")
    assert "nothing that was tried fits" in curve_words(
        [Curve(name="x", points=(point(1, fits=False),), chosen=None)], unit="users"
    )


def test_values_that_double_stand_on_a_logarithmic_axis() -> None:
    """Else all of a search's last steps would be in one spot; notes are placed in powers of ten there, lines are not."""
    points = tuple(point(1 << k, fits=k < 4, preemptions=k > 4) for k in range(10))
    wide = capacity_curve([Curve(name="paged", points=points, chosen=8)], unit="users", attain=0.99)
    near = capacity_curve([Curve(name="paged", points=points[3:6], chosen=8)], unit="users", attain=0.99)
    for figure, place in ((wide, (math.log10(8), math.log10(32))), (near, (8, 32))):
        assert figure.layout.xaxis.type == ("log" if figure is wide else None)
        assert {shape.x0 for shape in figure.layout.shapes} == {8, 32}
        assert tuple(note.x for note in figure.layout.annotations if note.xref != "paper") == place
    assert wide.layout.xaxis.range[0] < 0 < math.log10(512) < wide.layout.xaxis.range[1]
    assert {"1", "10", "200"} <= set(wide.layout.xaxis.ticktext)


def test_configurations_have_a_question() -> None:
    assert question_command("max-users", SimulationConfig(), attain=0.99) == "simulate max-users"
