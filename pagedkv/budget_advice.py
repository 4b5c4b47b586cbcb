"""What to change when a model does not fit: every suggestion was planned again, and fits."""

from collections.abc import Iterator
from dataclasses import fields
from itertools import chain, combinations, islice

from pagedkv.memory_request import MemoryRequest
from pagedkv.remedies import fits, narrower_weights, other_hardware, smaller_model

NUM_SUGGESTIONS = 3

_FLAGS = {
    "model": "--model",
    "hardware": "--hardware",
    "weight_format": "--quantization",
    "kv_cache_dtype": "--kv-cache-dtype",
    "max_model_len": "--max-model-len",
    "max_num_seqs": "--max-num-seqs",
    "max_num_batched_tokens": "--max-num-batched-tokens",
}


def settings_that_fit(request: MemoryRequest) -> tuple[str, ...]:
    """Return up to three changes to `request` that fit, as flags, the mildest first.

    One setting is changed, then two of those that do not help alone, then the machine or the model.
    """
    suggestions: list[str] = []
    for change in _changes_that_fit(request):
        flags = as_flags(request, change)
        if flags not in suggestions:
            suggestions.append(flags)
        if len(suggestions) == NUM_SUGGESTIONS:
            break
    return tuple(suggestions)


def _changes_that_fit(request: MemoryRequest) -> Iterator[MemoryRequest]:
    helpless = []
    for remedy in request.ledger.remedies():
        change = next(filter(fits, remedy(request)), None)
        if change is None:
            helpless.append(remedy)
        else:
            yield change
    for first, second in combinations(helpless, 2):
        both = chain.from_iterable(map(second, first(request)))
        yield from islice(filter(fits, both), 1)
    narrower = list(narrower_weights(request))
    larger_steps = [
        filter(fits, other_hardware(request)),
        filter(fits, chain.from_iterable(map(other_hardware, narrower))),
        filter(fits, smaller_model(request)),
    ]
    for changes in larger_steps:
        yield from islice(changes, 1)
    yield from chain(*larger_steps, filter(fits, chain.from_iterable(map(smaller_model, narrower))))


def as_flags(request: MemoryRequest, change: MemoryRequest) -> str:
    """Return what to add to the command line to turn `request` into `change`."""
    flags = ["--enforce-eager"] if change.enforce_eager and not request.enforce_eager else []
    for name, flag in _FLAGS.items():
        value = getattr(change, name)
        changed = value != getattr(request, name)
        if name == "weight_format" and change.model != request.model:
            # Whether or not the user named a format, it must be clear which one the other model has.
            formats = (value, request.weight_format, change.ledger.native_format(change.model))
            changed = len({change.model.weight_bytes(fmt) for fmt in formats}) > 1
        if changed:
            flags.append(f"{flag} {getattr(value, 'name', value)}")
    for field in fields(change.ledger):  # type: ignore[arg-type]  # ledgers are dataclasses
        value = getattr(change.ledger, field.name)
        if value != getattr(request.ledger, field.name):
            flag = field.name.replace("_", "-")
            flags.append(f"--no-{flag}" if value is False else f"--{flag} {value}")
    return " ".join(flags)
