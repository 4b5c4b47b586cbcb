"""The models and machines that pagedkv knows by name. The only module that reads files."""

import json
import reprlib
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

from pagedkv.errors import ConfigError, unknown_name
from pagedkv.hardware_spec import HardwareSpec
from pagedkv.hardware_toml import MODEL_MACHINES, hardware_from_table
from pagedkv.hf_config import model_from_config
from pagedkv.model_spec import ModelSpec
from pagedkv.model_toml import model_from_table
from pagedkv.repository_name import RepositoryName, read_repository_name

USERS_UTF_8 = "utf-8-sig"
"""Encoding of files that people write: UTF-8, and with the byte-order mark that Windows' editors put before it."""
MAX_JSON_BYTES = 2**24
"""No config.json is larger."""

_FOLDER = Path(__file__).parent


def model_names() -> tuple[str, ...]:
    """Return the names of all models, in the catalogue's order."""
    return tuple(_read("models.toml"))


def hardware_names() -> tuple[str, ...]:
    """Return the names of all machines, in the catalogue's order."""
    return tuple(_read("hardware.toml"))


def load_model(name: str) -> ModelSpec:
    """Return a model by its catalogue name or Hugging Face id, in any case, or from a config.json or the folder it is in.

    A repository's name does without its owner, unless there is a file or folder of this name.

    Raises:
        ConfigError: If there is no such model, with what would name it or the nearest names, or if the file describes none that
            is understood.
    """
    entry = _model_index().get(name.lower())
    if entry is not None:
        return _model(entry)
    path = Path(name)
    if name.endswith(".json") or (name and _exists(path)):
        return _model_file(path, name)
    entry = _repository_index().get(name.lower())
    if entry is not None:
        return _model(entry)
    read = read_repository_name(name)
    known = _base_index().get(read.model)
    if known is not None:
        raise ConfigError(f"unknown model {name!r}: it looks like {_as_flags(known, read)}")
    raise unknown_name("model", name, model_names(), hint="Or name a config.json, or the folder it is in.")


def quantized_repository(name: str) -> tuple[str, str] | None:
    """Return (catalogue name, weight format) for the name of a repository that says how its weights are stored, whoever made it.

    E.g. "RedHatAI/Meta-Llama-3.1-8B-Instruct-FP8" is ("llama-3.1-8b", "fp8"). None: the model is unknown, or the name does not
    say the format, or has none that is known here.
    """
    read = read_repository_name(name)
    known = _base_index().get(read.model)
    return None if known is None or read.weight_format is None else (known, read.weight_format)


def known_model(name: str) -> bool:
    """Return whether the catalogue has a model of this name or Hugging Face id."""
    return name.lower() in _model_index() or name.lower() in _repository_index()


def _as_flags(entry: str, read: RepositoryName) -> str:
    """Return the flags for a repository of a model of the catalogue."""
    if not read.gguf:
        return f"--model {entry}" + (f" --quantization {read.weight_format}" if read.weight_format else "")
    reader = f"--model {entry} --engine llama-cpp"
    if read.weight_format is not None:
        return f"{reader} --quantization {read.weight_format}"
    if _model(entry).native_format.name == "mxfp4":
        return f"{reader}, whose weights are the published mxfp4"
    return f"{reader} --quantization q4_k_m, or q8_0, q6_k, q5_k_m or q4_0 if that is your GGUF file"


@cache
def _model(entry: str) -> ModelSpec:
    table = _read("models.toml")[entry]
    like = table.get("like")
    return model_from_table(entry, table, like=None if like is None else _read("models.toml")[like])


@cache
def _model_index() -> dict[str, str]:
    """Return the catalogue name for every name that a model goes by, in lower case."""
    index: dict[str, str] = {}
    for entry, table in _read("models.toml").items():
        index |= {name.lower(): entry for name in (entry, table["hf_id"], *table.get("aliases", ()))}
    return index


@cache
def _repository_index() -> dict[str, str]:
    """Return the catalogue name for every repository's name without its owner, in lower case."""
    return {full.rpartition("/")[2]: entry for full, entry in _model_index().items()}


@cache
def _base_index() -> dict[str, str]:
    """Return the catalogue name by what others call their copies of a repository, in lower case.

    That is its name without the format, with its owner before it or without: "Qwen_Qwen3-8B", "Nemotron-3-Nano-30B-A3B".
    """
    index: dict[str, str] = {}
    for full, entry in _model_index().items():
        owner, _, last = full.rpartition("/")
        base = read_repository_name(last).model
        names = {base, *(base.removeprefix(f"{prefix}-") for prefix in (owner, "meta"))}
        if owner:
            names |= {f"{owner}_{base}"}
        for name in names:
            index.setdefault(name, entry)
    return index


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name that no file can have
        return False


def _model_file(path: Path, name: str) -> ModelSpec:
    """Return the model of a config.json; a hf_quant_config.json beside it says how its weights are stored."""
    if path.is_dir():
        path /= "config.json"
        if not path.is_file():
            raise ConfigError(f"the folder {name!r} has no config.json: name the file, or a model of the catalogue")
    config = _read_json(path)
    beside = path.with_name("hf_quant_config.json")
    if "quantization_config" not in config and beside.is_file():
        config["quantization_config"] = _read_json(beside).get("quantization")
    title = path.parent.name if path.name == "config.json" and path.parent.name else path.stem
    return model_from_config(config, name=name, title=title, source=str(path))


def _read_json(path: Path) -> dict[str, Any]:
    """Return the object that a JSON file holds."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ConfigError(f"{str(path)!r} is larger than {MAX_JSON_BYTES:,} bytes: is it a config.json?")
        value = json.loads(path.read_text(encoding=USERS_UTF_8))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the config.json {str(path)!r}: {error}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{str(path)!r} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{str(path)!r} holds {reprlib.repr(value)}: needs an object, as a config.json does")
    return value


def load_hardware(name: str) -> HardwareSpec:
    """Return a machine by its catalogue name or an alias, in any case, or from a file that ends in .toml.

    The file holds the fields of one table of hardware.toml, with or without its `[name]`; docs/hardware.md says how to write them.

    Raises:
        ConfigError: If there is no such machine, with the nearest names, or if the file is not well-formed.
    """
    return _hardware_file(Path(name)) if name.endswith(".toml") else _hardware(name.lower())


@cache
def _hardware(name: str) -> HardwareSpec:
    for entry, table in _read("hardware.toml").items():
        if name in (entry, *table.get("aliases", ())):
            model_machine = MODEL_MACHINES.get(table["memory_kind"], entry)
            return hardware_from_table(entry, table, model_machine=None if model_machine == entry else _hardware(model_machine))
    raise unknown_name("hardware", name, hardware_names(), hint="Or name a file that ends in .toml.")


def _hardware_file(path: Path) -> HardwareSpec:
    try:
        table = tomllib.loads(path.read_text(encoding=USERS_UTF_8))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the hardware file {str(path)!r}: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"the hardware file {str(path)!r} is not TOML: {error}") from error
    if len(table) == 1 and isinstance(inner := next(iter(table.values())), dict) and inner.keys() & {"memory_kind", "like"}:
        table = inner  # under its [name], as in hardware.toml
    if "like" in table:
        like = table["like"]
        if not isinstance(like, str) or like.endswith(".toml"):
            raise ConfigError(
                f"{path.name}.like is {like!r}: it must be the name of a machine of the catalogue, such as 'dgx-spark'"
            )
        return hardware_from_table(path.name, table, like=_hardware(like.lower()), unsourced=path.name)
    model_machine = MODEL_MACHINES.get(str(table.get("memory_kind")))
    return hardware_from_table(
        path.name, table, model_machine=_hardware(model_machine) if model_machine else None, unsourced=path.name
    )


@cache
def _read(filename: str) -> dict[str, dict[str, Any]]:
    return tomllib.loads((_FOLDER / filename).read_text(encoding="utf-8"))
