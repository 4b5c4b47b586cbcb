"""Every GPU kernel compiles for an H200 and a DGX Spark, without a GPU, and fits: nothing spills, shared memory is there."""

import re
from typing import Any

import gpu_compile
import pytest

CAPABILITIES = [90, 121]
SHAPES: dict[str, dict[str, Any]] = {
    "bf16": {},
    "bf16, all features": {"HAS_SOFTCAP": True, "HAS_SINKS": True},
    "fp16": {"q": "fp16", "kv": "fp16"},
    "fp32": {"q": "fp32", "kv": "fp32"},
    "fp8": {"kv": "fp8e4nv"},
    "MHA": {"group": 1},
    "MHA, fp8": {"group": 1, "kv": "fp8e4nv"},
    "MHA, fp32": {"group": 1, "q": "fp32", "kv": "fp32"},
    "group of 8": {"group": 8},
    "group of 7": {"group": 7},
    "group of 32": {"group": 32},
    "head of 64": {"head_dim": 64},
    "head of 64, MHA, fp32": {"head_dim": 64, "group": 1, "q": "fp32", "kv": "fp32"},
    "head of 80": {"head_dim": 80},
    "head of 256": {"head_dim": 256},
    "head of 256, fp8": {"head_dim": 256, "kv": "fp8e4nv"},
    "head of 512": {"head_dim": 512},
    "head of 512, fp32": {"head_dim": 512, "q": "fp32", "kv": "fp32"},
    "head of 8": {"head_dim": 8},
    "blocks of 7": {"block_size": 7},
    "blocks of 128": {"block_size": 128},
}


@pytest.fixture(scope="module", autouse=True)
def _assembler() -> None:
    """Both kinds of kernels are assembled by the ptxas in Triton's wheel."""
    pytest.importorskip("triton", reason="compiling ahead of time needs triton, with its ptxas")
    pytest.importorskip("torch", reason="the Triton kernels need torch")


def fits(built: gpu_compile.Compiled) -> bool:
    assert built.spilled_bytes == 0, built
    assert built.shared_bytes <= {90: 227, 121: 99}[built.capability] * 1024, built
    assert built.fits
    assert 0 < built.registers <= 255
    return True


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kernel", ["decode", "prefill"])
def test_triton(kernel: str, shape: str, capability: int) -> None:
    assert fits(gpu_compile.compile_kernel(kernel, capability, **SHAPES[shape]))


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("shape", [{"group": 64}, {"group": 1, "q": "fp32", "kv": "fp32"}], ids=str)
def test_the_widest_heads_decode(shape: dict[str, Any], capability: int) -> None:
    assert fits(gpu_compile.compile_kernel("decode", capability, head_dim=512, **shape))


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_merge(capability: int) -> None:
    assert fits(gpu_compile.compile_kernel("merge", capability))


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("shape", ["bf16", "MHA", "head of 80"])
def test_tiles_come_asynchronously_16_bytes_at_a_time(shape: str, capability: int) -> None:
    ptx = gpu_compile.compile_kernel("decode", capability, **SHAPES[shape]).ptx
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], (0x\w+|\d+)", ptx)
    assert {int(size, 0) for size in copies} == {4, 16}  # 4: an entry of the block table
    assert sum(int(size, 0) == 16 for size in copies) >= 8


def test_two_blocks_of_decode_fit_a_multiprocessor_of_a_spark() -> None:
    built = gpu_compile.compile_kernel("decode", 121)
    assert 2 * (built.shared_bytes + 1024) <= 100 * 1024  # the system keeps 1 KB per thread block
    assert 2 * 128 * built.registers <= 65536


def test_a_kernel_that_spills_would_be_found() -> None:
    spilling = gpu_compile.compile_kernel("prefill", 121, num_warps=4)
    assert spilling.spilled_bytes > 0
    assert not spilling.fits


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"kind": "float16", "group": 8},
        {"head_dim": 256, "kind": "float32", "group": 1},
        {"group": 32},
        {"group": 71, "head_dim": 64},
    ],
    ids=str,
)
def test_numba(shape: dict[str, Any], capability: int) -> None:
    pytest.importorskip("numba_cuda", reason="compiling the readable kernel needs numba-cuda")
    pytest.importorskip("cuda.bindings", reason="compiling the readable kernel needs numba-cuda's NVVM")
    built = gpu_compile.compile_numba(capability, **shape)
    assert fits(built)
    merge = gpu_compile.compile_numba_merge(capability)
    assert fits(merge)
    assert ".f64" not in merge.ptx
    assert built.shared_bytes <= 48 * 1024  # more would need an opt-in
    assert ".f64" not in built.ptx  # double precision is slow on a Spark
    assert len(re.findall(r"\bld\.(?:global\.)?[ub]64", built.ptx)) >= 2  # keys and values, 8 bytes at a time
    assert f".target sm_{capability}" in built.ptx
