"""Compile the GPU kernels ahead of time, on any machine: what each costs in registers, spilled bytes and shared memory."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

SHARED_LIMIT_BYTES = {90: 227 * 1024, 121: 99 * 1024}
"""Shared memory of one thread block by compute capability.

Source: CUDA C++ Programming Guide, technical specifications per compute capability: 227 KB for 9.0, 99 KB for 12.x.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """One kernel compiled for one compute capability."""

    name: str
    """Kernel and configuration."""
    capability: int
    """90 is an H100 or H200, 121 a DGX Spark."""
    registers: int
    """Per thread."""
    spilled_bytes: int
    """Stores and loads of registers that did not fit, per thread."""
    shared_bytes: int
    """Per thread block, static and dynamic."""
    ptx: str
    """What the machine code was made from."""

    @property
    def fits(self) -> bool:
        """Whether nothing spills and a thread block's shared memory is there."""
        return self.spilled_bytes == 0 and self.shared_bytes <= SHARED_LIMIT_BYTES[self.capability]


def _ptxas(ptx: str, capability: int) -> dict[str, int]:
    """Assemble `ptx` with the assembler in Triton's wheel and return what it reports."""
    import triton  # noqa: PLC0415  a heavy import, needed only here

    assembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas-blackwell"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx, encoding="utf-8")
        target = re.search(r"\.target\s+(\w+)", ptx)
        assert target is not None
        done = subprocess.run(
            [assembler, "-v", f"-arch={target[1]}", source, "-o", Path(folder) / "kernel.cubin"],
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        raise RuntimeError(f"ptxas rejects the kernel for compute capability {capability}: {done.stderr.strip()}")
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill", done.stderr)]
    shared = re.search(r"(\d+) bytes smem", done.stderr)
    registers = re.search(r"Used (\d+) registers", done.stderr)
    assert registers is not None, done.stderr
    return {"registers": int(registers[1]), "spilled_bytes": sum(spills), "static_bytes": int(shared[1]) if shared else 0}


def compile_triton(kernel: Any, arguments: dict[str, Any], capability: int, *, name: str = "") -> Compiled:
    """Compile a Triton kernel.

    Args:
        kernel: The `@triton.jit` function.
        arguments: By name: a type for a run-time value ("*bf16", "i32", "fp32"), "=1" or ":16" behind it if the launch would find
            it 1 or divisible by 16; any other value is a constant or a launch option (num_warps, num_stages).
        capability: Compute capability times 10.
        name: What the result is called.
    """
    import triton  # noqa: PLC0415
    from triton.backends.compiler import GPUTarget  # noqa: PLC0415
    from triton.compiler import ASTSource  # noqa: PLC0415

    signature, constants, attributes = {}, {}, {}
    options = {key: value for key, value in arguments.items() if key.startswith("num_") and key not in kernel.arg_names}
    for i, key in enumerate(kernel.arg_names):
        value = arguments[key]
        if isinstance(value, str) and not value.endswith("=1"):
            kind, _, divisible = value.partition(":")
            signature[key] = kind
            if divisible:
                attributes[(i,)] = [["tt.divisibility", int(divisible)]]
        else:
            signature[key] = "constexpr"
            constants[(i,)] = 1 if isinstance(value, str) else value
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = str(built.asm["ptx"])
    report = _ptxas(ptx, capability)
    return Compiled(
        name=name or kernel.__name__,
        capability=capability,
        registers=report["registers"],
        spilled_bytes=report["spilled_bytes"],
        shared_bytes=max(built.metadata.shared, report["static_bytes"]),
        ptx=ptx,
    )


ITEMSIZE = {"fp32": 4, "fp16": 2, "bf16": 2, "fp8e4nv": 1}
"""Bytes by the compiler's name of a type; fp8e4nv is e4m3."""


def launch_arguments(
    kernel: str,
    capability: int,
    *,
    q: str = "bf16",
    kv: str = "bf16",
    head_dim: int = 128,
    group: int = 4,
    block_size: int = 16,
    splits: bool = True,
    **extra: Any,
) -> dict[str, Any]:
    """Return the arguments of the kernel named "decode", "prefill" or "merge" as a launch gives them, for `compile_triton`."""
    import triton.language as tl  # noqa: PLC0415

    from pagedkv.kernels.split_heuristic import MAX_SPLITS  # noqa: PLC0415
    from pagedkv.kernels.triton_decode import MERGE_ROWS, decode_options  # noqa: PLC0415
    from pagedkv.kernels.triton_prefill import prefill_options  # noqa: PLC0415

    compute = q if kv == "fp8e4nv" else max(q, kv, key=ITEMSIZE.__getitem__)
    known: dict[str, Any] = {
        "HEAD_DIM": head_dim,
        "GROUP": group,
        "BLOCK_SIZE": block_size,
        "HAS_SOFTCAP": False,
        "HAS_SINKS": False,
    }
    known["COMPUTE"] = {"fp32": tl.float32, "fp16": tl.float16, "bf16": tl.bfloat16}[compute]
    pointers = {"q": q, "k_cache": kv, "v_cache": kv, "out": "fp32" if kernel == "decode" and splits else q, "lse": "fp32"}
    pointers |= {"partial": "fp32", "partial_lse": "fp32"} | dict.fromkeys(("block_table", "cache_seqlens", "cu_seqlens_q"), "i32")
    known |= {name: f"*{kind}:16" for name, kind in pointers.items()} | dict.fromkeys(("scale", "v_scale", "softcap"), "fp32")
    if kernel == "decode":
        known |= {"HAS_LSE": splits} | decode_options(head_dim, group, ITEMSIZE[kv])
    elif kernel == "prefill":
        known |= {"HAS_LSE": True} | prefill_options(head_dim, group, ITEMSIZE[compute], capability)
    else:
        known |= {
            "HAS_LSE": True,
            "BLOCK_D": decode_options(head_dim, group, 2)["BLOCK_D"],
            "BLOCK_S": MAX_SPLITS,
            "ROWS": MERGE_ROWS,
            "num_warps": 4,
        }
    known["sinks"] = f"*{q}:16" if extra.get("HAS_SINKS") else None
    return known | extra


def compile_kernel(kernel: str, capability: int, **shape: Any) -> Compiled:
    """Compile the Triton kernel named "decode", "prefill" or "merge" for a shape, with the tiles that a launch would use."""
    from pagedkv.kernels.triton_decode import decode_kernel, merge_kernel  # noqa: PLC0415
    from pagedkv.kernels.triton_prefill import prefill_kernel  # noqa: PLC0415

    function = {"decode": decode_kernel, "prefill": prefill_kernel, "merge": merge_kernel}[kernel]
    arguments = launch_arguments(kernel, capability, **shape)
    for name in function.arg_names:  # strides of tensors with whole heads are divisible by 16
        wide = name.startswith("stride_") and not name.startswith(("stride_lse", "stride_table"))
        arguments.setdefault(name, "i32:16" if wide else "i32")
    name = " ".join((kernel, *(f"{key}={value}" for key, value in shape.items())))
    return compile_triton(function, arguments, capability, name=name)


def compile_numba(capability: int, *, head_dim: int = 128, group: int = 4, kind: str = "bfloat16") -> Compiled:
    """Compile the readable kernel to PTX, without a driver, and assemble it."""
    from numba import float32, int32, int64, types  # noqa: PLC0415

    from pagedkv.kernels.cuda_kernel import decode_kernel  # noqa: PLC0415

    words, boolean = types.Array(int64, 4, "A"), types.boolean
    signature = types.void(
        float32[:, :, ::1], words, words, int32[:, ::1], int32[::1], float32[::1], boolean,
        float32[:, :, :, ::1], float32[:, :, ::1], float32, float32, float32, int64,
    )  # fmt: skip
    decode_kernel.cache_clear()  # its device functions keep the code they were compiled to
    try:
        kernel = decode_kernel(head_dim, group, kind).py_func
        return _assembled(kernel, signature, capability, name=f"numba decode {kind} head_dim={head_dim} group={group}")
    finally:
        decode_kernel.cache_clear()


def compile_numba_merge(capability: int) -> Compiled:
    """Compile the kernel that merges the readable kernel's pieces."""
    from numba import float32, types  # noqa: PLC0415

    from pagedkv.kernels.cuda_kernel import merge_kernel  # noqa: PLC0415

    signature = types.void(float32[:, :, :, ::1], float32[:, :, ::1], float32[:, :, ::1], float32[:, ::1])
    return _assembled(merge_kernel().py_func, signature, capability, name="numba merge")


def _assembled(kernel: Any, signature: Any, capability: int, *, name: str) -> Compiled:
    """Compile a kernel of numba.

    A device function makes numba ask the driver which device it is for; the answer is given here.
    """
    import numba.cuda.dispatcher  # noqa: PLC0415

    from pagedkv.kernels.cuda_kernel import FASTMATH, cuda  # noqa: PLC0415

    target = divmod(capability, 10)
    numba_dispatcher: Any = numba.cuda.dispatcher
    asked = numba_dispatcher.get_current_device
    numba_dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=target)
    try:
        ptx, _ = cuda.compile_ptx(kernel, signature, cc=target, fastmath=FASTMATH, abi="numba")
    finally:
        numba_dispatcher.get_current_device = asked
    report = _ptxas(ptx, capability)
    return Compiled(
        name=name,
        capability=capability,
        registers=report["registers"],
        spilled_bytes=report["spilled_bytes"],
        shared_bytes=report["static_bytes"],
        ptx=ptx,
    )
