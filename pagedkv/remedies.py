"""Changes to a memory request that may make it fit, whatever the engine. Each yields the mildest first; none is verified here."""

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import replace

from pagedkv.catalogue import hardware_names, load_hardware, load_model, model_names
from pagedkv.errors import ConfigError
from pagedkv.kv_spec import kv_element_bytes
from pagedkv.memory_budget import MemoryBudget
from pagedkv.memory_request import MemoryRequest
from pagedkv.weight_format import WEIGHT_FORMATS

SHORTEST_USEFUL_CONTEXT = 256
FEWEST_USEFUL_SEQUENCES = 16
FEWEST_BATCHED_TOKENS = 512


def fits(request: MemoryRequest) -> bool:
    """Return whether the engine would start."""
    try:
        request.check()
    except ConfigError:
        return False
    return isinstance(request.attempt(), MemoryBudget)


def longest_context(request: MemoryRequest) -> int:
    """Return the longest request that the KV cache would hold, 0 if it would hold none."""
    outcome = replace(request, max_model_len=1).attempt()
    if not isinstance(outcome, MemoryBudget):
        return 0
    if not request.layers_apart:
        return outcome.usable_blocks * outcome.block_size
    lengths = range(1, request.model.max_context + 1)

    def is_too_long(length: int) -> bool:
        return not isinstance(replace(request, max_model_len=length).attempt(), MemoryBudget)

    return bisect_left(lengths, True, key=is_too_long)  # noqa: FBT003 - what is looked for


def shorter_context(request: MemoryRequest) -> Iterator[MemoryRequest]:
    """Yield the longest request that the KV cache would hold."""
    longest = longest_context(request)
    if SHORTEST_USEFUL_CONTEXT <= longest < request.max_model_len:
        yield replace(request, max_model_len=longest)


def narrower_kv(request: MemoryRequest) -> Iterator[MemoryRequest]:
    """Yield FP8 for a KV cache of 16 bits."""
    if kv_element_bytes(request.kv_cache_dtype) > kv_element_bytes("fp8"):
        yield replace(request, kv_cache_dtype="fp8")


def narrower_weights(request: MemoryRequest) -> Iterator[MemoryRequest]:
    """Yield the engine's weight formats that take less than this one, the widest first."""
    now = request.model.weight_bytes(request.weight_format)
    formats = (WEIGHT_FORMATS[name] for name in request.ledger.weight_formats)
    yield from (replace(request, weight_format=fmt) for fmt in formats if request.model.weight_bytes(fmt) < now)


def fewer_batched_tokens(request: MemoryRequest) -> Iterator[MemoryRequest]:
    """Yield halves of the token budget of a step."""
    tokens = request.max_num_batched_tokens // 2
    while tokens >= max(FEWEST_BATCHED_TOKENS, request.max_num_seqs):
        yield replace(request, max_num_batched_tokens=tokens)
        tokens //= 2


def fewer_sequences(request: MemoryRequest) -> Iterator[MemoryRequest]:
    """Yield halves of the running requests, whose logits the sampler holds."""
    sequences = request.max_num_seqs // 2
    while sequences >= FEWEST_USEFUL_SEQUENCES:
        yield replace(request, max_num_seqs=sequences)
        sequences //= 2


def eager(request: MemoryRequest) -> Iterator[MemoryRequest]:
    """Yield the same without CUDA graphs."""
    if not request.enforce_eager:
        yield replace(request, enforce_eager=True)


def no_drafting(request: MemoryRequest) -> Iterator[MemoryRequest]:
    """Yield the same without speculative decoding, whose model takes memory and changes no answer."""
    if request.draft is not None:
        yield replace(request, draft=None)


def other_hardware(request: MemoryRequest) -> Iterator[MemoryRequest]:
    """Yield the other machines of the catalogue, the smallest first, if their own defaults would fit as well."""
    others = (load_hardware(name) for name in hardware_names() if name != request.hardware.name)
    for hardware in sorted(others, key=lambda h: h.visible_bytes):
        change = replace(request, hardware=hardware)
        heaviest = replace(
            change,
            max_num_seqs=max(request.max_num_seqs, hardware.default_max_num_seqs),
            max_num_batched_tokens=max(request.max_num_batched_tokens, hardware.default_max_num_batched_tokens),
        )
        if all(fits(replace(heaviest, ledger=ledger)) for ledger in request.ledger.on(hardware)):
            yield change


def smaller_model(request: MemoryRequest) -> Iterator[MemoryRequest]:
    """Yield the smaller models that reach as far, the largest first, each in its default format if this one was."""
    native = request.weight_format == request.default_format(request.model)
    now = request.model.weight_bytes(request.weight_format)
    changes = []
    for model in map(load_model, model_names()):
        weight_format = request.default_format(model) if native else request.weight_format
        if model.weight_bytes(weight_format) < now and model.max_context >= request.max_model_len:
            changes.append(replace(request, model=model, weight_format=weight_format))
    yield from sorted(changes, key=lambda c: -c.model.weight_bytes(c.weight_format))
