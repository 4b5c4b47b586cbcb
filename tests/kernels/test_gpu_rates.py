"""What measures a GPU runs whole without one, and says so where there is none."""

import pytest

torch = pytest.importorskip("torch", reason="measuring a GPU needs torch")

from pagedkv.kernels.bench_problem import Shape, tiny  # noqa: E402
from pagedkv.kernels.contract import KernelError  # noqa: E402
from pagedkv.kernels.gpu_rates import has_gpu, measure_gpu  # noqa: E402


def test_every_rate_is_sampled() -> None:
    found = measure_gpu(num_bytes=1 << 16, size=32, shape=tiny(Shape(batch=1, context=16)), rounds=2, device="cpu")
    for samples in (found.read, found.copy, found.kv_read, found.product):
        assert len(samples.values) == 2
        assert 0 < samples.low <= samples.median <= samples.high
    assert found.product_by == "torch.matmul of bf16, 32 × 32 × 32"


@pytest.mark.skipif(has_gpu(), reason="there is a GPU")
def test_no_gpu_is_said() -> None:
    with pytest.raises(KernelError, match="torch finds no CUDA device"):
        measure_gpu()


@pytest.mark.skipif(not has_gpu(), reason="torch finds no GPU")
def test_a_gpu_is_measured() -> None:
    found = measure_gpu(num_bytes=1 << 26, size=1024, rounds=2)
    assert found.memory_bytes is not None
    assert found.read.median > 1e9
