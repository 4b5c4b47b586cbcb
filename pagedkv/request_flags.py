"""What to add to a command line to turn one memory request into another."""

from dataclasses import fields

from pagedkv.memory_request import MemoryRequest

_FLAGS = {
    "model": "--model",
    "hardware": "--hardware",
    "weight_format": "--quantization",
    "kv_cache_dtype": "--kv-cache-dtype",
    "max_model_len": "--max-model-len",
    "max_num_seqs": "--max-num-seqs",
    "max_num_batched_tokens": "--max-num-batched-tokens",
}


def as_flags(request: MemoryRequest, change: MemoryRequest) -> str:
    """Return what to add to the command line to turn `request` into `change`; or what to leave out, in words."""
    flags = ["no speculative decoding"] if change.draft is None and request.draft is not None else []
    flags += ["--enforce-eager"] if change.enforce_eager and not request.enforce_eager else []
    for name, flag in _FLAGS.items():
        value = getattr(change, name)
        changed = value != getattr(request, name)
        if name == "weight_format" and change.model != request.model:
            # Whether or not the user named a format, it must be clear which one the other model has.
            formats = (value, request.weight_format, change.default_format(change.model))
            changed = len({change.model.weight_bytes(fmt) for fmt in formats}) > 1
        if changed:
            flags.append(f"{flag} {getattr(value, 'name', value)}")
    for field in fields(change.ledger):  # type: ignore[arg-type]  # ledgers are dataclasses
        value = getattr(change.ledger, field.name)
        if value != getattr(request.ledger, field.name):
            flag = field.name.replace("_", "-")
            flags.append(f"--no-{flag}" if value is False else f"--{flag} {value}")
    return " ".join(flags)
