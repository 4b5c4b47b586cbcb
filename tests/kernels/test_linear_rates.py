"""Products by rows, measured on whatever is there."""

import time

import pytest

torch = pytest.importorskip("torch", reason="products are measured with torch")

from pagedkv.kernels.contract import KernelError  # noqa: E402
from pagedkv.kernels.linear_rates import GPU_ROWS, ROWS, measure_rows  # noqa: E402
from pagedkv.row_rates import RowRates  # noqa: E402


@pytest.mark.parametrize("weights", ["fp32", "bf16", "fp16"])
def test_every_number_of_rows_is_sampled(weights: str) -> None:
    found = measure_rows("cpu", weights, rows=(1, 2, 5, 40), num_bytes=1 << 18, size=64, rounds=2, clock=time.perf_counter)
    assert (found.weights, found.rows) == (weights, (1, 2, 5, 40))
    for samples in found.flops:
        assert len(samples.values) == 2
        assert all(value > 0 for value in samples.values)
    count = {"fp32": 16, "bf16": 32, "fp16": 32}[weights]
    assert f"linear of {weights}, {count} matrices of 64 × 64" in found.by


def test_this_processor_gives_a_table() -> None:
    found = measure_rows("cpu", "fp32", num_bytes=1 << 16, size=64, rounds=1)
    rates = tuple(samples.median for samples in found.flops)
    table = RowRates(rows=found.rows, flops=rates, tag="measured", source=found.by)
    assert (table.effective_rows()[1:] > 0).all()


@pytest.mark.parametrize("rows", [ROWS, GPU_ROWS])
def test_every_batch_that_is_small_is_measured(rows: tuple[int, ...]) -> None:
    assert rows[:32] == tuple(range(1, 33))
    assert sorted(set(rows)) == list(rows)


def test_what_cannot_be_measured_is_said() -> None:
    with pytest.raises(KernelError, match="weights are 'fp8': needs fp32, bf16, fp16"):
        measure_rows("cpu", "fp8")
    if not torch.cuda.is_available():
        with pytest.raises(KernelError, match="torch finds no CUDA device"):
            measure_rows("cuda", "bf16")
