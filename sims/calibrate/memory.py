"""What vLLM took beside weights and KV cache, from what it said when it started: the ledger's equation, solved for it.

    engine overhead = utilization x visible - weights - activations - CUDA graphs set aside - KV cache

Weights and activations are the ledger's own, so that it comes to the same KV cache: what they are off by is in the overhead.
"""

import math
from dataclasses import dataclass, replace

from pagedkv.errors import ConfigError
from pagedkv.hardware_spec import Figure, HardwareSpec
from pagedkv.ledgers.vllm import VLLMLedger
from pagedkv.memory_budget import MemoryBudget
from pagedkv.memory_request import MemoryRequest
from pagedkv.sims.calibrate.subject import Subject
from pagedkv.sims.measurements import StartUp
from pagedkv.units import GIB, gib

WEIGHTS_SPREAD = 0.15
"""How far the weights that were loaded may be from the ledger's: beyond it, something else ran."""
_TOKEN_SPREAD = 0.02
"""How far bytes per token, size over tokens, may be from the model's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryFound:
    """What a start-up log identifies."""

    where: str
    hardware: HardwareSpec
    """The machine with what was found."""
    changed: tuple[str, ...]
    """Its fields that were found."""
    logged_blocks: int
    """Blocks by the log; where it gives only a size, those that it holds."""
    exact: bool
    """Whether the log gives blocks or tokens; if not, the last digit of a size leaves some blocks open."""
    blocks_before: int | None
    """What the ledger came to without this; None: no start."""
    blocks_after: int
    """What it comes to with it."""
    non_kv_bytes: int
    """What the engine took of its share beside the KV cache, weights included."""
    notes: tuple[str, ...]


def memory_of(subject: Subject, log: StartUp, *, date: str) -> MemoryFound:
    """Return what a start-up log says of the engine's memory.

    Raises:
        ConfigError: If it is no log of vLLM that sized its own cache, or of another model; with what is needed.
    """
    ledger = subject.request.ledger
    if not isinstance(ledger, VLLMLedger):
        raise ConfigError(f"{log.where}: a start-up log of vLLM, and --engine is {subject.engine}: give --engine vllm")
    if ledger.sized_by_user:
        raise ConfigError(
            f"{log.where}: its KV cache was sized by hand (num_gpu_blocks_override or kv_cache_memory_bytes), so that it says "
            "nothing of what the engine took; needs a log of a start without"
        )
    request = replace(subject.request, hardware=_seen(subject.request.hardware, log, date))
    request.check()
    notes: list[str] = []
    _check_weights(request, log, notes)
    logged, exact = _kv_cache(request, log)
    hardware, graphs_found = _with_graphs(request, log, date)
    request = replace(request, hardware=hardware)
    requested = math.ceil(hardware.visible_bytes * ledger.gpu_memory_utilization)
    kv_bytes = logged * request.block_bytes + request.block_bytes // 2  # the middle of what gives so many blocks
    overhead = ledger.overhead_behind(request, kv_bytes)
    share = f"{ledger.gpu_memory_utilization:g} of {gib(hardware.visible_bytes)}"
    if overhead < 0:
        raise ConfigError(
            f"{log.where}: {share} less {gib(kv_bytes)} of KV cache leaves {gib(requested - kv_bytes)}, less than the "
            f"{gib(requested - kv_bytes - overhead)} that {subject.engine}'s weights, activations and CUDA graphs take: is it "
            f"--model {request.model.name} with {request.weight_format.name} weights, --max-num-seqs {request.max_num_seqs}, "
            f"--max-num-batched-tokens {request.max_num_batched_tokens} and --gpu-memory-utilization "
            f"{ledger.gpu_memory_utilization:g}, on {hardware.name}?"
        )
    source = (
        f"{log.where}, {date}: {logged:,} blocks of {ledger.block_size} in {share}, less {request.model.name}'s weights in "
        f"{request.weight_format.name} and the ledger's activations" + (" and CUDA graphs" if ledger.cuda_graphs_set_aside else "")
    )
    found = replace(hardware, engine_overhead=Figure(float(overhead), "measured", source))
    before, after = subject.request.attempt(), replace(request, hardware=found).attempt()
    if not isinstance(after, MemoryBudget):
        hint = "; it did start, so give --free-memory or --os-reserve as they were" if after.kind == "gate" else ""
        raise ConfigError(f"{log.where}: {ledger.reason(replace(request, hardware=found), after)}{hint}")
    changed = ["engine_overhead", *(["cuda_graphs"] if graphs_found else [])]
    changed += ["visible"] if found.visible != subject.request.hardware.visible else []
    return MemoryFound(
        where=log.where,
        hardware=found,
        changed=tuple(changed),
        logged_blocks=logged,
        exact=exact,
        blocks_before=before.num_blocks if isinstance(before, MemoryBudget) else None,
        blocks_after=after.num_blocks,
        non_kv_bytes=requested - kv_bytes,
        notes=tuple(notes),
    )


def _seen(hardware: HardwareSpec, log: StartUp, date: str) -> HardwareSpec:
    """Return the machine with the memory that the log saw, if that is another: a log rounds to hundredths of a GiB."""
    if log.visible_bytes is None or abs(log.visible_bytes - hardware.visible_bytes) <= GIB // 100:
        return hardware
    if abs(log.visible_bytes / hardware.visible_bytes - 1) > 0.10:
        raise ConfigError(
            f"{log.where} saw {gib(log.visible_bytes)} of memory, and --hardware {hardware.name} has {gib(hardware.visible_bytes)}"
            ": give the machine that ran"
        )
    return replace(hardware, visible=Figure(float(log.visible_bytes), "measured", f"{log.where}, {date}"))


def _check_weights(request: MemoryRequest, log: StartUp, notes: list[str]) -> None:
    if log.weight_bytes is None:
        notes.append(f"{log.where} does not say what loading the model took: weights are the ledger's {gib(request.weight_bytes)}")
        return
    if abs(log.weight_bytes / request.weight_bytes - 1) > WEIGHTS_SPREAD:
        raise ConfigError(
            f"{log.where} loaded {gib(log.weight_bytes)}, and {request.model.title} in {request.weight_format.name} takes "
            f"{gib(request.weight_bytes)}: give the --model and the --quantization that ran"
        )
    if abs(log.weight_bytes - request.weight_bytes) >= GIB // 100:
        notes.append(
            f"{log.where} loaded {gib(log.weight_bytes)}, the ledger has {gib(request.weight_bytes)} of weights: the difference is "
            "in the overhead"
        )


def _kv_cache(request: MemoryRequest, log: StartUp) -> tuple[int, bool]:
    """Return (blocks of the KV cache as the ledger counts them, whether they are exact).

    Where layers cache differently, tokens say too little, blocks may be of other groups than here, and only the size counts.
    """
    ledger, alike = request.ledger, len(request.model.layer_groups) == 1
    blocks = (
        log.num_blocks if log.num_blocks is not None else log.kv_tokens and log.kv_tokens // (log.block_size or ledger.block_size)
    )
    if log.kv_bytes is not None and blocks is not None and alike:
        tokens = blocks * (log.block_size or ledger.block_size)
        per_token, known = log.kv_bytes / tokens, request.kv_bytes_per_token
        open_to = (log.kv_bytes_digit + request.block_bytes) / log.kv_bytes
        if abs(per_token / known - 1) > _TOKEN_SPREAD + open_to:
            raise ConfigError(
                f"{log.where}: {tokens:,} tokens in {gib(log.kv_bytes)} are {per_token:,.0f} bytes a token, and "
                f"{request.model.title} with --kv-cache-dtype {request.kv_cache_dtype} takes {known:,}: "
                "give the --model and the --kv-cache-dtype that ran"
            )
    if blocks is not None and alike:
        return blocks, True
    if log.kv_bytes is None:
        raise ConfigError(
            f"{log.where}: {request.model.title} has layers that cache differently, of which blocks and tokens say too little; "
            "needs the line 'Available KV cache memory: ... GiB'"
        )
    return log.kv_bytes // request.block_bytes, False


def _with_graphs(request: MemoryRequest, log: StartUp, date: str) -> tuple[HardwareSpec, bool]:
    """Return (the machine with the CUDA graphs of the log, whether it tells of them)."""
    if log.graph_bytes is None or request.enforce_eager:
        return request.hardware, False
    return replace(request.hardware, cuda_graphs=Figure(float(log.graph_bytes), "measured", f"{log.where}, {date}")), True
