"""`simulate calibrate` over published rows, and over files as benchmarks print them."""

import csv
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from calibrations import SERVING, fitted, study, written

from pagedkv.sims.cli import main
from pagedkv.sims.config import ServingConfig
from pagedkv.sims.deployment import deploy
from pagedkv.sims.step_constants import StepConstants
from pagedkv.sims.step_time import RooflineStepTime
from pagedkv.sims.validation.points import decode_steps


@pytest.fixture(scope="module")
def batched(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Published rows of Qwen2.5-7B in Q8_0 on a Spark, as llama-batched-bench prints them."""
    with (shared_data / "dgx_spark_benchmarks.csv").open(newline="", encoding="utf-8") as file:
        rows = [
            row
            for row in csv.DictReader(file)
            if row["model"] == "Qwen2.5-Coder-7B-Q8_0" and row["engine"] == "llama.cpp batched-bench"
        ]
    lines = [
        "llama_batched_bench: n_kv_max = 270336, n_batch = 2048, n_ubatch = 2048, flash_attn = 1, is_pp_shared = 0",
        "",
        "|    PP |     TG |    B |   N_KV |   T_PP s | S_PP t/s |   T_TG s | S_TG t/s |      T s |    S t/s |",
        "|-------|--------|------|--------|----------|----------|----------|----------|----------|----------|",
    ]
    for row in rows:
        pp, batch, fast, slow = (
            int(row["prompt_tokens"]),
            int(row["batch"]),
            float(row["prefill_tok_s"]),
            float(row["decode_tok_s"]),
        )
        n_kv, t_pp, t_tg = batch * (pp + 32), batch * pp / fast, batch * 32 / slow
        whole = t_pp + t_tg
        lines.append(
            f"| {pp:5d} | {32:6d} | {batch:4d} | {n_kv:6d} | {t_pp:8.3f} | {fast:8.2f} | {t_tg:8.3f} | {slow:8.2f} "
            f"| {whole:8.3f} | {n_kv / whole:8.2f} |"
        )
    assert len(rows) > 10
    path = tmp_path_factory.mktemp("batched") / "bench.txt"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def qwen() -> ServingConfig:
    return ServingConfig(engine="llama-cpp", model="qwen2.5-coder-7b", quantization="q8_0")


def _cost_of_a_sequence_s(constants: StepConstants, serving: ServingConfig) -> float:
    """What one more sequence with nothing in the cache adds to a step: host work, and arithmetic as far as nothing hides it."""
    deployment = deploy(serving)
    step_time = RooflineStepTime(
        deployment.model,
        deployment.hardware,
        weight_format=deployment.weight_format,
        kv_spec=deployment.model.kv_spec("auto"),
        constants=constants,
    )
    few, many = (next(decode_steps(batch, 1)).batch for batch in (8, 32))
    return (step_time.cost(many, 32).total_s - step_time.cost(few, 8).total_s) / 24


@pytest.mark.parametrize("hardware", ["dgx-spark", "jetson-thor"])
def test_a_published_table_is_fitted_closely_from_any_machine_nearby(batched: Path, qwen: ServingConfig, hardware: str) -> None:
    """From the Spark's own constants and from a machine that has none: what the table says wins."""
    found = study(serving=replace(qwen, hardware=hardware), files=(batched,))
    assert found.speed is not None
    assert float(np.mean(np.abs(found.speed.errors))) < 0.03
    assert set(fitted(found)) >= {"weight_read_bytes_per_s", "linear_flops", "kv_read_bytes_per_s", "sequence_overhead_s"}
    constants = found.speed.found.constants
    assert constants.kv_read_bytes_per_s == pytest.approx(191e9, rel=0.05)
    assert _cost_of_a_sequence_s(constants, qwen) == pytest.approx(0.49e-3, rel=0.2)
    assert found.speed.group["own_spread"].keys() == {"decode", "prefill"}


def test_half_of_a_published_table_foretells_the_other(batched: Path, qwen: ServingConfig, tmp_path: Path) -> None:
    lines = batched.read_text().splitlines()
    head, rows = lines[:4], lines[4:]
    half, rest = tmp_path / "half.txt", tmp_path / "rest.txt"
    half.write_text("\n".join([*head, *rows[::2]]))
    rest.write_text("\n".join([*head, *rows[1::2]]))
    blind = replace(qwen, hardware="jetson-thor")
    machine = written(study(serving=blind, files=(half,)), tmp_path)
    scored, without = (study(serving=replace(qwen, hardware=each), files=(rest,)).speed for each in (machine, "jetson-thor"))
    assert scored is not None
    assert without is not None
    off, blindly = (
        float(
            np.mean(
                [
                    abs(math.log(old / figure.point.measured_tok_s))
                    for old, figure in zip(each.before_tok_s, each.figures, strict=True)
                ]
            )
        )
        for each in (scored, without)
    )
    assert off < 0.04 < blindly


def test_rows_of_several_models_validate_and_say_what_is_left_out(shared_data: Path) -> None:
    serving = ServingConfig(engine="llama-cpp", quantization="q8_0")
    found = study(serving=serving, files=(shared_data / "dgx_spark_benchmarks.csv",))
    assert found.speed is not None
    assert found.speed.doubts == ""
    assert found.speed.group["num_models"] == 2
    reasons = " ".join(each.reason for each in found.left_out)
    for words in ("with q4_0 weights, not q8_0", "of vllm, not of llama-cpp", "of older builds", "verified=no"):
        assert words in reasons


def test_the_screen_shows_rates_whole_and_reasons_once(shared_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["calibrate", str(shared_data / "dgx_spark_benchmarks.csv"), "--engine", "vllm", "--quantization", "fp8"])
    shown = capsys.readouterr().out
    assert shown.startswith("Qwen3.6 27B in fp8 on NVIDIA DGX Spark")  # the model of the rows, not of --model
    assert "decode, batch 10, context 2,048, Qwen3.8-27B (hybrid GDN, dense)" in shown
    assert shown.count("speculative decoding, whose acceptance was not published") == 1
    assert "…" not in shown
    found = study(serving=replace(SERVING, engine="vllm"), files=(shared_data / "dgx_spark_benchmarks.csv",))
    assert found.speed is not None
    assert found.speed.group["kv_cache_dtypes"] == ["fp8"]  # as those rows ran
    assert "a KV cache in fp8, not auto" in found.speed.doubts


def test_two_files_are_fitted_together(batched: Path, qwen: ServingConfig, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text(batched.read_text().replace("|   512 |", "|   513 |"))
    found = study(serving=qwen, files=(batched, other))
    assert found.speed is not None
    assert found.speed.group["source"].startswith("bench.txt, other.txt: 72 figures")
