"""What to change when a model does not fit: every suggestion was planned again, and fits."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import combinations

from pagedkv.catalogue import hardware_names, load_hardware, load_model, model_names
from pagedkv.kv_spec import kv_element_bytes
from pagedkv.memory_budget import MemoryBudget, MemoryRequest, Shortage, attempt, highest_utilization_that_starts
from pagedkv.units import gib
from pagedkv.weight_format import WEIGHT_FORMATS

NUM_SUGGESTIONS = 3
SHORTEST_USEFUL_CONTEXT = 1024
FEWEST_USEFUL_SEQUENCES = 16
FEWEST_BATCHED_TOKENS = 512

_FLAGS = {
    "model": "--model",
    "hardware": "--hardware",
    "weight_format": "--quantization",
    "kv_cache_dtype": "--kv-cache-dtype",
    "max_model_len": "--max-model-len",
    "max_num_seqs": "--max-num-seqs",
    "max_num_batched_tokens": "--max-num-batched-tokens",
    "gpu_memory_utilization": "--gpu-memory-utilization",
    "kv_cache_memory_bytes": "--kv-cache-memory-bytes",
    "num_gpu_blocks_override": "--num-gpu-blocks-override",
}


def explain(request: MemoryRequest, shortage: Shortage) -> str:
    """Return what is needed, what there is, and the settings that fit."""
    hardware, utilization = request.hardware, f"--gpu-memory-utilization {request.gpu_memory_utilization:g}"
    if shortage.refused_by_gate:
        starts = highest_utilization_that_starts(visible=hardware.visible_bytes, free=shortage.free_at_start)
        reason = (
            f"{utilization} asks for {gib(shortage.available)} of the {gib(hardware.visible_bytes)} of {hardware.title}, "
            f"but only {gib(shortage.free_at_start)} are free at the start: "
            + (f"{starts:g} is the highest that starts" if starts else "no utilization starts")
        )
    else:
        needed = shortage.weights + shortage.overheads + shortage.kv_cache
        limit = "are free" if request.sized_by_user else f"are available at {utilization}"
        longest = _longest_context(request)
        reason = (
            f"{request.model.title} needs {gib(needed)} on {hardware.title}, but {gib(shortage.available)} {limit}: "
            f"{gib(shortage.weights)} of weights in {request.weight_format.name}, {gib(shortage.overheads)} of engine, "
            f"activations and CUDA graphs, and {gib(shortage.kv_cache)} of KV cache, which must hold one request of "
            f"--max-model-len {request.max_model_len} "
            + (f"({longest} would fit)" if longest else "(not one block would fit)")
        )
    suggestions = settings_that_fit(request)
    return f"{reason}. " + (f"What fits: {'; or '.join(suggestions)}" if suggestions else "Nothing in the catalogue fits")


def settings_that_fit(request: MemoryRequest) -> tuple[str, ...]:
    """Return up to three changes to `request` that fit, as flags, the mildest first.

    One setting is changed, then two of those that do not help alone, then the machine, the model, and these with narrower
    weights.
    """
    suggestions: list[str] = []
    for change in _changes_that_fit(request):
        flags = _as_flags(request, change)
        if flags not in suggestions:
            suggestions.append(flags)
        if len(suggestions) == NUM_SUGGESTIONS:
            break
    return tuple(suggestions)


def _changes_that_fit(request: MemoryRequest) -> Iterator[MemoryRequest]:
    helpless = []
    for setting in _SETTINGS:
        change = next(filter(_fits, setting(request)), None)
        if change is None:
            helpless.append(setting)
        else:
            yield change
    for first, second in combinations(helpless, 2):
        both = (twice for once in first(request) for twice in second(once))
        yield from (change for change in (next(filter(_fits, both), None),) if change is not None)
    for narrower in (request, *_narrower_weights(request)):
        yield from filter(_fits, _other_hardware(narrower))
        yield from filter(_fits, _smaller_model(narrower))


def _fits(request: MemoryRequest) -> bool:
    if request.gpu_memory_utilization > request.hardware.max_utilization_seen.value and not request.sized_by_user:
        return False
    return isinstance(attempt(request), MemoryBudget)


def _longest_context(request: MemoryRequest) -> int:
    """Return the longest request that the KV cache would hold, 0 if it would hold none."""
    outcome = attempt(replace(request, max_model_len=1))
    return outcome.usable_blocks * outcome.block_size if isinstance(outcome, MemoryBudget) else 0


def _other_utilization(request: MemoryRequest) -> Iterator[MemoryRequest]:
    """Yield higher utilizations, and before them the one that passes the start gate if this one does not."""
    outcome = attempt(request)
    free = outcome.free_at_start
    starts = highest_utilization_that_starts(visible=request.hardware.visible_bytes, free=free)
    highest = min(starts, request.hardware.max_utilization_seen.value)
    if highest < request.gpu_memory_utilization:
        candidates = [highest] if highest else []
    else:
        candidates = [h / 100 for h in range(int(request.gpu_memory_utilization * 100) + 1, int(highest * 100 + 0.5) + 1)]
    yield from (replace(request, gpu_memory_utilization=u) for u in candidates if not request.sized_by_user)


def _shorter_context(request: MemoryRequest) -> Iterator[MemoryRequest]:
    longest = _longest_context(request)
    if SHORTEST_USEFUL_CONTEXT <= longest < request.max_model_len:
        yield replace(request, max_model_len=longest)


def _narrower_kv(request: MemoryRequest) -> Iterator[MemoryRequest]:
    if kv_element_bytes(request.kv_cache_dtype) > kv_element_bytes("fp8"):
        yield replace(request, kv_cache_dtype="fp8")


def _narrower_weights(request: MemoryRequest) -> Iterator[MemoryRequest]:
    now = request.model.weight_bytes(request.weight_format)
    formats = (WEIGHT_FORMATS[name] for name in ("fp8", "nvfp4", "int4"))
    yield from (replace(request, weight_format=fmt) for fmt in formats if request.model.weight_bytes(fmt) < now)


def _fewer_batched_tokens(request: MemoryRequest) -> Iterator[MemoryRequest]:
    tokens = request.max_num_batched_tokens // 2
    while tokens >= max(FEWEST_BATCHED_TOKENS, request.max_num_seqs):
        yield replace(request, max_num_batched_tokens=tokens)
        tokens //= 2


def _fewer_sequences(request: MemoryRequest) -> Iterator[MemoryRequest]:
    sequences = request.max_num_seqs // 2
    while sequences >= FEWEST_USEFUL_SEQUENCES:
        yield replace(request, max_num_seqs=sequences)
        sequences //= 2


def _eager(request: MemoryRequest) -> Iterator[MemoryRequest]:
    if not request.enforce_eager:
        yield replace(request, enforce_eager=True)


def _kv_cache_that_fits(request: MemoryRequest) -> Iterator[MemoryRequest]:
    """Yield the largest KV cache for which there is room, where the user sized it."""
    outcome = attempt(request)
    if request.sized_by_user and isinstance(outcome, Shortage) and outcome.kv_room > 0:
        blocks = outcome.kv_room // request.kv_block_bytes
        if request.num_gpu_blocks_override is not None:
            yield replace(request, num_gpu_blocks_override=blocks)
        else:
            yield replace(request, kv_cache_memory_bytes=blocks * request.kv_block_bytes)


def _other_hardware(request: MemoryRequest) -> Iterator[MemoryRequest]:
    """Yield the other machines of the catalogue, the smallest first."""
    others = [load_hardware(name) for name in hardware_names() if name != request.hardware.name]
    for hardware in sorted(others, key=lambda h: h.visible_bytes):
        yield replace(request, hardware=hardware)


def _smaller_model(request: MemoryRequest) -> Iterator[MemoryRequest]:
    """Yield the smaller models of the catalogue, the largest first, in their native format if this one was in its own."""
    native = request.weight_format == request.model.native_format
    now = request.model.weight_bytes(request.weight_format)
    changes = []
    for model in map(load_model, model_names()):
        weight_format = model.native_format if native else request.weight_format
        if model.weight_bytes(weight_format) < now:
            length = min(request.max_model_len, model.max_context)
            changes.append(replace(request, model=model, weight_format=weight_format, max_model_len=length))
    yield from sorted(changes, key=lambda c: -c.model.weight_bytes(c.weight_format))


_SETTINGS: tuple[Callable[[MemoryRequest], Iterator[MemoryRequest]], ...] = (
    _other_utilization,
    _shorter_context,
    _narrower_kv,
    _kv_cache_that_fits,
    _narrower_weights,
    _fewer_batched_tokens,
    _fewer_sequences,
    _eager,
)


def _as_flags(request: MemoryRequest, change: MemoryRequest) -> str:
    """Return what to add to the command line to turn `request` into `change`."""
    native_as_before = (request.weight_format, change.weight_format) == (
        request.model.native_format,
        change.model.native_format,
    )
    flags = ["--enforce-eager"] if change.enforce_eager and not request.enforce_eager else []
    for name, flag in _FLAGS.items():
        value = getattr(change, name)
        if value != getattr(request, name) and not (name == "weight_format" and native_as_before):
            flags.append(f"{flag} {getattr(value, 'name', value)}")
    return " ".join(flags)
