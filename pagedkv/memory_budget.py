"""Where the memory goes when an engine starts: vLLM's ledger, from the visible bytes to the number of blocks."""

import math
from dataclasses import dataclass

from pagedkv.errors import ConfigError
from pagedkv.hardware_spec import HardwareSpec
from pagedkv.kv_spec import kv_element_bytes
from pagedkv.model_spec import ModelSpec
from pagedkv.units import gib
from pagedkv.weight_format import WeightFormat

# Constants of the profile run's peak: estimated, fitted to what vLLM logged.
SAMPLER_BYTES_PER_LOGIT = 33
"""Sampling over `max_num_seqs` rows of logits. Source: vLLM 0.19 on an RTX 4090 (Llama-3.1-8B, 256 rows, 2,588 blocks),
less 0.13 GiB of libraries. An older vLLM took 38 on an H100 with 1,024 rows (llm-d-benchmark: 4.76 GiB for
Llama-3.1-8B, 7.38 GiB for gpt-oss-20b)."""
DENSE_PEAK_WIDTH = 14
"""Hidden states' worth of 16-bit activations at the widest point of a layer. Source: Llama-3.1-8B, where 3 of them live
beside gate, up and their product, 3 * 14,336 / 4,096."""
EXPERT_PEAK_WIDTH = 83
"""The same with routed experts. Source: DeepSeek-V4-Flash on a Spark, one sequence, took 1.39 GiB at 2,048 tokens and
5.30 GiB at 8,224: 3.91 GiB for 6,176 tokens of 4,096 elements."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryRequest:
    """What a budget is asked for, under vLLM's names."""

    model: ModelSpec
    """The model to serve."""
    hardware: HardwareSpec
    """The machine to serve it on."""
    weight_format: WeightFormat
    """How the weights are stored."""
    kv_cache_dtype: str
    """Element type of the KV cache."""
    block_size: int
    """Tokens per block."""
    max_model_len: int
    """The longest request, prompt and output, in tokens."""
    max_num_seqs: int
    """Most sequences in one step."""
    max_num_batched_tokens: int
    """Most tokens in one step."""
    gpu_memory_utilization: float
    """Share of the visible memory that the engine may hold."""
    enforce_eager: bool = False
    """No CUDA graphs."""
    free_memory_bytes: int | None = None
    """Memory free when the engine starts, if known; otherwise what the operating system and other programs leave."""
    os_reserve_bytes: int | None = None
    """What the operating system holds; None takes the machine's figure."""
    other_programs_bytes: int = 0
    """What other programs hold."""
    kv_cache_memory_bytes: int | None = None
    """Size of the KV cache, in place of what utilization leaves."""
    num_gpu_blocks_override: int | None = None
    """Number of blocks, in place of what fits."""

    @property
    def sized_by_user(self) -> bool:
        """Whether the user, not utilization, sizes the KV cache."""
        return self.kv_cache_memory_bytes is not None or self.num_gpu_blocks_override is not None

    @property
    def kv_block_bytes(self) -> int:
        """Bytes of one block in all layers."""
        return self.model.kv_spec(self.kv_cache_dtype).block_bytes(self.block_size)

    @property
    def blocks_for_one_request(self) -> int:
        """Blocks without which a request of `max_model_len` tokens cannot finish, the null block included."""
        return -(-self.max_model_len // self.block_size) + 1


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryBudget:
    """One machine's memory in eight parts that sum to `visible`. Sizes are in bytes."""

    visible: int
    """Memory that the engine sees."""
    utilization: float
    """Share of it that the engine may hold."""
    requested: int
    """That share in bytes; what the start gate compares. A KV cache sized by hand does not depend on it."""
    weights: int
    """Part 1: the model's weights."""
    engine_overhead: int
    """Part 2: libraries and buffers of the engine."""
    activations: int
    """Part 3: peak of the profile run."""
    cuda_graphs: int
    """Part 4: captured graphs."""
    kv_cache: int
    """Part 5: `num_blocks * block_bytes`."""
    os_reserve: int
    """Part 6: the operating system."""
    other_programs: int
    """Part 7: other programs."""
    unassigned: int
    """Part 8: the rest, with the bytes too few for one more block."""
    free_at_start: int
    """What the operating system and other programs leave to the engine."""
    block_size: int
    """Tokens per block."""
    block_bytes: int
    """Bytes of one block in all layers."""
    kv_bytes_per_token: int
    """Bytes of one token in all layers."""
    num_blocks: int
    """Blocks of the pool as vLLM counts them, the null block included."""
    warnings: tuple[str, ...] = ()
    """What will start but may go wrong."""

    @property
    def num_kv_tokens(self) -> int:
        """Slots of the pool, the null block's included."""
        return self.num_blocks * self.block_size

    @property
    def usable_blocks(self) -> int:
        """Blocks that requests can hold."""
        return self.num_blocks - 1

    @property
    def parts(self) -> dict[str, int]:
        """The eight parts by name. They sum to `visible`."""
        engine = ("weights", "engine_overhead", "activations", "cuda_graphs", "kv_cache")
        return {name: getattr(self, name) for name in (*engine, "os_reserve", "other_programs", "unassigned")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shortage:
    """Why a request has no budget. Sizes are in bytes."""

    refused_by_gate: bool
    """Whether the start gate refuses: `available` is more than what is free."""
    free_at_start: int
    """What the operating system and other programs leave to the engine."""
    available: int
    """What the engine may hold."""
    weights: int
    """The model's weights."""
    overheads: int
    """Engine, activations and CUDA graphs."""
    kv_cache: int
    """The KV cache asked for, at least one request of `max_model_len` tokens."""

    @property
    def kv_room(self) -> int:
        """What remains for the KV cache; negative when the weights alone are too large."""
        return self.available - self.weights - self.overheads


def start_gate(*, visible: int, free: int, utilization: float) -> bool:
    """Return whether vLLM starts: what it asks for must be free. Sizes in bytes."""
    return math.ceil(visible * utilization) <= free


def highest_utilization_that_starts(*, visible: int, free: int) -> float:
    """Return the highest utilization, in hundredths, that passes the start gate; 0.0 if none does."""
    passing = (h for h in range(100, 0, -1) if start_gate(visible=visible, free=free, utilization=h / 100))
    return next(passing, 0) / 100


def activation_bytes(model: ModelSpec, *, max_num_batched_tokens: int, max_num_seqs: int) -> int:
    """Return the peak of vLLM's profile run: the widest layer or the sampler, whichever is larger.

    layer = tokens x hidden x 2 bytes x width; sampler = sequences x vocabulary x 33 bytes + tokens x hidden x 2 bytes.
    """
    hidden_states = 2 * max_num_batched_tokens * model.hidden_size
    layer = hidden_states * (EXPERT_PEAK_WIDTH if model.num_experts else DENSE_PEAK_WIDTH)
    return max(layer, hidden_states + max_num_seqs * model.vocab_size * SAMPLER_BYTES_PER_LOGIT)


def plan_memory(
    model: ModelSpec,
    hardware: HardwareSpec,
    *,
    weight_format: WeightFormat,
    kv_cache_dtype: str,
    block_size: int,
    max_model_len: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    gpu_memory_utilization: float,
    enforce_eager: bool = False,
    free_memory_bytes: int | None = None,
    os_reserve_bytes: int | None = None,
    other_programs_bytes: int = 0,
    kv_cache_memory_bytes: int | None = None,
    num_gpu_blocks_override: int | None = None,
) -> MemoryBudget:
    """Return the budget that vLLM would come to; the arguments are the fields of `MemoryRequest`.

    KV cache = utilization x visible - weights - engine overhead - activations - CUDA graphs. On unified memory the
    operating system and other programs are checked against what utilization leaves, not subtracted from the KV cache.

    Raises:
        ConfigError: If a value is invalid, the start gate refuses, or the KV cache cannot hold one request of
            `max_model_len` tokens. The message names settings that fit.
    """
    request = MemoryRequest(
        model=model,
        hardware=hardware,
        weight_format=weight_format,
        kv_cache_dtype=kv_cache_dtype,
        block_size=block_size,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        gpu_memory_utilization=gpu_memory_utilization,
        enforce_eager=enforce_eager,
        free_memory_bytes=free_memory_bytes,
        os_reserve_bytes=os_reserve_bytes,
        other_programs_bytes=other_programs_bytes,
        kv_cache_memory_bytes=kv_cache_memory_bytes,
        num_gpu_blocks_override=num_gpu_blocks_override,
    )
    check_values(request)
    outcome = attempt(request)
    if isinstance(outcome, Shortage):
        from pagedkv.budget_advice import explain  # noqa: PLC0415 - it plans anew, and only an error needs it

        raise ConfigError(explain(request, outcome))
    return outcome


def check_values(request: MemoryRequest) -> None:
    """Refuse values that no machine could make work.

    Raises:
        ConfigError: With the value and the range that would work.
    """
    kv_element_bytes(request.kv_cache_dtype)
    hardware, utilization = request.hardware, request.gpu_memory_utilization
    if not 0 < utilization <= 1:
        raise ConfigError(f"--gpu-memory-utilization {utilization} must be above 0 and at most 1")
    highest = hardware.max_utilization_seen
    if utilization > highest.value and not request.sized_by_user:
        raise ConfigError(
            f"--gpu-memory-utilization {utilization} is above {highest.value:g}, the highest that {hardware.title} is "
            f"known to start with ({highest.source}): use {highest.value:g} or less"
        )
    for name in ("block_size", "max_model_len", "max_num_seqs", "max_num_batched_tokens"):
        if getattr(request, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(request, name)} must be at least 1")
    if request.max_model_len > request.model.max_context:
        raise ConfigError(
            f"--max-model-len {request.max_model_len} is longer than {request.model.title} was made for: "
            f"use {request.model.max_context} or less"
        )
    for name in ("free_memory_bytes", "os_reserve_bytes", "other_programs_bytes", "kv_cache_memory_bytes"):
        value = getattr(request, name)
        if value is not None and not 0 <= value <= hardware.visible_bytes:
            raise ConfigError(
                f"{name} {value} must be between 0 and {hardware.visible_bytes}, the {gib(hardware.visible_bytes)} of "
                f"{hardware.title}"
            )
    if request.num_gpu_blocks_override is not None and request.num_gpu_blocks_override < 2:
        raise ConfigError(f"--num-gpu-blocks-override {request.num_gpu_blocks_override} must be at least 2: one is the null block")


def attempt(request: MemoryRequest) -> MemoryBudget | Shortage:
    """Return the budget, or why there is none. The values have been checked."""
    hardware, visible = request.hardware, request.hardware.visible_bytes
    os_reserve, other_programs = _taken_by_others(request)
    free = visible - os_reserve - other_programs
    requested = math.ceil(visible * request.gpu_memory_utilization)
    weights = request.model.weight_bytes(request.weight_format)
    engine = int(hardware.engine_overhead.value)
    graphs = 0 if request.enforce_eager else int(hardware.cuda_graphs.value)
    activations = activation_bytes(
        request.model, max_num_batched_tokens=request.max_num_batched_tokens, max_num_seqs=request.max_num_seqs
    )
    fixed = weights + engine + activations + graphs
    available = free if request.sized_by_user else requested
    room = available - fixed

    block_bytes = request.kv_block_bytes
    num_blocks = max(room, 0) // block_bytes
    if request.kv_cache_memory_bytes is not None:
        num_blocks = request.kv_cache_memory_bytes // block_bytes
    if request.num_gpu_blocks_override is not None:
        num_blocks = request.num_gpu_blocks_override
    kv_cache = num_blocks * block_bytes
    if available > free or kv_cache > room or num_blocks < request.blocks_for_one_request:
        return Shortage(
            refused_by_gate=available > free,
            free_at_start=free,
            available=available,
            weights=weights,
            overheads=fixed - weights,
            kv_cache=max(kv_cache if request.sized_by_user else 0, request.blocks_for_one_request * block_bytes),
        )
    held = fixed + kv_cache if request.sized_by_user else requested
    return MemoryBudget(
        visible=visible,
        utilization=request.gpu_memory_utilization,
        requested=requested,
        weights=weights,
        engine_overhead=engine,
        activations=activations,
        cuda_graphs=graphs,
        kv_cache=kv_cache,
        os_reserve=os_reserve,
        other_programs=other_programs,
        unassigned=free - fixed - kv_cache,
        free_at_start=free,
        block_size=request.block_size,
        block_bytes=block_bytes,
        kv_bytes_per_token=request.model.kv_spec(request.kv_cache_dtype).bytes_per_token,
        num_blocks=num_blocks,
        warnings=_warnings(request, free=free, held=held),
    )


def _taken_by_others(request: MemoryRequest) -> tuple[int, int]:
    """Return the bytes of the operating system and of other programs.

    When the free memory is known, what is taken is known too, and only its split is not: on unified memory the
    operating system has what `other_programs_bytes` does not explain, on a discrete GPU other programs have the rest.
    """
    hardware = request.hardware
    os_reserve = int(hardware.os_reserve.value) if request.os_reserve_bytes is None else request.os_reserve_bytes
    other_programs = request.other_programs_bytes
    if request.free_memory_bytes is not None:
        taken = hardware.visible_bytes - request.free_memory_bytes
        other_programs = min(other_programs, taken) if hardware.unified else taken - min(os_reserve, taken)
        os_reserve = taken - other_programs
    return os_reserve, other_programs


def _warnings(request: MemoryRequest, *, free: int, held: int) -> tuple[str, ...]:
    """Return a warning if what engine (`held`), operating system and programs leave is below the machine's floor."""
    hardware, floor = request.hardware, int(request.hardware.memory_floor.value)
    if free - held >= floor:
        return ()
    enough = highest_utilization_that_starts(visible=hardware.visible_bytes, free=free - floor)
    remedy = "" if request.sized_by_user else f"; --gpu-memory-utilization {enough:g} leaves enough"
    return (
        f"engine, operating system and other programs leave {gib(free - held)} of {hardware.title}'s memory; below "
        f"{gib(floor)} the machine may freeze ({hardware.memory_floor.source}){remedy}",
    )
