"""The catalogues as lists: those of their rows that a text finds, for a reader and for a program."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from pagedkv.catalogue import hardware_names, load_hardware, load_model, model_names
from pagedkv.errors import unknown_name
from pagedkv.hardware_spec import HardwareSpec
from pagedkv.model_spec import ModelSpec

SCHEMA_VERSION = 1
_Row = TypeVar("_Row", ModelSpec, HardwareSpec)


def find_models(text: str = "") -> dict[str, ModelSpec]:
    """Return the models of the catalogue whose name or title has every word of `text`, by name; else those with such a repository.

    Raises:
        ConfigError: If there is none, with the nearest names.
    """
    return _found("model", text, model_names(), load_model, lambda model: (model.hf_id, *model.aliases))


def find_hardware(text: str = "") -> dict[str, HardwareSpec]:
    """Return the machines of the catalogue whose name or title has every word of `text`, by name.

    Raises:
        ConfigError: If there is none, with the nearest names.
    """
    return _found("machine", text, hardware_names(), load_hardware, lambda machine: machine.aliases)


def _found(
    kind: str, text: str, names: Sequence[str], load: Callable[[str], _Row], others: Callable[[_Row], Iterable[str]]
) -> dict[str, _Row]:
    """Return the rows that a text finds: by name and title, and if that is none, by one of their `others`."""
    rows = {name: load(name) for name in names}
    words = text.lower().split()
    found = {name: row for name, row in rows.items() if _has(words, f"{name} {row.title}")}
    found = found or {name: row for name, row in rows.items() if any(_has(words, other) for other in others(row))}
    if not found:
        raise unknown_name(kind, text, names)
    return found


def _has(words: Iterable[str], text: str) -> bool:
    return all(word in text.lower() for word in words)


def models_document(models: Iterable[tuple[str, ModelSpec]]) -> dict[str, Any]:
    """Return models in JSON types; sizes in bytes, of a KV cache in the model's own type."""
    rows = []
    for name, model in models:
        spec = model.kv_spec("auto")
        rows.append(
            {
                "name": name,
                "title": model.title,
                "params_total": model.params_total,
                "params_active": model.params_active,
                "native_format": model.native_format.name,
                "weight_bytes": model.weight_bytes(model.native_format),
                "num_layers": model.num_layers,
                "kv_bytes_per_token": spec.bytes_per_token,
                "state_bytes_per_sequence": spec.state_bytes_per_sequence,
                "max_context": model.max_context,
            }
        )
    return {"schema_version": SCHEMA_VERSION, "models": rows}


def hardware_document(machines: Iterable[tuple[str, HardwareSpec]]) -> dict[str, Any]:
    """Return machines in JSON types; sizes in bytes, rates per second."""
    rows = [
        {
            "name": name,
            "title": machine.title,
            "memory_kind": machine.memory_kind,
            "visible_bytes": machine.visible_bytes,
            "memory_bandwidth_bytes_per_s": machine.memory_bandwidth.value,
            "read_bandwidth_bytes_per_s": machine.read_bandwidth_bytes_per_s,
            "bf16_flops_per_s": machine.effective_flops(None),
            "default_gpu_memory_utilization": machine.default_utilization.value,
        }
        for name, machine in machines
    ]
    return {"schema_version": SCHEMA_VERSION, "machines": rows}
