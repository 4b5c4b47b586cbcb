"""What to change when a model does not fit: every suggestion was planned again, and fits."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain, combinations, islice

from pagedkv.catalogue import hardware_names, load_hardware, load_model, model_names
from pagedkv.errors import ConfigError
from pagedkv.kv_spec import kv_element_bytes
from pagedkv.memory_budget import (
    MemoryBudget,
    MemoryRequest,
    Shortage,
    attempt,
    check_values,
    highest_utilization_that_starts,
)
from pagedkv.units import gib
from pagedkv.weight_format import WEIGHT_FORMATS

NUM_SUGGESTIONS = 3
SHORTEST_USEFUL_CONTEXT = 256
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
    if shortage.refused_by_gate:
        reason = _gate_reason(request, shortage)
    elif shortage.kv_room >= shortage.kv_cache:
        reason = (
            f"{_kv_setting(request)} holds {_longest_context(request)} tokens beside the null block, less than one "
            f"request of --max-model-len {request.max_model_len}, which needs {gib(shortage.kv_cache)} of KV cache"
        )
    else:
        reason = _room_reason(request, shortage)
    suggestions = settings_that_fit(request)
    return f"{reason}. What fits: {'; or '.join(suggestions) or 'nothing in the catalogue'}"


def _gate_reason(request: MemoryRequest, shortage: Shortage) -> str:
    hardware, free = request.hardware, max(shortage.free_at_start, 0)
    starts = highest_utilization_that_starts(visible=hardware.visible_bytes, free=free)
    return (
        f"--gpu-memory-utilization {request.gpu_memory_utilization:g} of {gib(hardware.visible_bytes)} asks for "
        f"{gib(shortage.available)}, but only {gib(free)} of {hardware.title} are free at the start: "
        + (f"{starts:g} is the highest that starts" if starts else "no utilization starts")
    )


def _room_reason(request: MemoryRequest, shortage: Shortage) -> str:
    needed = shortage.weights + shortage.overheads + shortage.kv_cache
    if request.sized_by_user:
        where, purpose = "are free", f"by {_kv_setting(request)}"
    else:
        longest = _longest_context(request)
        where = f"are available at --gpu-memory-utilization {request.gpu_memory_utilization:g}"
        purpose = f"for one request of --max-model-len {request.max_model_len}"
        purpose += f" ({longest} is the longest that fits)" if longest else " (no length fits)"
    return (
        f"{request.model.title} needs {gib(needed)} on {request.hardware.title}, but {gib(shortage.available)} "
        f"{where}: {gib(shortage.weights)} of weights in {request.weight_format.name}, {gib(shortage.overheads)} of "
        f"engine, activations and CUDA graphs, {gib(shortage.kv_cache)} of KV cache {purpose}"
    )


def _kv_setting(request: MemoryRequest) -> str:
    if request.num_gpu_blocks_override is not None:
        return f"--num-gpu-blocks-override {request.num_gpu_blocks_override}"
    return f"--kv-cache-memory-bytes {request.kv_cache_memory_bytes}"


def settings_that_fit(request: MemoryRequest) -> tuple[str, ...]:
    """Return up to three changes to `request` that fit, as flags, the mildest first.

    One setting is changed, then two of those that do not help alone, then the machine or the model.
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
        yield from islice(filter(_fits, (twice for once in first(request) for twice in second(once))), 1)
    narrower = tuple(_narrower_weights(request))
    larger_steps = [
        filter(_fits, _other_hardware(request)),
        filter(_fits, chain.from_iterable(map(_other_hardware, narrower))),
        filter(_fits, _smaller_model(request)),
    ]
    for changes in larger_steps:
        yield from islice(changes, 1)
    yield from chain(*larger_steps, filter(_fits, chain.from_iterable(map(_smaller_model, narrower))))


def _fits(request: MemoryRequest) -> bool:
    try:
        check_values(request)
    except ConfigError:
        return False
    return isinstance(attempt(request), MemoryBudget)


def _longest_context(request: MemoryRequest) -> int:
    """Return the longest request that the KV cache would hold, 0 if it would hold none."""
    outcome = attempt(replace(request, max_model_len=1))
    return outcome.usable_blocks * outcome.block_size if isinstance(outcome, MemoryBudget) else 0


def _other_utilization(request: MemoryRequest) -> Iterator[MemoryRequest]:
    """Yield higher utilizations, or the highest that starts when the start gate refuses this one."""
    if request.sized_by_user:
        return
    free = attempt(request).free_at_start
    starts = highest_utilization_that_starts(visible=request.hardware.visible_bytes, free=free)
    highest = min(starts, request.hardware.max_utilization_seen.value)
    if 0 < highest < request.gpu_memory_utilization:
        yield replace(request, gpu_memory_utilization=highest)
    for hundredths in range(int(request.gpu_memory_utilization * 100) + 1, round(highest * 100) + 1):
        yield replace(request, gpu_memory_utilization=hundredths / 100)


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
    """Yield, where the user sized the KV cache, the largest for which there is room or the smallest that is enough."""
    outcome = attempt(request)
    if not request.sized_by_user or isinstance(outcome, MemoryBudget) or outcome.kv_room <= 0:
        return
    blocks = min(outcome.kv_room, outcome.kv_cache) // request.kv_block_bytes
    if request.num_gpu_blocks_override is not None:
        yield replace(request, num_gpu_blocks_override=blocks)
    else:
        yield replace(request, kv_cache_memory_bytes=blocks * request.kv_block_bytes)


def _other_hardware(request: MemoryRequest) -> Iterator[MemoryRequest]:
    """Yield the other machines of the catalogue, the smallest first, if their own defaults would fit as well."""
    others = (load_hardware(name) for name in hardware_names() if name != request.hardware.name)
    for hardware in sorted(others, key=lambda h: h.visible_bytes):
        change = replace(request, hardware=hardware)
        heaviest = replace(
            change,
            max_num_seqs=max(request.max_num_seqs, hardware.default_max_num_seqs),
            max_num_batched_tokens=max(request.max_num_batched_tokens, hardware.default_max_num_batched_tokens),
        )
        utilizations = (request.gpu_memory_utilization, hardware.default_utilization.value)
        if all(_fits(replace(heaviest, gpu_memory_utilization=u)) for u in utilizations):
            yield change


def _smaller_model(request: MemoryRequest) -> Iterator[MemoryRequest]:
    """Yield the smaller models that reach as far, the largest first, each in its native format if this one was."""
    native = request.weight_format == request.model.native_format
    now = request.model.weight_bytes(request.weight_format)
    changes = []
    for model in map(load_model, model_names()):
        weight_format = model.native_format if native else request.weight_format
        if model.weight_bytes(weight_format) < now and model.max_context >= request.max_model_len:
            changes.append(replace(request, model=model, weight_format=weight_format))
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
    flags = ["--enforce-eager"] if change.enforce_eager and not request.enforce_eager else []
    for name, flag in _FLAGS.items():
        value = getattr(change, name)
        changed = value != getattr(request, name)
        if name == "weight_format" and change.model != request.model:
            # Whether or not the user named a format, it must be clear which one the other model has.
            formats = (value, request.weight_format, change.model.native_format)
            changed = len({change.model.weight_bytes(fmt) for fmt in formats}) > 1
        if changed:
            flags.append(f"{flag} {getattr(value, 'name', value)}")
    return " ".join(flags)
