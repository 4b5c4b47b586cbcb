"""A sweep's files: every run, every figure, a page, and where the cliffs and anomalies are."""

import csv
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from small_sweep import BASE, FLAGS, grid, same

from pagedkv.sims.cli import main
from pagedkv.sims.command import command_line
from pagedkv.sims.flat_figures import DRAFT_FIGURES, FIGURES, TIER_FIGURES, VERDICT, figure
from pagedkv.sims.sweep import run_sweep
from pagedkv.sims.sweep_findings import Row, anomalies, cliffs
from pagedkv.sims.sweep_grid import Axis


def test_every_run_is_what_simulate_answers(undisturbed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    points, document = list(grid(FLAGS)), json.loads((undisturbed / "results.json").read_text())
    assert len(document["runs"]) == len(points) == 10
    rows = list(csv.DictReader((undisturbed / "results.csv").open()))
    for point, run, row in zip(points, document["runs"], rows, strict=True):
        assert run["values"] == point.values
        assert {name: int(row[name]) for name in point.values} == point.values
        for name in FIGURES:
            value = figure(run["result"], name)
            assert row[name] == ("" if value is None else str(value))
    one = points[7]
    main([*shlex.split(command_line(one.config))[1:], "--json", "-"])
    assert json.loads(capsys.readouterr().out)["results"][0] == document["runs"][7]["result"]


def test_every_number_of_a_result_is_a_column(undisturbed: Path) -> None:
    def numbers(value: Any, name: str) -> set[str]:
        if isinstance(value, dict):
            return {each for key, inner in value.items() if key != "ci95" for each in numbers(inner, f"{name}.{key}".strip("."))}
        return {name} if isinstance(value, int | float) and not isinstance(value, bool) else set()

    runs = json.loads((undisturbed / "results.json").read_text())["runs"]
    assert set().union(*(numbers(run["result"], "") for run in runs)) == {*FIGURES, *VERDICT[3:]} - {*DRAFT_FIGURES, *TIER_FIGURES}


def test_more_workers_give_the_same_bytes(undisturbed: Path, tmp_path: Path) -> None:
    run_sweep(grid(FLAGS), tmp_path, workers=2)
    same(tmp_path, undisturbed)


def test_a_combination_that_cannot_run_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(shlex.split(f"sweep {BASE} --users 2 --num-gpu-blocks-override 2,200 --workers 1 --out {tmp_path}"))
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert [bool(row["error"]) for row in rows] == [True, False]
    assert "Cannot run: num-gpu-blocks-override 2:" in capsys.readouterr().out.replace("\n", " ")


def test_the_page_is_offline_and_has_a_line_per_combination(undisturbed: Path) -> None:
    page = (undisturbed / "sweep.html").read_text()
    assert "num-gpu-blocks-override 100" in page
    assert "num-gpu-blocks-override 200" in page
    assert "<script src" not in page
    assert '<meta name="viewport" content="width=device-width' in page
    assert "responsive: true" in page
    assert "goodput_share" in page


def test_only_values_between_which_something_lies_are_joined(undisturbed: Path, tmp_path: Path) -> None:
    run_sweep(grid(f"{BASE} --users 2 --kv-cache-dtype auto,fp8"), tmp_path / "names", workers=1)
    modes = [set(re.findall(r'"mode":"([a-z+]+)"', (at / "sweep.html").read_text())) for at in (undisturbed, tmp_path / "names")]
    assert modes == [{"lines+markers"}, {"markers"}]


def test_json_is_the_document(undisturbed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(shlex.split(f"sweep {FLAGS} --workers 1 --out {undisturbed} --json -"))
    assert capsys.readouterr().out == (undisturbed / "results.json").read_text()


def row(axis: str, value: int, **figures: Any) -> Row:
    result = {"num_preemptions": 0, "num_injected": 10**6, "num_finished": 10**6, "ci95": None} | figures
    return Row(values={axis: value}, outcome={"result": result})


def test_the_cliff_is_where_preemption_begins(undisturbed: Path) -> None:
    document = json.loads((undisturbed / "results.json").read_text())
    preemptions = {tuple(run["values"].values()): run["result"]["num_preemptions"] for run in document["runs"]}
    assert document["cliffs"]
    for cliff in document["cliffs"]:
        blocks = cliff["others"]["num_gpu_blocks_override"]
        assert cliff["axis"] == "users"
        assert preemptions[cliff["calm"], blocks] == 0 < preemptions[cliff["preempting"], blocks] == cliff["num_preemptions"]
    crossings = sum(
        (preemptions[users, blocks] > 0) != (preemptions[users + 2, blocks] > 0) for users in (2, 4, 6, 8) for blocks in (100, 200)
    )
    assert len(document["cliffs"]) == crossings
    falling = [row("num_gpu_blocks_override", blocks, num_preemptions=9 * (blocks < 3)) for blocks in (1, 2, 3)]
    (cliff,) = cliffs([Axis(name="num_gpu_blocks_override", values=(1, 2, 3))], falling)
    assert (cliff.calm, cliff.preempting) == (3, 2)


@pytest.mark.parametrize(
    ("axis", "figure", "values", "expected"),
    [
        ("num_gpu_blocks_override", "output_tokens_per_s", (10.0, 12.0, 11.0, 13.0), [(2, 3)]),
        ("num_gpu_blocks_override", "output_tokens_per_s", (10.0, 12.0, 11.99, 13.0), []),
        ("num_gpu_blocks_override", "goodput_share", (0.5, 0.4, 0.9, 1.0), [(1, 2)]),
        ("users", "output_tokens_per_s", (10.0, 12.0, 11.0, 10.0), []),  # past its best, a machine may do less and less
        ("users", "output_tokens_per_s", (10.0, 12.0, 11.0, 13.0), [(2, 3)]),
        ("users", "goodput_share", (1.0, 0.8, 0.9, 0.5), [(2, 3)]),
        ("block_size", "output_tokens_per_s", (10.0, 12.0, 11.0, 13.0), []),
    ],
)
def test_anomalies(axis: str, figure: str, values: tuple[float, ...], expected: list[tuple[int, int]]) -> None:
    rows = [row(axis, i, **{figure: value}) for i, value in enumerate(values, start=1)]
    found = anomalies([Axis(name=axis, values=(1, 2, 3, 4))], rows)
    assert [(each.before, each.after) for each in found] == expected
    assert all(each.sure is None for each in found)


def test_an_anomaly_is_sure_if_the_intervals_are_apart() -> None:
    for half, sure in ((0.1, True), (2.0, False)):
        rows = [
            row("num_gpu_blocks_override", i, output_tokens_per_s=v, ci95={"output_tokens_per_s": [v - half, v + half]})
            for i, v in ((1, 12.0), (2, 10.0))
        ]
        (found,) = anomalies([Axis(name="num_gpu_blocks_override", values=(1, 2))], rows)
        assert found.sure is sure
