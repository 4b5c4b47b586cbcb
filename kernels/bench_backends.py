"""What the kernel benchmark compares: each entry prepares a problem and returns the call to time.

Whoever plans once per step (FlashInfer) plans here, outside the timed part; whoever gathers does so inside.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch

from pagedkv.kernels.bench_problem import Problem
from pagedkv.kernels.contract import need
from pagedkv.kernels.dispatch import simulated, why_not

Run = Callable[[int], torch.Tensor]
"""Decodes the copy of that number and returns [batch, num_q_heads, head_dim]."""


def _arguments(problem: Problem) -> Callable[[int], tuple[torch.Tensor, ...]]:
    p = problem
    return lambda copy: (p.queries[copy], p.k_cache, p.v_cache, p.block_tables[copy], p.cache_seqlens)


def _need_device(problem: Problem, backend: str, simulation: str) -> None:
    """Raise KernelError unless the GPU backend can read the problem: on a GPU, or simulated."""
    hint = f"; {simulation}=1 runs it on the CPU, slowly"
    need(why_not(backend) is None, f"{why_not(backend)}{hint}")
    need(problem.device.type == "cuda" or simulated(backend), f"the data is on the CPU{hint}")


def triton(problem: Problem) -> Run:
    """Return this project's fast kernel."""
    _need_device(problem, "triton", "TRITON_INTERPRET")
    from pagedkv.kernels.triton_decode import decode  # noqa: PLC0415

    arguments, longest = _arguments(problem), max(problem.lengths)
    return lambda copy: torch.as_tensor(decode(*arguments(copy), max_seqlen=longest))


def cuda(problem: Problem) -> Run:
    """Return this project's readable kernel."""
    _need_device(problem, "cuda", "NUMBA_ENABLE_CUDASIM")
    need(problem.shape.dtype != "fp8", "reads no fp8")
    from pagedkv.kernels.cuda import decode  # noqa: PLC0415
    from pagedkv.kernels.cuda_kernel import THREADS  # noqa: PLC0415

    arguments, threads = _arguments(problem), 16 if simulated("cuda") else THREADS
    return lambda copy: torch.as_tensor(decode(*arguments(copy), threads=threads))


def cpu(problem: Problem) -> Run:
    """Return this project's CPU kernel, the checks of a call included."""
    from pagedkv.kernels.contract import check_call  # noqa: PLC0415
    from pagedkv.kernels.cpu import attend  # noqa: PLC0415

    need(problem.device.type == "cpu", "the data is on the GPU")
    need(problem.shape.dtype != "fp8", "reads no fp8")
    arguments = _arguments(problem)
    return lambda copy: torch.from_numpy(attend(check_call(*arguments(copy)))[0])


def sdpa(problem: Problem) -> Run:
    """Return torch's attention on keys and values that are gathered first, which is timed too."""
    dense = _gather(problem)
    return lambda copy: _sdpa(problem, copy, *dense(copy))


def sdpa_dense(problem: Problem) -> Run:
    """Return torch's attention on keys and values that lie in order already: no paging, for comparison."""
    dense = [tuple(part.contiguous() for part in _gather(problem)(copy)) for copy in range(problem.copies)]
    return lambda copy: _sdpa(problem, copy, *dense[copy])


def _gather(problem: Problem) -> Callable[[int], tuple[torch.Tensor, torch.Tensor]]:
    def gathered(cache: torch.Tensor, copy: int) -> torch.Tensor:
        blocks = problem.block_tables[copy].clamp(min=0).long()
        stored = cache.view(torch.uint8) if problem.shape.dtype == "fp8" else cache  # torch indexes no fp8 on the CPU
        return stored[blocks].view(cache.dtype).flatten(1, 2).transpose(1, 2).to(problem.q_dtype)

    return lambda copy: (gathered(problem.k_cache, copy), gathered(problem.v_cache, copy))


def _sdpa(problem: Problem, copy: int, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    mask = None
    if problem.shape.ragged or keys.shape[2] != problem.shape.context:
        mask = (torch.arange(keys.shape[2], device=problem.device) < problem.cache_seqlens[:, None])[:, None, None, :]
    q = problem.queries[copy][:, :, None]
    return torch.nn.functional.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=True)[:, :, 0]


def varlen(problem: Problem) -> Run:
    """Return torch's own paged attention, where torch has it (2.13)."""
    need(problem.device.type == "cuda", "no GPU")
    from torch.nn.attention.varlen import varlen_attn  # noqa: PLC0415

    takes = inspect.signature(varlen_attn).parameters
    need("block_table" in takes, f"varlen_attn of torch {torch.__version__} takes no block table; 2.13 does")
    need(problem.shape.dtype in ("bfloat16", "float16"), f"reads no {problem.shape.dtype}")
    starts = torch.arange(problem.shape.batch + 1, dtype=torch.int32, device=problem.device)
    longest = max(problem.lengths)

    def run(copy: int) -> torch.Tensor:
        out: Any = varlen_attn(
            problem.queries[copy], problem.k_cache, problem.v_cache, starts, None, 1, longest,
            enable_gqa=True, seqused_k=problem.cache_seqlens, block_table=problem.block_tables[copy],
        )  # fmt: skip
        return torch.as_tensor(out)

    return run


def _flashinfer(problem: Problem, *, use_tensor_cores: bool) -> Run:
    need(problem.device.type == "cuda", "no GPU")
    shape = problem.shape
    need(shape.head_dim in (64, 128, 256), f"compiles no heads of {shape.head_dim}")
    import flashinfer  # noqa: PLC0415

    lengths = torch.tensor(problem.lengths, dtype=torch.int32)
    counts = (lengths + shape.block_size - 1) // shape.block_size
    starts = torch.cat([torch.zeros(1, dtype=torch.int32), counts.cumsum(0, dtype=torch.int32)]).to(problem.device)
    last = (lengths - (counts - 1) * shape.block_size).to(problem.device)
    planned, workspace = [], torch.empty(128 << 20, dtype=torch.uint8, device=problem.device)  # one for all: they run in turn
    for copy in range(problem.copies):
        table = problem.block_tables[copy]
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=use_tensor_cores)
        wrapper.plan(
            starts, table[table >= 0], last, shape.num_q_heads, shape.num_kv_heads, shape.head_dim, shape.block_size,
            q_data_type=problem.q_dtype, kv_data_type=problem.k_cache.dtype,
        )  # fmt: skip
        planned.append(wrapper)
    return lambda copy: torch.as_tensor(planned[copy].run(problem.queries[copy], (problem.k_cache, problem.v_cache)))


def flashinfer_cuda_cores(problem: Problem) -> Run:
    """Return FlashInfer's decode kernel on ordinary cores."""
    return _flashinfer(problem, use_tensor_cores=False)


def flashinfer_tensor_cores(problem: Problem) -> Run:
    """Return FlashInfer's prefill kernel used for decoding, on tensor cores."""
    return _flashinfer(problem, use_tensor_cores=True)


BACKENDS: dict[str, Callable[[Problem], Run]] = {
    "triton": triton,
    "cuda": cuda,
    "cpu": cpu,
    "torch gather + SDPA": sdpa,
    "torch SDPA, not paged": sdpa_dense,
    "torch varlen_attn": varlen,
    "FlashInfer": flashinfer_cuda_cores,
    "FlashInfer, tensor cores": flashinfer_tensor_cores,
}
COMPILES_FOR_MINUTES = ("FlashInfer", "FlashInfer, tensor cores")
"""Backends that call nvcc when a shape is first used."""

OURS = {"cuda": "triton", "cpu": "cpu"}
"""By the kind of device: the backend of this project that is compared with the others."""
