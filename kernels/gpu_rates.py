"""What this machine's GPU reaches: the same figures as `cpu_rates`, measured with torch and the Triton decode kernel."""

from pagedkv.kernels.contract import KernelError
from pagedkv.kernels.machine_rates import MachineRates, Samples

try:
    import torch
except ImportError as absent:
    raise KernelError("measuring a GPU needs torch: pip install 'pagedkv[kernels]'") from absent

from pagedkv.kernels.bench_backends import BACKENDS, OURS
from pagedkv.kernels.bench_problem import LARGE, Problem, Shape
from pagedkv.kernels.bench_timing import measure_bandwidth, time_s, wake

_REPEATS = 3
"""Samples behind each value: their median."""


def has_gpu() -> bool:
    """Return whether torch finds a CUDA device."""
    return bool(torch.cuda.is_available())


def measure_gpu(
    *, num_bytes: int = 1 << 30, size: int = 8192, shape: Shape = LARGE, rounds: int = 7, device: str = "cuda"
) -> MachineRates:
    """Measure and return what the GPU reaches.

    Args:
        num_bytes: Memory that is copied at a time, more than the caches hold.
        size: Rows and columns of the bf16 matrices.
        shape: The decode step.
        rounds: How often each figure is taken.
        device: Where: "cuda"; "cpu" runs the same code without a GPU, for a test of it.

    Raises:
        KernelError: If torch finds no such device.
    """
    if device == "cuda" and not has_gpu():
        raise KernelError("torch finds no CUDA device")
    where = torch.device(device)
    a, b = (torch.randn(size, size, device=where, dtype=torch.bfloat16) for _ in range(2))
    problem = Problem(shape, where, cache_bytes=num_bytes // 2, seed=0)
    decode = BACKENDS[OURS[device]](problem)
    wake(where)
    read, copy, kv_read, product = [], [], [], []
    for _ in range(rounds):
        moved = measure_bandwidth(where, num_bytes=num_bytes, repeats=_REPEATS)
        read.append(moved["read_bytes_per_s"])
        copy.append(moved["copy_bytes_per_s"])
        kv_read.append(problem.floor_bytes / time_s(decode, problem.copies, where, repeats=_REPEATS)[0])
        product.append(2.0 * size**3 / time_s(lambda i: torch.matmul(a, b), 1, where, repeats=_REPEATS)[0])
    total = int(torch.cuda.mem_get_info(where)[1]) if device == "cuda" else None
    return MachineRates(
        device=torch.cuda.get_device_name(where) if device == "cuda" else "cpu",
        kind="cuda",
        threads=None,
        memory_bytes=total,
        available_bytes=None,
        read=Samples(values=tuple(read)),
        copy=Samples(values=tuple(copy)),
        kv_read=Samples(values=tuple(kv_read)),
        product=Samples(values=tuple(product)),
        product_by=f"torch.matmul of bf16, {size} × {size} × {size}",
    )
