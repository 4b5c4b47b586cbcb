"""What the committed constants say of all published rows, which `simulate validate` compares once for all that is asked here."""

from pathlib import Path
from typing import Any

import pytest
from page_texts import DOCS, same

from pagedkv.sims.validation.benchmark_rows import FURTHER, read_rows
from pagedkv.sims.validation.checks import Section
from pagedkv.sims.validation.page import DETAILS, PAGE, between_marks, details_page, markdown
from pagedkv.sims.validation.published import MEAN_BARS, Published, compare_rows, mean_error
from pagedkv.sims.validation.published_section import NAME
from pagedkv.sims.validation.run import validate


@pytest.fixture(scope="module")
def compared(shared_data: Path) -> tuple[Published, Section]:
    """What was compared, and what is shown of it: fitting constants without each model takes long."""
    kept: list[Published] = []

    def keeping(*args: Any, **options: Any) -> Published:
        kept.append(compare_rows(*args, **options))
        return kept[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pagedkv.sims.validation.run.compare_rows", keeping)
        (shown,) = validate(shared_data, only=(NAME,)).sections
    (published,) = kept
    return published, shown


@pytest.fixture(scope="module")
def published(compared: tuple[Published, Section]) -> Published:
    return compared[0]


@pytest.fixture(scope="module")
def shown(compared: tuple[Published, Section]) -> Section:
    return compared[1]


def test_the_page_is_what_comes_out(shown: Section) -> None:
    same(between_marks((DOCS / PAGE).read_text(encoding="utf-8"), NAME), markdown(shown))
    for picture in shown.pictures:
        assert (DOCS / "validation" / picture).is_file()


def test_the_page_of_rows_is_what_comes_out(shown: Section) -> None:
    same((DOCS / DETAILS[NAME][0]).read_text(encoding="utf-8"), details_page(shown))


def test_every_figure_compared_has_a_line_on_the_page_of_rows() -> None:
    lines = (DOCS / DETAILS[NAME][0]).read_text(encoding="utf-8").splitlines()
    assert sum(line.startswith("| ") for line in lines) > 290


def test_no_published_row_is_flagged_but_the_one_that_its_collector_doubts(published: Published) -> None:
    assert not [each for each in published.not_compared if "impossible" in each.reason]
    assert [each.row.line for each in published.not_compared if "verified=no" in each.reason] == [139, 139]


def outcomes(shown: Section) -> dict[str, str]:
    return {check.what: check.outcome for check in shown.checks}


def test_llama_cpp_meets_its_bars(shown: Section) -> None:
    found = outcomes(shown)
    for kind, figures in (("decode", 157), ("prefill", 112)):
        assert found[f"llama-cpp, {kind}: mean error of {figures} figures"] == "holds"
        assert found[f"llama-cpp, {kind}: largest error without a stated reason"] == "holds"
        assert found[f"llama-cpp, {kind}: mean error of models left out"] == "holds"
    assert found["rows left out, with reasons"] == "holds"
    assert found["left-out figures within their interval"] == "holds"


def test_the_bars_that_are_missed_are_those_that_the_page_names(shown: Section) -> None:
    missed = {what for what, outcome in outcomes(shown).items() if outcome == "fails"}
    assert missed == {
        "sglang, prefill: mean error of 4 figures",
        "sglang, prefill: mean error of models left out",
        "sglang, decode: mean error of 5 figures",
    }


def test_where_a_bar_is_missed_the_page_says_what_the_best_constants_would_leave(published: Published) -> None:
    assert set(published.least) == {("sglang", "prefill"), ("sglang", "decode")}
    for (engine, kind), least in published.least.items():
        assert 0 < least <= mean_error(published.of(engine, kind)) * 1.02  # the search steps by 3 %
    assert published.least["sglang", "prefill"] > MEAN_BARS["prefill"], "four figures contradict each other"


def test_further_rows_are_the_other_halves_of_what_the_file_quotes(published: Published) -> None:
    further = read_rows(FURTHER)
    quoted = {(row.source, row.model) for row in published.rows if row.source in {each.source for each in further}}
    assert quoted
    assert not quoted & {(row.source, row.model) for row in further}
    assert (
        len({(row.source, row.model, row.weight_dtype, row.batch, row.prompt_tokens, row.context_depth) for row in further}) > 100
    )
    assert {row.verified for row in further} == {True}
    left_out = [each for each in published.not_compared if each.row.file == FURTHER.name]
    assert len(published.further) == sum((row.prefill_tok_s is not None) + (row.decode_tok_s is not None) for row in further) - 1
    assert [each.reason.partition(":")[0] for each in left_out] == ["the first prompt of a run"]
    assert all(each.left_out_tok_s is not None for each in published.further)


def test_no_bar_counts_further_rows(published: Published, shown: Section) -> None:
    assert not {residual.point.row.file for residual in published.residuals} & {FURTHER.name}
    further = [check for check in shown.checks if "further" in check.what]
    assert further
    assert {check.outcome for check in further} == {"no bar"}


def test_engines_with_few_rows_or_a_single_model_are_not_validated(published: Published) -> None:
    doubts = {status.engine: status.doubts for status in published.engines}
    assert doubts["llama-cpp"] == doubts["sglang"] == ""
    assert doubts["vllm"] == "not validated: scored rows of a single model"
    assert "1 row, too few" in doubts["tensorrt-llm"]
    assert "2 rows, too few" in doubts["ollama"]


def test_every_kind_of_model_is_among_the_rows(published: Published) -> None:
    models = {residual.point.subject.model.name: residual.point.subject.model for residual in published.residuals}
    kinds = {group.kind for model in models.values() for group in model.layer_groups}
    assert {"full", "sliding_window", "mla", "state"} <= kinds
    assert {bool(model.num_experts) for model in models.values()} == {True, False}


def test_a_left_out_model_is_predicted_without_its_rows(published: Published) -> None:
    own = published.of("llama-cpp", "decode")
    assert all(residual.left_out_tok_s not in (None, residual.simulated_tok_s) for residual in own)
    assert mean_error(own) < mean_error(own, left_out=True) < 0.25
    assert all(residual.left_out_tok_s is None for residual in published.of("ollama", "decode"))
