"""What a layer's matrix product reaches by rows, measured with torch, which the runtime multiplies with.

A library picks other kernels and tiles by the number of rows, so that time goes up in steps, and sometimes down: no formula of
operations and bytes says that.
"""

import time
from collections.abc import Callable, Sequence

from pagedkv.kernels.contract import KernelError
from pagedkv.kernels.machine_rates import RowSamples, Samples

try:
    import torch
except ImportError as absent:
    raise KernelError("measuring products by rows needs torch: pip install 'pagedkv[kernels]'") from absent

from pagedkv.kernels.bench_timing import time_s

ROWS = (*range(1, 33), 40, 48, 64, 96, 128, 192, 256, 384, 512)
"""Rows on a processor: each number of a batch that decodes, where kernels change, then those of prompts."""
GPU_ROWS = (*ROWS, 768, 1024, 2048, 4096)
"""On a GPU, which is busy with more."""
_MANY = 32
"""More rows are multiplied with a quarter of the matrices at a time: they take long enough, and reading no longer counts."""
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_SIZES = {"cpu": (2048, 1 << 28), "cuda": (4096, 1 << 29)}
"""Rows and columns of a matrix, and bytes of all: a GPU needs more of both to be busy."""
_GPU_REPEATS = 3
"""Samples behind each value on a GPU: their median."""


def measure_rows(
    device: str,
    weights: str,
    *,
    rows: Sequence[int] = (),
    num_bytes: int | None = None,
    size: int | None = None,
    rounds: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> RowSamples:
    """Measure and return what products of `rows` rows with square matrices reach.

    Args:
        device: cpu (as many threads as torch takes) or cuda.
        weights: Their type: fp32, bf16 or fp16.
        rows: Numbers of rows, ascending from 1; empty: those of the device.
        num_bytes: Of all matrices, which are taken in turn: more than a core's caches hold; None: as usual on the device.
        size: Rows and columns of a matrix; None: as usual.
        rounds: How often each figure is taken.
        clock: What a processor's times are taken with, in seconds.

    Raises:
        KernelError: If torch finds no such device, or the type is another.
    """
    if weights not in _DTYPES:
        raise KernelError(f"weights are {weights!r}: needs {', '.join(_DTYPES)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise KernelError("torch finds no CUDA device")
    where, dtype = torch.device(device), _DTYPES[weights]
    chosen = tuple(rows) or (GPU_ROWS if device == "cuda" else ROWS)
    usual_size, usual_bytes = _SIZES[device]
    size, num_bytes = size or usual_size, num_bytes or usual_bytes
    count = max(1, num_bytes // (size * size * dtype.itemsize))
    matrices = [torch.randn(size, size, device=where).to(dtype) for _ in range(count)]
    taken: dict[int, list[float]] = {number: [] for number in chosen}
    with torch.no_grad():
        for _ in range(rounds + 1):
            for number in chosen:
                x = torch.randn(1, number, size, device=where).to(dtype)
                seconds = _seconds(x, matrices if number <= _MANY else matrices[: -(-count // 4)], clock)
                taken[number].append(2.0 * number * size * size / seconds)
    threads = f", {torch.get_num_threads()} threads" if device == "cpu" else ""
    return RowSamples(
        weights=weights,
        rows=chosen,
        flops=tuple(Samples(values=tuple(taken[number][1:])) for number in chosen),  # the first round wakes everything up
        by=f"torch {torch.__version__} linear of {weights}, {count} matrices of {size} × {size}{threads}",
    )


def _seconds(x: torch.Tensor, matrices: Sequence[torch.Tensor], clock: Callable[[], float]) -> float:
    """Return the seconds of a product of `x` with one of the matrices."""
    linear = torch.nn.functional.linear
    if x.device.type == "cuda":
        return time_s(lambda i: linear(x, matrices[i]), len(matrices), x.device, repeats=_GPU_REPEATS)[0]
    start = clock()
    for matrix in matrices:
        linear(x, matrix)
    return (clock() - start) / len(matrices)
