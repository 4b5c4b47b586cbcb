"""llama.cpp: the user says how many cells the KV cache has, all of it is allocated at the start, and either it fits or it does not.

KV cache = cells x bytes per cell, where cells is --ctx-size rounded up to 256. With a unified cache every slot may use all cells;
otherwise each of the slots owns a private stream of ctx / slots, rounded up too. Layers with a window (gpt-oss, Gemma) have a cache
of their own with fewer cells, unless all have one (Mistral 7B v0.1, which llama.cpp runs without its window) or --swa-full is
given. Nothing is sized to the memory; moving layers to the processor (-ngl, --fit) is not modelled. On a discrete GPU the input
embedding stays in the processor's memory.
Source: llama.cpp as of mid-2026, llama_context, llama_kv_cache and llama_kv_cache_iswa (02c28f5); tools/server.
"""

import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace

from pagedkv.errors import ConfigError
from pagedkv.hardware_spec import HardwareSpec
from pagedkv.kv_spec import kv_element_bytes
from pagedkv.ledgers import LEDGERS
from pagedkv.ledgers._shared import EngineParts, check_kv_cache_dtype, free_in_words, room_reason, settle, shortfall_of_floor
from pagedkv.memory_budget import MemoryBudget, Shortage
from pagedkv.memory_request import MemoryRequest, Remedy
from pagedkv.remedies import narrower_weights
from pagedkv.start_up import StartUp
from pagedkv.units import GIB, gib

CELL_PADDING = 256
"""Cells are rounded up to a multiple of this."""
DEFAULT_SLOTS = 4
"""Slots of `llama-server -np auto`, which then has a unified cache."""
DEFAULT_CHECKPOINTS = 32
"""Context checkpoints of a slot. Source: llama-server's --ctx-checkpoints."""
PROCESS_OVERHEAD_BYTES = GIB // 2
"""CUDA context and libraries of one process. Estimated: a process that has allocated nothing shows 0.4 to 0.6 GiB in nvidia-smi."""
LOGIT_BYTES = 4
"""Logits and hidden states of a micro-batch are 32 bits wide. With it the logged compute buffers are met exactly: 258.50 MiB for
Llama-3-8B, 70.50 for Llama-2-7B, 398.38 for gpt-oss-20b, each at --ubatch-size 512."""


def padded(cells: int) -> int:
    """Return `cells` rounded up to whole multiples of 256."""
    return -(-cells // CELL_PADDING) * CELL_PADDING


@LEDGERS.register("llama-cpp")
@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaCppLedger:
    """llama.cpp's memory settings. The cache types of keys and values are `MemoryRequest.kv_cache_dtype`, e.g. q8_0/q4_0."""

    ctx_size: int = 0
    """Cells of the whole cache; 0: the context that the model was made for."""
    parallel: int | None = None
    """Slots; None: 4 with a unified cache."""
    kv_unified: bool | None = None
    """Whether all slots share the cells; None: only where the number of slots is not given."""
    ubatch_size: int = 512
    """Tokens computed at once."""
    swa_full: bool = False
    """Whether layers with a window keep as many cells as the others."""
    ctx_checkpoints: int = DEFAULT_CHECKPOINTS
    """Most copies of its window that a slot keeps in the processor's memory."""

    @property
    def block_size(self) -> int:
        """A cell is one token."""
        return 1

    @property
    def null_blocks(self) -> int:
        """Every cell can be held."""
        return 0

    @property
    def windows_apart(self) -> bool:
        """Layers with a window have cells of their own, fewer than the others."""
        return not self.swa_full

    @property
    def weight_formats(self) -> tuple[str, ...]:
        """Narrower weight formats to propose."""
        return ("q8_0", "q6_k", "q5_k_m", "q4_k_m")

    @property
    def num_slots(self) -> int:
        """Requests that can run at once."""
        return DEFAULT_SLOTS if self.parallel is None else self.parallel

    @property
    def unified(self) -> bool:
        """Whether all slots share the cells."""
        return self.parallel is None if self.kv_unified is None else self.kv_unified

    def slot_cells(self, request: MemoryRequest) -> int:
        """Return the cells that one slot may use."""
        cells = padded(self.ctx_size or request.model.max_context)
        return cells if self.unified else padded(cells // self.num_slots)

    def num_cells(self, request: MemoryRequest) -> int:
        """Return the cells of the whole cache."""
        return self.slot_cells(request) * (1 if self.unified else self.num_slots)

    def window_cells(self, request: MemoryRequest) -> int:
        """Return the cells of the cache of layers with a window, in all streams; 0 if they have none of their own.

        In a stream: the window of every sequence that may be in it, and the tokens of one step, but no more than others have.
        """
        spec = request.window_spec
        if spec is None:
            return 0
        sequences, streams = (self.num_slots, 1) if self.unified else (1, self.num_slots)
        return streams * padded(min(self.slot_cells(request), spec.longest_window * sequences + self.ubatch_size))

    def window_bytes(self, request: MemoryRequest) -> int:
        """Return the bytes of the cache of layers with a window."""
        spec = request.window_spec
        return 0 if spec is None else spec.block_bytes(self.window_cells(request))

    def checkpoint_bytes(self, request: MemoryRequest) -> int:
        """Return the bytes of a context checkpoint: a window of one sequence in the layers that have one."""
        spec = request.window_spec
        return 0 if spec is None else spec.block_bytes(spec.longest_window)

    def check(self, request: MemoryRequest) -> None:
        """Refuse settings that no machine could make work.

        Raises:
            ConfigError: With the value and the range that would work.
        """
        check_kv_cache_dtype(request, quantized=True)
        if self.ctx_size < 0:
            raise ConfigError(f"--ctx-size {self.ctx_size} must be at least 0, which is the model's {request.model.max_context}")
        if self.ctx_checkpoints < 0:
            raise ConfigError(f"--ctx-checkpoints {self.ctx_checkpoints} must be at least 0, which turns them off")
        for name, value in (("parallel", self.num_slots), ("ubatch-size", self.ubatch_size)):
            if value < 1:
                raise ConfigError(f"--{name} {value} must be at least 1")
        if request.max_model_len > self.slot_cells(request):
            enough = padded(request.max_model_len) * (1 if self.unified else self.num_slots)
            raise ConfigError(
                f"--max-model-len {request.max_model_len} is more than the {self.slot_cells(request)} cells of a slot "
                f"(--ctx-size {self.ctx_size}, {self.num_slots} slots{'' if self.unified else ', each with its own'}): "
                f"use --ctx-size {enough} or --max-model-len {self.slot_cells(request)}"
            )

    def attempt(self, request: MemoryRequest) -> MemoryBudget | Shortage:
        """Return the budget, or why there is none. The values have been checked."""
        model, free = request.model, request.free_at_start
        weights = model.weight_bytes(request.weight_format)
        if not request.hardware.unified:
            weights -= math.floor(model.embedding_bytes(request.weight_format))
        parts = EngineParts(
            weights=weights,
            engine_overhead=PROCESS_OVERHEAD_BYTES,
            activations=LOGIT_BYTES * self.ubatch_size * (model.vocab_size + model.hidden_size),
            cuda_graphs=0,
        )
        num_cells, cell_bytes = self.num_cells(request), request.block_bytes
        states = self.num_slots * model.kv_spec(request.kv_cache_dtype).state_bytes_per_sequence
        window_cells, window_bytes = self.window_cells(request), self.window_bytes(request)
        kv_cache = num_cells * cell_bytes + window_bytes + states
        held = parts.total + kv_cache
        if held > free:
            return Shortage(
                kind="free",
                free_at_start=free,
                available=free,
                weights=weights,
                overheads=parts.total - weights,
                kv_cache=kv_cache,
            )
        return settle(
            request,
            parts,
            setting=held / request.hardware.visible_bytes,
            requested=held,
            num_blocks=num_cells,
            block_bytes=cell_bytes,
            equation=f"{num_cells:,} cells × {cell_bytes:,} B"
            + (f" + {window_cells:,} cells × {window_bytes // window_cells:,} B of layers with a window" if window_cells else "")
            + (f" + {gib(states)} of sequence states" if states else ""),
            check=f"start: {gib(held)} are allocated at once, and {free_in_words(request)}",
            held=held,
            gentler=replace(self, ctx_size=self._cells_within(request, kv_cache - shortfall_of_floor(request, held))),
            state_bytes=states,
            window_bytes=window_bytes,
            window_cells=window_cells,
            checkpoint_bytes=self.checkpoint_bytes(request),
        )

    def _cells_within(self, request: MemoryRequest, room: int) -> int:
        """Return the largest --ctx-size whose KV cache takes at most `room` bytes; at least one multiple of 256 per slot."""
        room -= self.num_slots * request.model.kv_spec(request.kv_cache_dtype).state_bytes_per_sequence
        step = CELL_PADDING * (1 if self.unified else self.num_slots)

        def size(steps: int) -> int:
            return steps * step * request.block_bytes + replace(self, ctx_size=steps * step).window_bytes(request)

        most = max(room // (request.block_bytes * step), 1)
        return max(bisect_right(range(1, most + 1), room, key=size), 1) * step

    def reason(self, request: MemoryRequest, shortage: Shortage) -> str:
        """Return what is missing, with this machine's numbers."""
        context = f"--ctx-size {self.ctx_size}" if self.ctx_size else "the model's own context"
        streams = "" if self.unified else f" in {self.num_slots} streams"
        purpose = f"for the {self.num_cells(request)} cells of {context}{streams}, all allocated at the start"
        return room_reason(request, shortage, where=free_in_words(request).partition(" GiB ")[2], purpose=purpose)

    def start_up(self, request: MemoryRequest) -> StartUp:
        """Return how llama.cpp starts: it maps the file, takes all of its KV cache at once, and in time keeps old prompts.

        Of a window it keeps copies as well: --ctx-checkpoints of a slot, which --cache-ram does not count.
        Source: llama-server's --cache-ram, 8 GiB by default; --direct-io, ggml-org/llama.cpp PR 18012 and 18166.
        """
        each, number = self.checkpoint_bytes(request), self.num_slots * self.ctx_checkpoints
        copies = (
            f"The server keeps up to {self.ctx_checkpoints} context checkpoints of each of {self.num_slots} slots in host memory "
            f"in time, {gib(each)} each, {gib(each * number)} in all; --ctx-checkpoints 0 turns that off, and then prompts that "
            "part with what a slot has are computed anew."
        )
        return StartUp(
            profiles=False,
            compiles=False,
            builds_kernels=False,
            repacks=False,
            reads=None,
            direct_loader="--direct-io",
            host_cache_bytes=8 * GIB,
            host_cache_off="--cache-ram 0",
            window_copies_bytes=each * number,
            notes=(copies,) if each * number else (),
        )

    def starved_blocks(self, request: MemoryRequest, budget: MemoryBudget, lost_bytes: int) -> int:
        """Return the cells, which no measurement changes."""
        del request, lost_bytes
        return budget.num_blocks

    def cautious(self, request: MemoryRequest, budget: MemoryBudget) -> Iterator["LlamaCppLedger"]:
        """Yield fewer cells, as long as a slot holds the longest request."""
        if request.window_spec is not None:
            yield from (replace(self, ctx_checkpoints=number) for number in (8, 2, 0) if number < self.ctx_checkpoints)
        least = padded(request.max_model_len) * (1 if self.unified else self.num_slots)
        step = max(padded((budget.num_blocks - least) // 50), CELL_PADDING * (1 if self.unified else self.num_slots))
        yield from (replace(self, ctx_size=cells) for cells in range(budget.num_blocks - step, least - 1, -step))

    def remedies(self) -> tuple[Remedy, ...]:
        """Return the changes that may help, the mildest first."""
        return (_windows_apart, _fewer_cells, _narrower_cache_types, _fewer_slots, narrower_weights)

    def on(self, hardware: HardwareSpec) -> tuple["LlamaCppLedger", ...]:
        """Return the ledgers that a user may end up with on another machine: this one."""
        del hardware
        return (self,)


def _windows_apart(request: MemoryRequest) -> Iterator[MemoryRequest]:
    """Yield the cache without --swa-full."""
    ledger = request.ledger
    assert isinstance(ledger, LlamaCppLedger)
    if ledger.swa_full:
        yield replace(request, ledger=replace(ledger, swa_full=False))


def _fewer_cells(request: MemoryRequest) -> Iterator[MemoryRequest]:
    """Yield the most cells that fit, if every slot still holds the longest request."""
    ledger, outcome = request.ledger, request.attempt()
    assert isinstance(ledger, LlamaCppLedger)
    if isinstance(outcome, Shortage) and outcome.kv_room > 0:
        yield replace(request, ledger=replace(ledger, ctx_size=ledger._cells_within(request, outcome.kv_room)))


def _narrower_cache_types(request: MemoryRequest) -> Iterator[MemoryRequest]:
    now = kv_element_bytes(request.kv_cache_dtype)
    yield from (replace(request, kv_cache_dtype=name) for name in ("q8_0", "q4_0") if kv_element_bytes(name) < now)


def _fewer_slots(request: MemoryRequest) -> Iterator[MemoryRequest]:
    """Yield fewer private streams, each as long as before."""
    ledger = request.ledger
    assert isinstance(ledger, LlamaCppLedger)
    if not ledger.unified:
        cells = ledger.slot_cells(request)
        for slots in range(ledger.num_slots - 1, 0, -1):
            yield replace(request, ledger=replace(ledger, parallel=slots, ctx_size=slots * cells))
