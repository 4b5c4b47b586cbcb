"""Two runs side by side: what differs, by how much, and whether it is noise."""

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from pagedkv.errors import ConfigError
from pagedkv.sims.cli import main
from pagedkv.sims.export import to_json
from pagedkv.sims.flat_figures import DRAFT_FIGURES, FIGURES, TIER_FIGURES
from pagedkv.sims.run_comparison import Difference, compare_runs

FLAGS = "--think-time 1s --random-input-len 400 --random-output-len 60 --hardware rtx-4090 --duration 6s --warmup 2s"


def run(folder: Path, flags: str, capsys: pytest.CaptureFixture[str]) -> Path:
    main([*shlex.split(f"{FLAGS} {flags}"), "--json", str(folder / "summary.json")])
    capsys.readouterr()
    return folder


@pytest.fixture
def runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> tuple[Path, Path]:
    return (
        run(tmp_path / "a", "--users 4 --repeats 3 --allocator paged,contiguous-max", capsys),
        run(tmp_path / "b", "--users 9 --repeats 3 --allocator paged --block-size 32", capsys),
    )


def by_figure(differences: tuple[Difference, ...]) -> dict[str, Difference]:
    return {each.figure: each for each in differences}


def test_settings_and_figures_that_differ(runs: tuple[Path, Path]) -> None:
    compared = compare_runs(*runs)
    assert {s.name: (s.first, s.second) for s in compared.settings} == {
        "users": (4, 9),
        "block_size": (16, 32),
        "allocator": (["paged", "contiguous-max"], ["paged"]),
    }
    assert (list(compared.figures), compared.only_first, compared.only_second) == (["paged"], ("contiguous-max",), ())
    documents = [json.loads((run / "summary.json").read_text())["results"][0] for run in runs]
    figures = by_figure(compared.figures["paged"])
    rate = figures["output_tokens_per_s"]
    assert (rate.first, rate.second) == tuple(each["output_tokens_per_s"] for each in documents)
    assert rate.difference == documents[1]["output_tokens_per_s"] - documents[0]["output_tokens_per_s"]
    assert rate.significant is True
    assert figures["num_injected"].first == documents[0]["num_injected"] / 3
    assert figures.keys() >= {
        name for name in FIGURES if not name.startswith(("kv_when", "goodput", "resumed", *TIER_FIGURES, *DRAFT_FIGURES))
    }


def test_a_run_against_itself_differs_in_nothing(runs: tuple[Path, Path]) -> None:
    compared = compare_runs(runs[0], runs[0] / "summary.json")
    assert compared.settings == ()
    for differences in compared.figures.values():
        assert all(each.first == each.second and not each.difference for each in differences)
        assert not any(each.significant for each in differences)


@pytest.mark.parametrize(
    ("a", "b", "significant"),
    [
        ((10.0, 1.0), (12.0, 1.0), True),
        ((10.0, 1.0), (11.3, 1.0), False),
        ((10.0, 3.0), (14.9, 4.0), False),
        ((10.0, 3.0), (15.1, 4.0), True),
    ],
)
def test_what_is_significant(
    a: tuple[float, float], b: tuple[float, float], significant: bool, runs: tuple[Path, Path], tmp_path: Path
) -> None:
    for name, (mean, half) in (("x.json", a), ("y.json", b)):
        document = json.loads((runs[1] / "summary.json").read_text())
        result = document["results"][0]
        result["output_tokens_per_s"], result["ci95"]["output_tokens_per_s"] = mean, [mean - half, mean + half]
        result["ttft_s"] |= {"mean": mean, "ci95": [mean - half, mean + half]}
        (tmp_path / name).write_text(to_json(document))
    figures = by_figure(compare_runs(tmp_path / "x.json", tmp_path / "y.json").figures["paged"])
    assert figures["output_tokens_per_s"].significant is significant
    assert figures["ttft_s.mean"].significant is significant
    assert figures["num_injected"].significant is None


def test_repeats_of_one_run_alone_say_nothing_of_noise(
    runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    single = run(tmp_path / "c", "--users 4 --allocator paged", capsys)
    compared = compare_runs(runs[0], single)
    assert all(each.significant is None for each in compared.figures["paged"])
    figures = by_figure(compared.figures["paged"])
    assert figures["simulated_s"].difference == 0.0  # per repeat


def test_the_command(runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    main(["compare", *map(str, runs)])
    out = capsys.readouterr().out
    for text in ("block-size", "output_tokens_per_s", "Only in A: contiguous-max", "* beyond the 95 % interval"):
        assert text in out
    main(["compare", *map(str, runs), "--json", "-"])
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(compare_runs(*runs).document()))


def damaged(document: dict[str, Any]) -> dict[str, Any]:
    del document["results"][0]["allocator"]
    return document


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _: "{", "cannot read"),
        (lambda _: "[]", "no result document"),
        (lambda text: to_json(json.loads(text) | {"schema_version": 99}), "schema version 99"),
        (lambda text: to_json(damaged(json.loads(text))), "damaged"),
        (lambda text: to_json(json.loads(text) | {"results": []}), "no allocator in common"),
    ],
)
def test_what_is_no_run_is_refused(change: Any, message: str, runs: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(change((runs[0] / "summary.json").read_text()))
    with pytest.raises(ConfigError, match=message):
        compare_runs(runs[0], tmp_path / "x.json")
    with pytest.raises(ConfigError, match="cannot read"):
        compare_runs(runs[0], tmp_path)
