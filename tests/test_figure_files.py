"""Figures as files: without kaleido the run does not begin; where a browser fails, all else is written, and the status says so."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import plotly.graph_objects as go
import pytest

from pagedkv.errors import ConfigError
from pagedkv.sims.cli import main
from pagedkv.sims.figure_files import write_images

RUN = "--users 20 --duration 5s --warmup 0 --hardware rtx-4090 --allocator paged".split()


def kaleido(monkeypatch: pytest.MonkeyPatch, write: Any) -> None:
    """Put another kaleido in its place; None: there is none."""
    find = importlib.util.find_spec
    spec = None if write is None else importlib.util.spec_from_loader("kaleido", loader=None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: spec if name == "kaleido" else find(name, *rest))
    module = ModuleType("kaleido")
    module.write_fig_from_object_sync = write  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "kaleido", module)


def test_without_kaleido_the_run_does_not_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kaleido(monkeypatch, None)
    with pytest.raises(SystemExit) as exit:
        main([*RUN, "--images", str(tmp_path / "pictures"), "--report", str(tmp_path / "r.html")])
    out, err = capsys.readouterr()
    assert (exit.value.code, out) == (2, "")
    assert "kaleido is not installed; pip install 'pagedkv[images]', and a Chrome or Chromium, write them" in err
    assert not list(tmp_path.iterdir())


def test_a_browser_that_fails_leaves_the_report_and_a_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def write(tasks: list[dict[str, Any]]) -> None:
        raise RuntimeError("no browser was found")

    kaleido(monkeypatch, write)
    with pytest.raises(SystemExit) as exit:
        main([*RUN, "--images", str(tmp_path / "pictures"), "--report", str(tmp_path / "r.html")])
    out, err = capsys.readouterr()
    assert exit.value.code == 2
    assert "Verdict" in out
    assert "no PNG or SVG of the figures: no browser was found" in err
    assert "figure-slowest" in (tmp_path / "r.html").read_text("utf-8")


def test_every_figure_of_the_report_is_written_in_both_formats_still(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[dict[str, Any]] = []

    def write(tasks: list[dict[str, Any]]) -> None:
        asked.extend(tasks)
        for task in tasks:
            Path(task["path"]).write_text(task["opts"]["format"])

    kaleido(monkeypatch, write)
    main([*RUN, "--images", str(tmp_path)])
    names = ["budget", "kinds", "map-paged", "requests", "latency-ttft", "latency-tpot", "latency-e2el", "slowest"]
    assert [task["path"].name for task in asked] == [f"{name}.{kind}" for name in names for kind in ("svg", "png")]
    assert f"Written: {tmp_path}" in capsys.readouterr().err
    for task in asked:
        assert {"sliders", "updatemenus", "frames"}.isdisjoint({*task["fig"], *task["fig"]["layout"]})
        assert task["opts"]["height"] == task["fig"]["layout"]["height"]
        go.Figure(task["fig"])


@pytest.mark.parametrize("error", [RuntimeError("no browser was found"), ValueError(), OSError(2, "No such file")])
def test_a_browser_that_fails_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def write(tasks: list[dict[str, Any]]) -> None:
        raise error

    kaleido(monkeypatch, write)
    told = write_images({"a": go.Figure(layout={"height": 300})}, tmp_path)
    assert told is not None
    assert "\n" not in told
    assert (str(error) or "ValueError").split()[-1].strip("'") in told


def test_pictures_that_kaleido_did_not_write_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kaleido(monkeypatch, lambda tasks: Path(tasks[0]["path"]).write_text("svg"))
    told = write_images({"a": go.Figure(layout={"height": 300})}, tmp_path)
    assert told == f"no picture in {tmp_path / 'a.png'}: kaleido did not write it"


def test_a_folder_that_cannot_be_is_refused_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kaleido(monkeypatch, lambda tasks: None)
    (tmp_path / "file").write_text("")
    for place, why in (
        ("", "give it the name of a folder"),
        (str(tmp_path / "file"), "Give --images a folder that you may write to"),
    ):
        with pytest.raises(SystemExit) as exit:
            main([*RUN, "--images", place])
        assert exit.value.code == 2
        assert why in capsys.readouterr().err


def test_several_engines_have_no_one_report(tmp_path: Path) -> None:
    from pagedkv.sims.cli_engines import compare_engines  # noqa: PLC0415
    from pagedkv.sims.config import LoadConfig, ServingConfig, SimulationConfig  # noqa: PLC0415

    config = SimulationConfig(load=LoadConfig(users=2), serving=ServingConfig(engine="vllm,sglang"))
    with pytest.raises(ConfigError, match="--report and --images show one engine"):
        compare_engines(config, json=None, out=None, report=str(tmp_path), overwrite=False)
