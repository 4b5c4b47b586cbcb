"""Rates of products by rows: the table, how a hardware file has it, what a step makes of it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedkv.catalogue import load_hardware, load_model
from pagedkv.errors import ConfigError
from pagedkv.hardware_spec import HardwareSpec
from pagedkv.hardware_text import hardware_lines
from pagedkv.model_spec import ModelSpec
from pagedkv.row_rates import MOST_ROWS, RowRates
from pagedkv.sims.calibrate.machine import MeasuredDevice, ReachedByRows, ReachedRate, measured_machine
from pagedkv.sims.calibration import calibration_for
from pagedkv.sims.drafting import Drafting
from pagedkv.sims.reality.real_run import StepLog
from pagedkv.sims.reality.step_fit import fit_steps, step_seconds, step_time
from pagedkv.sims.step_constants import StepConstants, catalogue_constants
from pagedkv.sims.step_formula import step_parts
from pagedkv.sims.step_time import RooflineStepTime
from pagedkv.step_batch import StepBatch, empty_batch
from pagedkv.units import GIB
from pagedkv.weight_format import load_weight_format

SPARK, LLAMA, MOE = load_hardware("dgx-spark"), load_model("llama-3.1-8b"), load_model("gpt-oss-20b")
BF16 = load_weight_format("bf16")


def rates_of(seconds: dict[int, float], *, flops: float = 1e9) -> RowRates:
    """Return the table of products that take so long by rows, with `flops` operations in a row."""
    rates = tuple(flops * rows / its for rows, its in seconds.items())
    return RowRates(rows=tuple(seconds), flops=rates, tag="measured", source="a test")


STAIRS = rates_of({1: 1.0, 3: 1.1, 4: 2.0, 15: 4.0, 16: 2.5, 32: 3.0, 64: 4.5, 512: 26.0})
"""Time goes up in steps, and down once, as on a processor."""
TABLES = st.lists(st.integers(2, 600), min_size=1, max_size=12, unique=True).flatmap(
    lambda rows: st.lists(st.floats(1e-3, 10.0), min_size=len(rows) + 1, max_size=len(rows) + 1).map(
        lambda seconds: rates_of(dict(zip((1, *sorted(rows)), seconds, strict=True)))
    )
)


# --- the table -----------------------------------------------------------------------------------------------------------


@given(table=TABLES)
def test_time_is_linear_between_the_rows_measured(table: RowRates) -> None:
    effective, last = table.effective_rows(), table.rows[-1]
    assert effective.size == last + 1
    assert (effective[0], effective[last]) == (0.0, pytest.approx(last))
    seconds = effective / table.full_flops
    for low, high, its, other in zip(table.rows, table.rows[1:], table.flops, table.flops[1:], strict=False):
        first, second = low / its, high / other
        for rows in (low, (low + high) // 2, high - 1):
            assert seconds[rows] == pytest.approx(first + (second - first) * (rows - low) / (high - low))
            assert min(first, second) * (1 - 1e-12) <= seconds[rows] <= max(first, second) * (1 + 1e-12)


@given(table=TABLES)
def test_where_measured_times_ascend_all_do(table: RowRates) -> None:
    times = np.sort(np.array(table.rows) / np.array(table.flops))
    ascending = rates_of(dict(zip(table.rows, times.tolist(), strict=True)))
    assert (np.diff(ascending.effective_rows()[1:]) >= -1e-9).all()


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"rows": (2, 4)}, r"rows are \[2, 4\]: needs two or more, the first of them 1"),
        ({"rows": (1,), "flops": (1e9,)}, "needs two or more"),
        ({"rows": (1, 1)}, "rows go from 1 to 1: they must ascend"),
        ({"rows": (1, 2, 4)}, "3 numbers of rows and 2 rates: needs a rate for each"),
        ({"rows": (1, MOST_ROWS + 1)}, f"the last rows are {MOST_ROWS + 1}: needs {MOST_ROWS} at most"),
        ({"flops": (1e9, 0.0)}, "the rate for rows = 2 is 0: it must be above 0"),
        ({"flops": (1e9, np.nan)}, "the rate for rows = 2 is nan"),
        ({"source": " "}, "no source"),
    ],
)
def test_what_is_no_table(wrong: dict[str, Any], why: str) -> None:
    right = {"rows": (1, 2), "flops": (1e9, 2e9), "tag": "measured", "source": "a test"}
    RowRates(**right)
    with pytest.raises(ConfigError, match=why):
        RowRates(**right | wrong)


# --- in a hardware file --------------------------------------------------------------------------------------------------


def with_rates(table: RowRates, machine: HardwareSpec = SPARK, weights: str = "bf16") -> HardwareSpec:
    return replace(machine, linear_by_rows={weights: table})


def in_a_file(tmp_path: Path, text: str) -> HardwareSpec:
    path = tmp_path / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return load_hardware(str(path))


@pytest.mark.parametrize("like", [SPARK, None])
def test_the_table_survives_being_written(like: HardwareSpec | None, tmp_path: Path) -> None:
    exact = replace(STAIRS, flops=tuple(float(f"{rate:.4g}") for rate in STAIRS.flops))
    again = in_a_file(tmp_path, "\n".join(hardware_lines(with_rates(exact), like=like)))
    assert again.linear_by_rows == {"bf16": exact}
    assert list(hardware_lines(again, like=like)) == list(hardware_lines(with_rates(exact), like=like))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("linear_by_rows = 3", "linear_by_rows must be tables by weight type, such as fp32 = "),
        ('linear_by_rows.fp8 = { rows = [1, 2], rates = ["1 TFLOPS", "2 TFLOPS"] }', "linear_by_rows.fp8"),
        ("linear_by_rows.bf16 = [1, 2]", "linear_by_rows.bf16 must be a table with rows and rates"),
        ("linear_by_rows.bf16 = { rows = [1, 2] }", "linear_by_rows.bf16.rates is missing"),
        ('linear_by_rows.bf16 = { rows = [1, 2.5], rates = ["1 TFLOPS", "2 TFLOPS"] }', r"rows must be a list of whole numbers"),
        ('linear_by_rows.bf16 = { rows = [1, 2], rates = "1 TFLOPS" }', "rates must be a list of compute rates"),
        ('linear_by_rows.bf16 = { rows = [1, 2], rates = ["1 TFLOPS", 2] }', r"rates\[1\] 2 has no unit"),
        ('linear_by_rows.bf16 = { rows = [1, 2], rates = ["1 TFLOPS", "2 GB/s"] }', "is a bandwidth"),
        ('linear_by_rows.bf16 = { rows = [2, 1], rates = ["1 TFLOPS", "2 TFLOPS"] }', "the first of them 1"),
        ('linear_by_rows.bf16 = { rows = [1, 2], rates = ["1 TFLOPS"] }', "needs a rate for each"),
        ('linear_by_rows.bf16 = { rows = [1, 2], rates = ["1 TFLOPS", "2 TFLOPS"], tag = "measured" }', "source is missing"),
        (
            'linear_by_rows.bf16 = { rows = [1, 2], rates = ["1 TFLOPS", "2 TFLOPS"], tag = "guessed", source = "x" }',
            "guessed",
        ),
    ],
)
def test_a_file_with_a_bad_table_is_refused(text: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=why):
        in_a_file(tmp_path, f'like = "dgx-spark"\n{text}\n')


def test_what_was_measured_becomes_the_table(tmp_path: Path) -> None:
    def rate(value: float) -> ReachedRate:
        return ReachedRate(what="torch's linear", value=value, low=0.9 * value, high=1.1 * value, num_samples=5)

    reached = ReachedByRows(weights="fp32", rows=(1, 2, 8), rates=tuple(map(rate, (1.23456e10, 2e10, 3e10))))
    device = MeasuredDevice(
        name="A processor",
        kind="cpu",
        memory_bytes=8 * GIB,
        available_bytes=None,
        read=rate(1e10),
        copy=rate(1e10),
        kv_read=rate(1e10),
        product=rate(1e11),
        by_rows=reached,
    )
    measured = measured_machine([device], date="2026-11-29", name="mine.toml")
    table = in_a_file(tmp_path, measured.toml()).linear_by_rows["fp32"]
    assert (table.rows, table.flops, table.tag) == ((1, 2, 8), (1.235e10, 2e10, 3e10), "measured")
    assert "A processor, 2026-11-29: medians of 5, as a rule 20% apart" in table.source
    assert measured.document()["devices"][0]["by_rows"]["rows"] == [1, 2, 8]


# --- in a step -----------------------------------------------------------------------------------------------------------


def constants_with(table: RowRates | None, **changes: Any) -> StepConstants:
    return replace(catalogue_constants(SPARK, BF16), row_rates=table, **changes)


def steps_of(constants: StepConstants, model: ModelSpec = LLAMA) -> RooflineStepTime:
    return step_time(model, SPARK, constants, weight_format=BF16, kv_cache_dtype="auto")


def batch_of(entries: list[tuple[int, int]]) -> StepBatch:
    batch = empty_batch(len(entries))
    for i, (new, before) in enumerate(entries):
        batch["num_scheduled_tokens"][i], batch["num_slots_needed"][i] = new, new + before
        batch["num_known_tokens"][i] = new + before
    return batch


ENTRIES = st.lists(st.tuples(st.integers(1, 40) | st.just(1), st.integers(0, 3000)), min_size=1, max_size=40)


@given(entries=ENTRIES, overlap=st.sampled_from([1.0, 2.5, np.inf]))
def test_without_a_table_products_are_their_operations_to_the_last_bit(entries: list[tuple[int, int]], overlap: float) -> None:
    steps, batch = steps_of(constants_with(None, overlap=overlap)), batch_of(entries)
    c = steps.coefficients.model
    parts = step_parts(c, batch, batch.size)
    tokens = int(batch["num_scheduled_tokens"].sum())
    assert parts.products == parts.linear == c.linear_s_per_token * tokens + c.head_s_per_sequence * batch.size
    assert (c.effective_rows.size, c.linear_overlap) == (0, overlap)


@given(entries=ENTRIES)
def test_a_table_that_says_nothing_new_changes_nothing(entries: list[tuple[int, int]]) -> None:
    flat = rates_of({rows: 1.0 * rows for rows in range(1, 65)})
    batch = batch_of(entries)
    with_table, without = (steps_of(constants_with(table)).cost(batch, batch.size) for table in (flat, None))
    assert with_table == pytest.approx(without, rel=1e-12)


@given(entries=ENTRIES, reading=st.floats(1e9, 1e13))
def test_a_step_takes_what_its_rows_were_measured_to_take(entries: list[tuple[int, int]], reading: float) -> None:
    """Against the formula in plain Python: the longer of reading weights and products of so many rows."""
    constants, batch = constants_with(STAIRS, weight_read_bytes_per_s=reading, overlap=1.0), batch_of(entries)
    tokens = sum(new for new, _ in entries)

    def flops_as_full(rows: int) -> float:
        """Rows that take as long at the full rate: by hand, between two that were measured."""
        if rows >= STAIRS.rows[-1]:
            return rows
        above = next(i for i, each in enumerate(STAIRS.rows) if each > rows)
        low, high = STAIRS.rows[above - 1], STAIRS.rows[above]
        first, second = low / STAIRS.flops[above - 1], high / STAIRS.flops[above]
        return (first + (second - first) * (rows - low) / (high - low)) * STAIRS.full_flops

    body = LLAMA.flops_per_token - 2 * LLAMA.head_params
    products_s = (body * flops_as_full(tokens) + 2 * LLAMA.head_params * flops_as_full(len(entries))) / constants.linear_flops
    linear_s = max(LLAMA.dense_streamed_bytes(BF16) / reading, products_s)
    kv_s = sum(before + 2 * new for new, before in entries) * LLAMA.kv_spec("auto").bytes_per_token / constants.kv_read_bytes_per_s
    pairs = sum(new * before + new * (new + 1) / 2 for new, before in entries)
    attention_s = pairs * sum(LLAMA.group_attention_flops_per_pair) / constants.attention_flops
    overhead_s = constants.step_overhead_s + constants.sequence_overhead_s * len(entries)
    found = steps_of(constants).cost(batch, batch.size)
    assert found.total_s == pytest.approx(linear_s + kv_s + attention_s + overhead_s, rel=1e-9)
    arithmetic = body * tokens + 2 * LLAMA.head_params * len(entries)  # the operations stay what they are, and what binds does
    plain = steps_of(constants_with(None)).cost(batch, batch.size)
    assert found.arithmetic_s == pytest.approx(plain.arithmetic_s, rel=1e-9)
    reads = LLAMA.dense_streamed_bytes(BF16) / reading >= arithmetic / constants.linear_flops
    assert (found.memory_s >= linear_s * (1 - 1e-9)) == reads or linear_s < kv_s + attention_s


@given(entries=ENTRIES)
def test_the_fit_prices_steps_as_the_simulator_does(entries: list[tuple[int, int]]) -> None:
    batch, constants = batch_of(entries), constants_with(STAIRS, overlap=3.0, batched_layer_overhead_s=1e-5)
    log = StepLog(batches=(batch,), seconds=np.ones(1))
    ours = step_seconds(log, LLAMA, constants, weight_format=BF16, kv_cache_dtype="auto")[0]
    assert ours == pytest.approx(steps_of(constants).cost(batch, batch.size).total_s, rel=1e-9)


def test_a_mixture_has_no_rows_of_its_own() -> None:
    batch = batch_of([(1, 100)] * 20)
    with_table, without = (steps_of(constants_with(table), MOE).cost(batch, 20) for table in (STAIRS, None))
    assert with_table == without


def test_passes_of_a_draft_model_go_by_rows_if_its_weights_were_measured() -> None:
    batch = batch_of([(1, 100)] * 20)

    def took(table: RowRates | None, passes: int, weights: str = "bf16") -> float:
        drafting = Drafting(
            method="draft-model",
            num_tokens=2,
            acceptance_rate=0.7,
            acceptance_spread=0.0,
            model=LLAMA,
            num_passes=passes,
            shares_tables=False,
            weight_format=load_weight_format(weights),
        )
        steps = RooflineStepTime(
            LLAMA,
            SPARK,
            weight_format=BF16,
            kv_spec=LLAMA.kv_spec("auto"),
            drafting=drafting if passes else None,
            constants=constants_with(table, linear_flops=4e12),
        )
        return steps.cost(batch, batch.size).total_s

    more = took(STAIRS, 0) - took(None, 0)
    assert more > 0
    for passes in (1, 3):
        assert took(STAIRS, passes) - took(None, passes) == pytest.approx((1 + passes) * more)
        assert took(STAIRS, passes, "fp8") - took(None, passes, "fp8") == pytest.approx(more)


def test_fitted_groups_do_not_know_the_table_and_a_machine_s_own_figures_do() -> None:
    spark, l40s = with_rates(STAIRS), with_rates(STAIRS, load_hardware("l40s"))
    fp8 = load_weight_format("fp8")
    for engine, fmt in (("llama-cpp", BF16), ("vllm", fp8)):
        with_table, without = (calibration_for(each, engine, fmt, "auto", model=LLAMA) for each in (spark, SPARK))
        assert with_table == without
        assert with_table.num_figures > 0
    own = calibration_for(l40s, "vllm", BF16, "auto", model=LLAMA).constants
    assert (own.row_rates, own.linear_flops) == (STAIRS, STAIRS.full_flops)
    assert calibration_for(l40s, "vllm", fp8, "auto", model=LLAMA).constants.row_rates is None  # these were not measured
    assert calibration_for(l40s.derated(0.5), "vllm", BF16, "auto", model=LLAMA).constants.row_rates is None


def test_steps_of_few_rows_foretell_steps_of_many_with_the_table_only() -> None:
    true = constants_with(STAIRS, linear_flops=4e12, step_overhead_s=4e-3, sequence_overhead_s=2e-4)
    rng = np.random.default_rng(2)

    def log_of(sizes: tuple[int, int]) -> StepLog:
        batches = []
        for _ in range(200):
            prompts = [(int(rng.integers(20, 200)), 0)] if rng.random() < 0.2 else []
            batches.append(batch_of([*prompts, *[(1, int(rng.integers(50, 400)))] * int(rng.integers(*sizes))]))
        bare = StepLog(batches=tuple(batches), seconds=np.zeros(200))
        return replace(bare, seconds=step_seconds(bare, LLAMA, true, weight_format=BF16, kv_cache_dtype="auto"))

    few, many = log_of((1, 13)), log_of((16, 33))
    off = {}
    for table in (STAIRS, None):
        prior = constants_with(table, linear_flops=6e12)
        fitted = fit_steps([few], LLAMA, weight_format=BF16, kv_cache_dtype="auto", prior=prior)
        ours = step_seconds(many, LLAMA, fitted, weight_format=BF16, kv_cache_dtype="auto")
        off[table] = abs(ours.sum() / many.seconds.sum() - 1)
    assert off[STAIRS] < 0.03
    assert off[None] > 0.2
