"""SGLang: a share of the memory that is free before loading holds weights and KV pool; the rest must hold everything else.

KV pool = mem_fraction_static x free before loading - weights, cut to whole pages, plus page 0 for padding. Unless given, the share
is what a formula of the machine's memory and the prefill chunk leaves. The start checks no more than that the pool is positive:
activations and CUDA graphs that exceed the rest fail later, out of memory.
Source: SGLang 0.5.23, server_args (memory settings) and the pool configurator.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from pagedkv.errors import ConfigError
from pagedkv.hardware_spec import HardwareSpec
from pagedkv.ledgers import LEDGERS
from pagedkv.ledgers._shared import (
    EngineParts,
    check_kv_cache_dtype,
    check_share,
    free_in_words,
    other_shares,
    room_reason,
    settle,
    shortfall_of_floor,
)
from pagedkv.memory_budget import MemoryBudget, Shortage
from pagedkv.memory_request import MemoryRequest, Remedy
from pagedkv.remedies import eager, fewer_batched_tokens, fewer_sequences, narrower_kv, narrower_weights, shorter_context
from pagedkv.start_up import StartUp
from pagedkv.units import GIB, MIB, gib

_TIERS = ((20, 2048, 8), (35, 4096, 48), (60, 4096, 32), (160, 8192, 256), (math.inf, 16384, 512))
_PREFILL_GRAPHS = (*range(4, 33, 4), *range(48, 257, 16), *range(288, 513, 32), *range(576, 1025, 64), *range(1280, 4097, 256))


def default_chunked_prefill_size(visible_bytes: int) -> int:
    """Return the tokens of a prefill chunk that SGLang chooses for a device of this size."""
    return next(chunk for below_gib, chunk, _ in _TIERS if visible_bytes < below_gib * GIB)


def default_cuda_graph_max_bs(visible_bytes: int) -> int:
    """Return the largest batch for which SGLang captures a decode graph on a device of this size."""
    return next(batch for below_gib, _, batch in _TIERS if visible_bytes < below_gib * GIB)


def reserved_bytes(*, visible_bytes: int, chunked_prefill_size: int, cuda_graph_max_bs: int, enforce_eager: bool) -> int:
    """Return what SGLang sets aside for activations and CUDA graphs on one device.

    In MiB: 512 + 1.5 per token of a prefill chunk (at least 2,048) + 128 for one device + 2 per sequence of the largest decode
    graph + 8 per prefill graph; at least 10 GiB above 60 GiB. The device's size is nvidia-smi's there and CUDA's here, 0.5 % less.
    """
    mib = 512 + 1.5 * max(chunked_prefill_size, 2048) + 1024 / 8
    if not enforce_eager:
        sizes = (*_PREFILL_GRAPHS, *range(4608, chunked_prefill_size + 1, 512))
        mib += 2 * cuda_graph_max_bs + 8 * sum(size <= chunked_prefill_size for size in sizes)
    if visible_bytes > 60 * GIB:
        mib = max(mib, 10 * 1024)
    return int(mib * MIB)


@LEDGERS.register("sglang")
@dataclass(frozen=True, slots=True, kw_only=True)
class SGLangLedger:
    """SGLang's memory settings. The prefill chunk is `MemoryRequest.max_num_batched_tokens`."""

    page_size: int = 1
    """Tokens per page."""
    mem_fraction_static: float | None = None
    """Share of the memory free before loading that holds weights and KV pool; None: by the formula."""
    cuda_graph_max_bs: int | None = None
    """Largest batch with a decode graph; None: by the device's size."""
    max_total_tokens: int | None = None
    """Most tokens in the pool; None: what fits."""

    @property
    def block_size(self) -> int:
        """Tokens per page."""
        return self.page_size

    @property
    def null_blocks(self) -> int:
        """Page 0 takes the writes of padding."""
        return 1

    @property
    def windows_apart(self) -> bool:
        """All layers have blocks."""
        return False

    @property
    def weight_formats(self) -> tuple[str, ...]:
        """Narrower weight formats to propose."""
        return ("fp8", "nvfp4", "int4")

    def check(self, request: MemoryRequest) -> None:
        """Refuse settings that no machine could make work.

        Raises:
            ConfigError: With the value and the range that would work.
        """
        check_kv_cache_dtype(request, quantized=False)
        if self.mem_fraction_static is not None:
            check_share("--mem-fraction-static", self.mem_fraction_static)
        for name in ("page_size", "cuda_graph_max_bs", "max_total_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} {value} must be at least 1")

    def fraction(self, request: MemoryRequest) -> float:
        """Return the share in force: the one given, or the formula's, which is not positive on a device that is too small."""
        if self.mem_fraction_static is not None:
            return self.mem_fraction_static
        visible = request.hardware.visible_bytes
        reserved = reserved_bytes(
            visible_bytes=visible,
            chunked_prefill_size=request.max_num_batched_tokens,
            cuda_graph_max_bs=self.cuda_graph_max_bs or default_cuda_graph_max_bs(visible),
            enforce_eager=request.enforce_eager,
        )
        return round((visible - reserved) / visible, 3)

    def attempt(self, request: MemoryRequest) -> MemoryBudget | Shortage:
        """Return the budget, or why there is none. The values have been checked."""
        free, fraction = request.free_at_start, self.fraction(request)
        parts = EngineParts.on_torch(request)
        before_loading = free - parts.engine_overhead
        static = math.floor(before_loading * fraction)
        block_bytes = request.block_bytes
        num_pages = self._num_pages(request, static - parts.weights)
        num_blocks = num_pages + self.null_blocks
        kv_cache = num_blocks * block_bytes
        if num_blocks < request.blocks_for_one_request:
            return Shortage(
                kind="request"
                if self.max_total_tokens is not None and num_pages == self.max_total_tokens // self.page_size
                else "share",
                free_at_start=free,
                available=static,
                weights=parts.weights,
                overheads=0,
                kv_cache=request.blocks_for_one_request * block_bytes,
            )
        if parts.total + kv_cache > free:
            return Shortage(
                kind="free",
                free_at_start=free,
                available=free,
                weights=parts.weights,
                overheads=parts.total - parts.weights,
                kv_cache=kv_cache,
            )
        held = parts.total + kv_cache
        enough = fraction - shortfall_of_floor(request, held) / before_loading
        return settle(
            request,
            parts,
            setting=fraction,
            requested=static,
            num_blocks=num_blocks,
            block_bytes=block_bytes,
            equation=f"{fraction:g} × ({free / GIB:.2f} − {parts.engine_overhead / GIB:.2f}) − {parts.weights / GIB:.2f}"
            + (f", at most --max-total-tokens {self.max_total_tokens}" if self.max_total_tokens is not None else ""),
            check=(
                f"no start check: {free_in_words(request)}, and what the pool leaves, "
                f"{gib(before_loading - parts.weights - kv_cache)}, must hold {gib(parts.activations + parts.cuda_graphs)} "
                f"of activations and CUDA graphs"
            ),
            held=held,
            gentler=replace(self, mem_fraction_static=math.floor(enough * 100) / 100),
        )

    def reason(self, request: MemoryRequest, shortage: Shortage) -> str:
        """Return what is missing, with this machine's numbers."""
        setting = f"--mem-fraction-static {self.fraction(request):g}"
        if shortage.kind == "request":
            return (
                f"--max-total-tokens {self.max_total_tokens} is less than one request of --max-model-len {request.max_model_len}, "
                f"which needs {gib(shortage.kv_cache)} of KV cache"
            )
        if shortage.kind == "share":
            return room_reason(request, shortage, where=f"are available at {setting}, where {free_in_words(request)}", purpose="")
        return room_reason(request, shortage, where="are free", purpose=f"at {setting}")

    def start_up(self, request: MemoryRequest) -> StartUp:
        """Return how SGLang starts: MemAvailable after loading sizes the pool; graphs come last. Source: model_runner."""
        del request
        return StartUp(profiles=False, compiles=False, builds_kernels=False, repacks=True, reads="MemAvailable")

    def starved_blocks(self, request: MemoryRequest, budget: MemoryBudget, lost_bytes: int) -> int:
        """Return the blocks that there would be if `lost_bytes` were missing after loading: the pool gets what is left then."""
        return self._num_pages(request, budget.requested - budget.weights - lost_bytes) + self.null_blocks

    def cautious(self, request: MemoryRequest, budget: MemoryBudget) -> Iterator["SGLangLedger"]:
        """Yield smaller shares."""
        del budget
        now = math.ceil(self.fraction(request) * 100)
        yield from (replace(self, mem_fraction_static=hundredths / 100) for hundredths in range(now - 1, 0, -1))

    def _num_pages(self, request: MemoryRequest, room: int) -> int:
        pages = max(room, 0) // request.block_bytes
        return pages if self.max_total_tokens is None else min(pages, self.max_total_tokens // self.page_size)

    def remedies(self) -> tuple[Remedy, ...]:
        """Return the changes that may help, the mildest first."""
        return (
            _other_fraction,
            _more_tokens,
            shorter_context,
            narrower_kv,
            narrower_weights,
            fewer_batched_tokens,
            fewer_sequences,
            eager,
        )

    def on(self, hardware: HardwareSpec) -> tuple["SGLangLedger", ...]:
        """Return the ledgers that a user may end up with on another machine: this one, whose defaults follow the machine."""
        del hardware
        return (self,)


def _other_fraction(request: MemoryRequest) -> Iterator[MemoryRequest]:
    ledger = request.ledger
    assert isinstance(ledger, SGLangLedger)
    for share in other_shares(ledger.fraction(request)):
        yield replace(request, ledger=replace(ledger, mem_fraction_static=share))


def _more_tokens(request: MemoryRequest) -> Iterator[MemoryRequest]:
    ledger = request.ledger
    assert isinstance(ledger, SGLangLedger)
    pages = request.blocks_for_one_request - ledger.null_blocks
    if ledger.max_total_tokens is not None and ledger.max_total_tokens < pages * ledger.page_size:
        yield replace(request, ledger=replace(ledger, max_total_tokens=pages * ledger.page_size))
