"""docs/validation.md is what its generator writes, and `simulate validate` runs every comparison for which there is data."""

import json
from functools import cache
from pathlib import Path

import pytest
from page_texts import DOCS, same
from rich.console import Console

from pagedkv.errors import ConfigError
from pagedkv.sims.cli import main
from pagedkv.sims.command import flat
from pagedkv.sims.config import SimulationConfig
from pagedkv.sims.config_file import read_settings
from pagedkv.sims.console_validate import show_sections
from pagedkv.sims.validation.checks import Check, Section, at_most, within
from pagedkv.sims.validation.page import DETAILS, PAGE, between_marks, details_page, markdown, rewritten
from pagedkv.sims.validation.run import SECTIONS, Validation, validate
from pagedkv.sims.validation.studies import SOSP, WATERMARK


@cache
def section(name: str, data: Path | None) -> Section:
    (found,) = validate(data, only=(name,)).sections
    assert not found.skipped
    return found


def test_the_study_without_data_is_as_the_page_says() -> None:
    found = section("watermark", None)
    assert found.holds
    assert between_marks((DOCS / PAGE).read_text(encoding="utf-8"), "watermark") == markdown(found)


@pytest.mark.parametrize("name", [name for name in SECTIONS if name not in ("published_rows", "watermark")])
def test_the_page_is_what_comes_out(name: str, shared_data: Path) -> None:
    found = section(name, shared_data)
    same(between_marks((DOCS / PAGE).read_text(encoding="utf-8"), name), markdown(found))
    for picture in found.pictures:
        assert (DOCS / "validation" / picture).is_file()
    if name in DETAILS:
        same((DOCS / DETAILS[name][0]).read_text(encoding="utf-8"), details_page(found))


@pytest.mark.parametrize("name", ["served_loads", "vllm_log", "sosp23", "mooncake"])
def test_studies_and_the_log_hold_their_bars(name: str, shared_data: Path) -> None:
    assert section(name, shared_data).holds


@pytest.mark.parametrize(("file", "config"), [("sosp23.toml", SOSP), ("watermark.toml", WATERMARK)])
def test_the_studies_are_those_of_the_files_for_users(file: str, config: SimulationConfig) -> None:
    written = read_settings(str(DOCS / "validation" / file))
    ours, usual = flat(config), flat(SimulationConfig())
    for key, value in written.items():
        name = key.replace("-", "_")
        expected = ours[name] if ours[name] is not None else usual[name]
        assert (tuple(value) if isinstance(value, list) else value) == (
            tuple(expected) if isinstance(expected, list | tuple) else expected
        ), key


def test_sections_without_data_are_skipped_and_say_what_they_need(tmp_path: Path, shared_data: Path) -> None:
    (tmp_path / "dgx_spark_benchmarks.csv").write_text((shared_data / "dgx_spark_benchmarks.csv").read_text())
    sections = validate(tmp_path, only=("sosp23", "mooncake", "vllm_log")).sections
    assert [each.skipped.partition(":")[0] for each in sections] == [
        f"no {name} in {tmp_path.name}"
        for name in ("sharegpt_lengths.csv.gz", "mooncake_synthetic.jsonl.gz", "vllm_rtx4090_llama31_8b")
    ]
    assert Validation(sections=sections).holds


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("--data nowhere", "--data 'nowhere' does not exist: name a CSV of rows"),
        ("--sections sosp", "unknown section 'sosp'"),
        ("--data {empty}", "holds nothing to compare with: needs one of dgx_spark_benchmarks.csv"),
        ("--data {csv} --hardware no-such", "unknown hardware 'no-such'"),
    ],
)
def test_a_mistake_says_what_is_needed(words: str, complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    csv = tmp_path / "rows.csv"
    empty = tmp_path / "empty"
    empty.mkdir()
    csv.write_text("source\n")
    with pytest.raises(SystemExit) as exit_:
        main(["validate", *words.format(empty=empty, csv=csv).split()])
    assert exit_.value.code == 2
    assert complaint in capsys.readouterr().err


def test_the_command_prints_bars_and_json(
    shared_data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = section("mooncake", shared_data)
    monkeypatch.setattr("pagedkv.sims.validation.run.mooncake_section", lambda folder: found)
    words = ["validate", "--data", str(shared_data), "--sections", "mooncake"]
    main(words)
    shown = capsys.readouterr().out
    assert "holds   ideal LRU, without evictions: block hit ratio: 0.6396 against 0.6396, to the printed digits" in shown
    assert "All bars hold." in shown
    main([*words, "--json", "-"])
    document = json.loads(capsys.readouterr().out)
    assert document["holds"]
    assert [each["name"] for each in document["sections"]] == ["mooncake"]
    assert document["sections"][0]["checks"][0]["outcome"] == "holds"


def said_of(*sections: Section) -> str:
    console = Console(width=200)
    with console.capture() as shown:
        show_sections(sections, console, rows=False)
    return shown.get()


def test_the_last_lines_say_of_which_sections_they_speak() -> None:
    good = Section(name="good", title="t", source="s", checks=(at_most("x", 0.1, 0.5),))
    bad = Section(name="bad", title="t", source="s", checks=(at_most("x", 1.0, 0.5),))
    left = [Section(name=name, title="t", source="", skipped="no file") for name in ("left1", "left2")]
    assert said_of(good).endswith("All bars hold.\n")
    assert said_of(good, *left).endswith(
        "All bars of 1 of 3 sections hold.\nNot checked: 2 of 3 sections, for want of data: left1, left2.\n"
    )
    assert said_of(*left).endswith("No bar was checked.\nNot checked: 2 of 2 sections, for want of data: left1, left2.\n")
    missed = said_of(bad, left[0])
    assert "1 bar missed:" in missed
    assert missed.endswith("Not checked: 1 of 2 sections, for want of data: left1.\n")


def test_a_check_fails_beyond_its_bar() -> None:
    assert within("x", 100.0, 102.9, share=0.03).outcome == "holds"
    assert within("x", 100.0, 96.9, share=0.03).outcome == "fails"
    assert at_most("x", 0.06, 0.06).outcome == "holds"
    assert at_most("x", 0.0601, 0.06).outcome == "fails"
    failing = Section(name="n", title="t", source="s", checks=(at_most("x", 1.0, 0.5),))
    assert not failing.holds
    assert "**fails**" in markdown(failing)


def test_only_what_stands_between_marks_is_rewritten() -> None:
    check = Check(what="w", measured="1", simulated="2", bar="b", outcome="no bar", why="y")
    made = Section(name="n", title="t", source="s", checks=(check,))
    page = "by hand\n<!-- simulate validate --sections n -->\nold\n<!-- end -->\nbelow\n"
    new = rewritten(page, {"n": made})
    assert new.startswith("by hand\n")
    assert new.endswith("<!-- end -->\nbelow\n")
    assert "old" not in new
    assert between_marks(new, "n") == markdown(made)
    assert rewritten(new, {"n": made}) == new
    with pytest.raises(ValueError, match="has no line"):
        rewritten("nothing", {"n": made})
    with pytest.raises(ConfigError, match="unknown section"):
        validate(only=("n",))
