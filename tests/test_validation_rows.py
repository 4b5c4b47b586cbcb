"""Published rows: how a file is read, what a row becomes, what is refused, and what the committed constants say of all of them."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from pagedkv.catalogue import load_hardware
from pagedkv.errors import ConfigError
from pagedkv.sims.cli import main
from pagedkv.sims.validation.benchmark_rows import COLUMNS, FURTHER, read_rows
from pagedkv.sims.validation.checks import Section
from pagedkv.sims.validation.points import Point, points_of
from pagedkv.sims.validation.published import MEAN_BARS, Published, compare_rows, mean_error
from pagedkv.sims.validation.published_section import section

SPARK = load_hardware("dgx-spark")
ROW = {
    "source": "me",
    "engine": "vLLM 0.33",
    "model": "llama-3.1-8b",
    "weight_dtype": "bf16",
    "batch": "1",
    "prompt_tokens": "2048",
    "context_depth": "0",
    "prefill_tok_s": "5000",
    "decode_tok_s": "13",
    "note": "tg128",
    "verified": "yes",
}


def csv_of(folder: Path, *rows: dict[str, str], drop: str = "") -> Path:
    columns = [column for column in COLUMNS if column != drop]
    lines = [",".join(columns), *(",".join((ROW | row)[column] for column in columns) for row in rows)]
    path = folder / "rows.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def points(folder: Path, **cells: str) -> list[Point]:
    return points_of(read_rows(csv_of(folder, cells)))[0]


@pytest.mark.parametrize("column", COLUMNS)
def test_a_missing_column_is_named_with_all_that_are_needed(tmp_path: Path, column: str) -> None:
    with pytest.raises(ConfigError, match=f"no column {column}; its first line must name source,engine") as error:
        read_rows(csv_of(tmp_path, {}, drop=column))
    assert "decode_tok_s" in str(error.value)


@pytest.mark.parametrize(
    ("cells", "complaint"),
    [
        ({"batch": ""}, "line 2, column batch: empty"),
        ({"batch": "0"}, "line 2, column batch: '0' is no whole number of 1 or more"),
        ({"batch": "1.5"}, "no whole number"),
        ({"decode_tok_s": "-3"}, "column decode_tok_s: '-3' is no number"),
        ({"decode_tok_s": "nan"}, "column decode_tok_s: 'nan' is no number"),
        ({"prefill_tok_s": "fast"}, "column prefill_tok_s: 'fast' is no number"),
        ({"prefill_tok_s": "", "decode_tok_s": ""}, "needs one of them"),
    ],
)
def test_a_cell_that_is_no_such_number_is_named(tmp_path: Path, cells: dict[str, str], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        read_rows(csv_of(tmp_path, cells))


def test_a_file_without_rows_or_without_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no rows below the header"):
        read_rows(csv_of(tmp_path))
    with pytest.raises(ConfigError, match="cannot read the benchmark rows"):
        read_rows(tmp_path / "none.csv")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot read the benchmark rows"):
        read_rows(tmp_path / "binary.csv")


def test_a_row_becomes_the_steps_that_it_measured(tmp_path: Path) -> None:
    prefill, decode = points(tmp_path, prompt_tokens="5000", batch="3")
    assert (prefill.kind, decode.kind) == ("prefill", "decode")
    computed = sum(steps.count * int(steps.batch["num_scheduled_tokens"].sum()) for steps in prefill.steps)
    assert computed == prefill.tokens == 15_000
    assert max(int(steps.batch["num_scheduled_tokens"].sum()) for steps in prefill.steps) == 2048
    (step,) = decode.steps
    assert step.batch["num_scheduled_tokens"].tolist() == [1, 1, 1]
    assert set(step.batch["num_slots_needed"].tolist()) == {5064}  # behind the prompt, in the middle of 128 tokens


def test_short_prompts_share_a_step_and_llama_cpp_computes_512_at_a_time(tmp_path: Path) -> None:
    prefill, _ = points(tmp_path, prompt_tokens="512", batch="5")
    assert [(steps.count, steps.batch.size) for steps in prefill.steps] == [(1, 4), (1, 1)]
    prefill, _ = points(tmp_path, engine="llama.cpp b10380", weight_dtype="Q8_0")
    assert {int(steps.batch["num_scheduled_tokens"].sum()) for steps in prefill.steps} == {512}
    assert sum(steps.count for steps in prefill.steps) == 4


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        ({"verified": "no", "note": "odd"}, "verified=no: odd"),
        ({"engine": "mystery"}, "unknown engine 'mystery'"),
        ({"model": "no-such-model"}, "unknown model 'no-such-model'"),
        ({"weight_dtype": "Q2_K"}, "Q2_K"),
        ({"weight_dtype": "FP8 + MTP3"}, "speculative"),
    ],
)
def test_what_cannot_be_compared_is_left_out_with_a_reason(tmp_path: Path, cells: dict[str, str], reason: str) -> None:
    compared, left_out = points_of(read_rows(csv_of(tmp_path, cells)))
    assert compared == []
    assert {each.kind for each in left_out} == {"prefill", "decode"}
    assert all(reason.lower() in each.reason.lower() for each in left_out)
    with pytest.raises(ConfigError, match="none of its 1 rows can be compared"):
        compare_rows(csv_of(tmp_path, cells), SPARK)


def test_rates_beyond_the_machines_peak_are_flagged_and_not_compared(tmp_path: Path) -> None:
    path = csv_of(tmp_path, {}, {"prefill_tok_s": "30000", "decode_tok_s": ""}, {"decode_tok_s": "25", "prefill_tok_s": ""})
    published = compare_rows(path, SPARK)
    assert {residual.point.row.line for residual in published.residuals} == {2}
    flops, bandwidth = (each.reason for each in published.not_compared)
    assert "impossible" in flops
    assert "TFLOPS, more than the 125 of dgx-spark" in flops
    assert "GB/s, more than the 273 GB/s of dgx-spark" in bandwidth


def test_an_impossible_rate_says_which_weights_it_assumes_and_which_would_do(tmp_path: Path) -> None:
    cells = {"engine": "vLLM 0.33", "model": "gpt-oss-120b", "prefill_tok_s": "", "decode_tok_s": "57.5", "batch": "1"}
    path = csv_of(tmp_path, {**cells, "weight_dtype": "MXFP4"}, {**cells, "weight_dtype": "mxfp4-all"})
    published = compare_rows(path, SPARK)
    (reason,) = (each.reason for each in published.not_compared)
    assert "mxfp4 has linear layers beside the experts in 16 bits and the output head in 16" in reason
    assert "it could be of weights in mxfp4+fp8, mxfp4-all" in reason
    assert "q8_0" not in reason  # vLLM reads no GGUF
    assert [each.point.subject.weight_format.name for each in published.residuals] == ["mxfp4-all"]


def test_no_published_row_is_flagged_but_the_one_that_its_collector_doubts(shared_data: Path) -> None:
    published = compare_rows(shared_data / "dgx_spark_benchmarks.csv", SPARK, leave_out=False)
    assert not [each for each in published.not_compared if "impossible" in each.reason]
    assert [each.row.line for each in published.not_compared if "verified=no" in each.reason] == [139, 139]


@pytest.fixture(scope="module")
def published(shared_data: Path) -> Published:
    return compare_rows(shared_data / "dgx_spark_benchmarks.csv", SPARK, further=read_rows(FURTHER))


def outcomes(shown: Section) -> dict[str, str]:
    return {check.what: check.outcome for check in shown.checks}


def test_llama_cpp_meets_its_bars(published: Published) -> None:
    found = outcomes(section(published))
    for kind, figures in (("decode", 157), ("prefill", 112)):
        assert found[f"llama-cpp, {kind}: mean error of {figures} figures"] == "holds"
        assert found[f"llama-cpp, {kind}: largest error without a stated reason"] == "holds"
        assert found[f"llama-cpp, {kind}: mean error of models left out"] == "holds"
    assert found["rows left out, with reasons"] == "holds"
    assert found["left-out figures within their interval"] == "holds"


def test_the_bars_that_are_missed_are_those_that_the_page_names(published: Published) -> None:
    missed = {what for what, outcome in outcomes(section(published)).items() if outcome == "fails"}
    assert missed == {
        "sglang, prefill: mean error of 4 figures",
        "sglang, prefill: mean error of models left out",
        "sglang, decode: mean error of 5 figures",
    }


def test_where_a_bar_is_missed_the_page_says_what_the_best_constants_would_leave(published: Published) -> None:
    assert set(published.least) == {("sglang", "prefill"), ("sglang", "decode")}
    for (engine, kind), least in published.least.items():
        assert MEAN_BARS[kind] < least <= mean_error(published.of(engine, kind)) * 1.02  # the search steps by 3 %


def test_further_rows_are_the_other_halves_of_what_the_file_quotes(published: Published) -> None:
    further = read_rows(FURTHER)
    quoted = {row.model for row in published.rows if row.source in {each.source for each in further}}
    assert quoted
    assert not quoted & {row.model for row in further}
    assert (
        len({(row.source, row.model, row.weight_dtype, row.batch, row.prompt_tokens, row.context_depth) for row in further}) > 100
    )
    assert {row.verified for row in further} == {True}
    left_out = [each for each in published.not_compared if each.row.file == FURTHER.name]
    assert len(published.further) == sum((row.prefill_tok_s is not None) + (row.decode_tok_s is not None) for row in further) - 1
    assert [each.reason.partition(":")[0] for each in left_out] == ["the first prompt of a run"]
    assert all(each.left_out_tok_s is not None for each in published.further)


def test_no_bar_counts_further_rows(published: Published) -> None:
    assert not {residual.point.row.file for residual in published.residuals} & {FURTHER.name}
    shown = [check for check in section(published).checks if "further" in check.what]
    assert shown
    assert {check.outcome for check in shown} == {"no bar"}


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


def test_a_users_own_rows_are_scored_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = csv_of(tmp_path, {}, {"batch": "8", "prefill_tok_s": "", "decode_tok_s": "90"})
    main(["validate", "--data", str(path), "--json", "-"])
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    (rows,) = document["sections"]
    assert document["holds"]
    assert [residual["line"] for residual in rows["residuals"]] == [2, 2, 3]
    assert all(residual["calibration"] == "not validated" for residual in rows["residuals"])
    assert all(abs(residual["error"]) < 0.5 for residual in rows["residuals"])
    assert all("not validated" in check["why"] for check in rows["checks"] if "mean error" in check["what"])


def test_a_missed_bar_is_exit_status_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slow = [
        {"engine": "SGLang", "weight_dtype": "FP8", "model": model, "batch": batch, "prefill_tok_s": "", "decode_tok_s": "4"}
        for model in ("llama-3.1-8b", "qwen2.5-14b")
        for batch in ("1", "2", "4")
    ]
    with pytest.raises(SystemExit) as exit_:
        main(["validate", "--data", str(csv_of(tmp_path, *slow))])
    assert exit_.value.code == 3
    out = capsys.readouterr().out
    assert "fails" in out
    assert "bars missed" in out


def test_errors_are_relative_to_what_was_measured(tmp_path: Path) -> None:
    (only,) = compare_rows(csv_of(tmp_path, {"prefill_tok_s": ""}), SPARK).residuals
    assert only.error == pytest.approx(only.simulated_tok_s / 13 - 1)
    assert math.isnan(mean_error([]))
