"""Published rows: how a file is read, what a row becomes, what is refused, and how one's own are scored."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from row_files import SPARK, csv_of

from pagedkv.errors import ConfigError
from pagedkv.sims.cli import main
from pagedkv.sims.step_constants import catalogue_constants
from pagedkv.sims.validation.benchmark_rows import COLUMNS, FURTHER, BenchmarkRow, read_rows
from pagedkv.sims.validation.points import ASSUMED_OUTPUT, Point, points_of
from pagedkv.sims.validation.published import compare_rows, mean_error
from pagedkv.sims.validation.row_models import is_burst
from pagedkv.sims.validation.work import Work, as_row
from pagedkv.weight_format import WEIGHT_FORMATS


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


def test_a_users_own_rows_are_scored_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = csv_of(tmp_path, {}, {"batch": "8", "prefill_tok_s": "", "decode_tok_s": "90"})
    main(["validate", "--data", str(path), "--json", "-"])
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    (rows,) = document["sections"]
    assert document["holds"]
    assert [residual["line"] for residual in rows["residuals"]] == [2, 2, 3]
    assert all(residual["calibration"] == "validated" for residual in rows["residuals"]), "by the rows that are shipped"
    assert all(abs(residual["error"]) < 0.5 for residual in rows["residuals"])
    assert all("not validated" in check["why"] for check in rows["checks"] if "mean error" in check["what"])


def test_what_requests_sent_at_once_make_has_the_prompts_of_the_late_ones_in_it() -> None:
    source = next(row.source for row in read_rows(FURTHER) if is_burst(row))
    row = BenchmarkRow(
        line=2,
        source=source,
        engine="vLLM 0.33",
        model="llama-3.1-8b",
        weight_dtype="bf16",
        batch=8,
        prompt_tokens=512,
        context_depth=0,
        prefill_tok_s=None,
        decode_tok_s=100.0,
        note="tg128",
        verified=True,
    )

    def rate(row: BenchmarkRow) -> float:
        (points, left_out) = points_of([row])
        assert not left_out
        constants = as_row(catalogue_constants(SPARK, WEIGHT_FORMATS["bf16"]))
        return float(Work.of(points).rates(constants[np.newaxis])[0])

    def both(**changes: int) -> tuple[float, float]:
        return rate(replace(row, **changes)), rate(replace(row, source="somebody", **changes))

    burst, steady = both(prompt_tokens=2048)
    assert burst < 0.9 * steady, "2,048 tokens a step: seven of eight prompts are left when the first token comes"
    burst, steady = both(prompt_tokens=512)
    assert 0.9 * steady < burst < steady, "four of eight"
    for changes in ({"batch": 4}, {"batch": 1}):
        burst, steady = both(**changes)
        assert burst == pytest.approx(steady), "none"


def test_columns_that_a_file_may_have_are_read(tmp_path: Path) -> None:
    lines = csv_of(tmp_path, {}, {}).read_text().splitlines()
    (tmp_path / "rows.csv").write_text(
        "\n".join([f"{lines[0]},output_tokens,kv_cache_dtype", f"{lines[1]},400,fp8", f"{lines[2]},,"]) + "\n"
    )
    said, unsaid = read_rows(tmp_path / "rows.csv")
    assert (said.output_tokens, said.kv_cache_dtype, unsaid.output_tokens, unsaid.kv_cache_dtype) == (400, "fp8", None, "")
    ours, usual = (next(p for p in points_of([row])[0] if p.kind == "decode") for row in (said, unsaid))
    longer = int(ours.steps[0].batch["num_slots_needed"][0] - usual.steps[0].batch["num_slots_needed"][0])
    assert longer == (400 - ASSUMED_OUTPUT) // 2
    assert (ours.kv_cache_dtype, usual.kv_cache_dtype) == ("fp8", "auto")


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
