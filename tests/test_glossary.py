"""Every word of an answer is explained: in the glossary, by `simulate explain`, and in docs/metrics.md."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pagedkv.errors import ConfigError
from pagedkv.sims.cli import main
from pagedkv.sims.comparison import comparison
from pagedkv.sims.config import LoadConfig, MeasurementConfig, ServingConfig, SimulationConfig
from pagedkv.sims.flat_figures import FIGURES
from pagedkv.sims.glossary import GLOSSARY, Entry, explain
from pagedkv.sims.glossary_page import defined_in, markdown, rewritten
from pagedkv.sims.recording import KV_KINDS
from pagedkv.sims.results import simulate
from pagedkv.sims.scenario import resolve

METRICS = Path(__file__).resolve().parents[1] / "docs" / "metrics.md"
NAMES = {"engine", "model", "hardware", "text"}
"""Fields that say what the user asked for, and the verdict's own sentence."""
TIER_FIGURES = {"num_loaded_tokens", "num_offloaded_tokens"}
DRAFT_FIGURES = {"num_draft_tokens", "num_accepted_tokens", "draft_acceptance_rate"}
PREFIX_FIGURES = {"num_queried_tokens", "num_hit_tokens", "prefix_hit_rate", "resumed_hit_rate"}
"""None where there is no prefix cache."""


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    """A result in which no figure is absent: requests wait, there are goals and repeats."""
    config = SimulationConfig(
        load=LoadConfig(users=9, think_time="100ms", random_input_len=300, random_output_len=30),
        serving=ServingConfig(hardware="rtx-4090", max_model_len=2048, max_num_seqs=2),
        measurement=MeasurementConfig(
            duration="5s", warmup="1s", repeats=2, goodput=("ttft:900",), allocator=("paged", "contiguous-max")
        ),
    )
    return simulate(resolve(config)).document()


def fields(value: Any) -> Iterator[str]:
    """Yield the names of all fields in `value`, those of intervals excepted: they are names of figures."""
    for name, inner in value.items():
        yield name
        if isinstance(inner, dict) and name != "ci95":
            yield from fields(inner)


def test_every_field_of_the_results_is_explained(document: dict[str, Any]) -> None:
    for result in document["results"]:
        absent = {name for name, value in result.items() if value is None}
        assert absent <= TIER_FIGURES | DRAFT_FIGURES | ({"resumed_hit_rate"} if result["allocator"] == "paged" else PREFIX_FIGURES)
        assert set(fields(result)) - NAMES <= set(GLOSSARY)
        assert {name.partition(".")[0] for name in result["ci95"]} <= set(GLOSSARY)


def test_every_kind_of_memory_is_explained() -> None:
    assert set(KV_KINDS) <= set(GLOSSARY)


def test_every_line_of_the_comparison_is_explained(document: dict[str, Any]) -> None:
    fields_of_lines = {explain(row.label).name for row in comparison(document)}
    assert {
        "ttft_s",
        "e2e_s",
        "running_mean",
        "goodput_per_s",
        "goodput_share",
        "status",
        "kv_when_waiting",
        "free",
    } <= fields_of_lines
    assert explain("requests").name == "num_injected"
    assert explain("requests/s").name == "request_throughput_per_s"


@pytest.mark.parametrize("entry", GLOSSARY.values(), ids=GLOSSARY)
def test_a_word_is_found_under_each_of_its_names(entry: Entry) -> None:
    for name in (entry.name, entry.title):
        assert {explain(word) for word in (name, name.upper(), f" {name} ", name.replace("_", "-"), name.replace("_", " "))} == {
            entry
        }
    assert explain(re.sub("(_per)?_s$", "", entry.name)) is entry
    assert all(text.strip() for text in (entry.title, entry.formula, entry.meaning))


def test_titles_are_unique() -> None:
    assert len({entry.title.lower() for entry in GLOSSARY.values()}) == len(GLOSSARY)


@pytest.mark.parametrize(
    ("word", "near"), [("tftf", "ttft_s"), ("good-putt", "goodput"), ("preempted", "preemption"), ("", "known")]
)
def test_an_unknown_word_is_refused_with_near_ones(word: str, near: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown word {word!r}: .*{near}"):
        explain(word)


def test_explain_on_the_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    main(["explain", "TTFT P99, ms"])
    entry = GLOSSARY["ttft_s"]
    assert capsys.readouterr().out == f"{entry.title} ({entry.name})\n  {entry.formula}\n  {entry.meaning}\n"
    main(["explain"])
    everything = " ".join(capsys.readouterr().out.split())
    assert all(entry.formula in everything for entry in GLOSSARY.values())
    with pytest.raises(SystemExit) as exit:
        main(["explain", "tftf"])
    out, err = capsys.readouterr()
    assert (exit.value.code, out) == (2, "")
    assert err.startswith("error: ")


def test_the_tables_of_the_page_are_the_glossary() -> None:
    """Once only: `python -m pagedkv.sims.glossary_page docs/metrics.md` renews them."""
    page = METRICS.read_text("utf-8")
    assert rewritten(page) == page
    defined = defined_in(page)
    assert len(set(defined)) == len(defined)
    shares = {"kv", "kv_when_waiting"}
    assert {name.partition(".")[0] for name in FIGURES} - shares <= set(defined)
    assert set(KV_KINDS) <= set(defined)
    for name in defined:
        assert GLOSSARY[name].formula in page


def test_a_word_that_is_not_there_cannot_be_in_a_table() -> None:
    with pytest.raises(KeyError, match="nonsense"):
        rewritten("<!-- glossary: ttft_s nonsense -->\n<!-- end -->\n")
    assert rewritten("before\n<!-- glossary: ttft_s -->\nold\n<!-- end -->\nafter") == (
        f"before\n<!-- glossary: ttft_s -->\n{markdown(['ttft_s'])}<!-- end -->\nafter"
    )


VERDICT_AND_NAMES = {"allocator", "placement", "verdict", "status", "fits", "next_command"}


def named_on_the_page() -> set[str]:
    return set(re.findall(r"`\"?(\w+)", METRICS.read_text("utf-8")))


def test_the_page_of_metrics_names_every_figure(document: dict[str, Any]) -> None:
    for result in document["results"]:
        assert set(fields(result)) - NAMES - VERDICT_AND_NAMES <= named_on_the_page()


def test_the_page_of_metrics_names_the_other_fields() -> None:
    assert named_on_the_page() >= VERDICT_AND_NAMES
