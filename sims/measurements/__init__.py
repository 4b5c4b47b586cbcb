"""Measurements of a user's own machine, read from what benchmarks and engines write.

A format is one module of this folder: it recognises a file by its content and returns the rates in it, or what an engine said of
its memory when it started. Adding a format is one new file with `@MEASUREMENT_FORMATS.register`.
"""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal, Protocol

from pagedkv.errors import ConfigError
from pagedkv.registry import Registry
from pagedkv.sims.traces import read_text
from pagedkv.sims.validation.benchmark_rows import BenchmarkRow

RateKind = Literal["prefill", "decode", "run"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredRate:
    """One rate, and the work that it is of."""

    where: str
    """The file and the place in it, or the flag."""
    kind: RateKind
    """`prefill`: prompts alone. `decode`: steps that make one token for each of `batch` sequences. `run`: both by turns."""
    batch: int
    """Sequences at once; the rate is of all together."""
    prompt_tokens: int = 0
    """Tokens computed of each prompt; 0 for `decode`."""
    depth: int = 0
    """Tokens in the cache: before the prompt, or for `decode` on average while tokens are made."""
    output_tokens: int = 0
    """Tokens made for each sequence; only `run` needs it."""
    tokens_per_s: float
    """Prompt tokens a second, or output tokens a second."""
    chunk_tokens: int | None = None
    """Most tokens of a step; None: the engine's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StartUp:
    """What vLLM said of its memory when it started; None where it did not."""

    where: str
    num_blocks: int | None = None
    """Blocks of the KV cache, the null block included."""
    block_size: int | None = None
    """Tokens per block."""
    kv_tokens: int | None = None
    """Tokens that the KV cache holds."""
    kv_bytes: int | None = None
    """Size of the KV cache, to `kv_bytes_digit`."""
    kv_bytes_digit: int = 1
    """Bytes that the last printed digit of `kv_bytes` stands for."""
    weight_bytes: int | None = None
    """What loading the model took."""
    graph_bytes: int | None = None
    """What was set aside for CUDA graphs, or else what they took."""
    visible_bytes: int | None = None
    """Memory of the device."""
    settings: tuple[tuple[str, str], ...] = ()
    """Settings by the name of `ServingConfig`'s field, as text: those that the log states."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Claims:
    """What a file says of who was measured; None where it says nothing."""

    engine: str | None = None
    """Engine without a version: llama-cpp, vllm."""
    version: str | None = None
    """The engine's version."""
    model: str | None = None
    """The model in the file's words."""
    num_params: float | None = None
    """Parameters of the model."""
    weights: str | None = None
    """Weight format by its name here."""
    device: str | None = None
    """The device in the file's words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurements:
    """What a file holds."""

    path: Path
    format: str
    """Name of its format, e.g. "llama-bench-table"."""
    claims: Claims = Claims()
    rates: tuple[MeasuredRate, ...] = ()
    rows: tuple[BenchmarkRow, ...] = ()
    """Rows that name a model each: the columns of `simulate validate --data`."""
    start_up: StartUp | None = None
    notes: tuple[str, ...] = ()
    """What a reader should know, e.g. what was left out."""


class MeasurementFormat(Protocol):
    """How one kind of file tells of measurements."""

    looks_like: ClassVar[str]
    """What such a file holds, for messages."""

    @staticmethod
    def matches(text: str) -> bool:
        """Return whether a file with this text is meant to be of this format; no two formats may claim one file."""
        ...

    @staticmethod
    def read(path: Path, text: str) -> Measurements:
        """Return what the file holds; raises ConfigError where a value is missing or cannot be, with place and value."""
        ...


MEASUREMENT_FORMATS: Registry[type[MeasurementFormat]] = Registry("pagedkv.sims.measurements", kind="measurement format")


def read_measurements(path: Path) -> Measurements:
    """Return what a file holds, in whichever format; of a folder its meta.json.

    Raises:
        ConfigError: If it cannot be read or is in no known format, with those that are.
    """
    if path.is_dir():
        if not (path / "meta.json").is_file():
            raise ConfigError(f"{path}: a folder without a meta.json: name a file, or a folder with a vLLM log")
        path /= "meta.json"
    text = read_text(path)
    known = {name: MEASUREMENT_FORMATS.load(name) for name in MEASUREMENT_FORMATS.names()}
    found = next((format for format in known.values() if format.matches(text)), None)
    if found is None:
        described = "".join(f"\n  {name}: {format.looks_like}" for name, format in known.items())
        first = next((line for line in text.splitlines() if line.strip()), "")
        raise ConfigError(f"{path}: no measurements that are understood; it begins with {first[:80]!r}. Known are{described}")
    return found.read(path, text)


def positive(value: object, where: str, name: str, needed: str = "a number above 0") -> float:
    """Return a number above 0.

    Raises:
        ConfigError: If `value` is none, with where it stands and what is needed.
    """
    number = float("nan")
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        with suppress(ValueError):
            number = float(value)
    if not 0 < number < float("inf"):
        shown = "is missing" if value is None else f"is {value!r}"
        raise ConfigError(f"{where}: {name} {shown}; needs {needed}")
    return number


def whole(value: object, where: str, name: str, *, least: int = 0) -> int:
    """Return a whole number of `least` or more.

    Raises:
        ConfigError: If `value` is none, with where it stands and what is needed.
    """
    try:
        number = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else float("nan")
    except ValueError:
        number = float("nan")
    if not least <= number <= 2**31 or number != int(number):
        shown = "is missing" if value is None else f"is {value!r}"
        raise ConfigError(f"{where}: {name} {shown}; needs a whole number of {least} or more")
    return int(number)
