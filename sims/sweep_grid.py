r"""What a sweep runs: flags with several values each, and every combination of them.

The syntax, for any flag of `simulate`:

* a comma separates values: `--users 10,20`, `--model llama-3.1-8b,qwen2.5-7b`, `--kv-cache-dtype auto,fp8`; `\,` is a comma itself;
* `a..b` or `a..b:step` is a range of a number, a time or a size, b included if a step falls on it: `--users 50..100:10`,
  `--think-time 5s..20s:5s`. The three have the same unit. Without a step it is 1, which only whole numbers may leave out;
* both may be mixed: `--users 10,20,50..100:10`;
* a value of --goodput or --fault is words, as ever: `--goodput ttft:2000 tpot:100,ttft:500 tpot:50` are two sets of two goals;
* every run has one allocator, paged unless said, or what the engine runs on: `--allocator paged,contiguous-max` sweeps over two;
* a switch is swept as `--enforce-eager true,false`, and set as ever.
"""

import itertools
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, get_args

from cyclopts import CoercionError

from pagedkv.errors import ConfigError, unknown_name
from pagedkv.sims.command import changed, flat
from pagedkv.sims.config import SimulationConfig, parse_seconds
from pagedkv.sims.config_words import FIELD_TYPES, converted, parse_config
from pagedkv.sims.engines import load_engine
from pagedkv.units import parse_bytes

MOST_RUNS = 100_000
"""A larger sweep is a mistake."""
_TIMES = ("think_time", "duration", "warmup")
_SIZES = ("kv_cache_memory_bytes", "free_memory", "os_reserve", "other_programs")
_WORDS = ("goodput", "fault")
"""Settings of several words."""
_MEASURE = r"(-?[0-9]*\.?[0-9]+)\s*([A-Za-z]*)"
_RANGE = re.compile(rf"{_MEASURE}\s*\.\.\s*{_MEASURE}(?:\s*:\s*{_MEASURE})?")
_COMMA = re.compile(r"(?<!\\),")


@dataclass(frozen=True, slots=True, kw_only=True)
class Axis:
    """A flag with more than one value."""

    name: str
    """Field name."""
    values: tuple[Any, ...]
    """As the field takes them; numbers, times and sizes ascending, others in the order given."""

    @property
    def numeric(self) -> bool:
        """Whether its values are numbers."""
        return all(isinstance(value, int | float) and not isinstance(value, bool) for value in self.values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One combination."""

    values: dict[str, Any]
    """By name of the axis."""
    config: SimulationConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """All combinations of the values of some flags, the others fixed."""

    base: SimulationConfig
    """The fixed settings; swept ones as in the first combination."""
    axes: tuple[Axis, ...]
    """In the order given; the last varies fastest."""

    def __len__(self) -> int:
        """Return the number of combinations."""
        number = 1
        for axis in self.axes:
            number *= len(axis.values)
        return number

    def __iter__(self) -> Iterator[Point]:
        """Yield the combinations, sorted."""
        names = [axis.name for axis in self.axes]
        for values in itertools.product(*(axis.values for axis in self.axes)):
            point = dict(zip(names, values, strict=True))
            yield Point(values=point, config=_with_one_allocator(changed(self.base, **point)))


def _with_one_allocator(config: SimulationConfig) -> SimulationConfig:
    """Return `config` with what its engine runs on, if it names no allocator."""
    if config.measurement.allocator is not None:
        return config
    return changed(config, allocator=load_engine(config.serving.engine).columns(config.serving)[:1])


def parse_grid(words: Sequence[str]) -> Grid:
    """Return the combinations that `words`, flags with lists and ranges, describe.

    Raises:
        ConfigError: If a flag is unknown or comes twice, or a list or range is empty or too long.
        CycloptsError: If a value is none of its flag's kind.
    """
    flags = _flags(words)
    axes, fixed = [], {}
    for name, values in flags.items():
        parsed = _parsed(name, values)
        fixed[name] = parsed[0]
        if len(parsed) > 1:
            axes.append(Axis(name=name, values=parsed))
    grid = Grid(base=changed(SimulationConfig(), **fixed), axes=tuple(axes))
    if not axes:
        raise ConfigError("nothing is swept: give a flag several values, e.g. --users 10,20,50..100:10")
    if len(grid) > MOST_RUNS:
        raise ConfigError(f"the sweep has {len(grid):,} combinations: at most {MOST_RUNS:,} can be run; sweep fewer values")
    return grid


def _flags(words: Sequence[str]) -> dict[str, list[str]]:
    """Return the words behind each flag, by field name."""
    flags: dict[str, list[str]] = {}
    current: list[str] | None = None
    for word in words:
        if not word.startswith("--"):
            if current is None:
                raise ConfigError(f"{word!r} belongs to no flag: a sweep takes flags, e.g. --users 10,20")
            current.append(word)
            continue
        flag, equals, value = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        switched_off = name.startswith("no_") and _is_switch(name.removeprefix("no_"))
        name = name.removeprefix("no_") if switched_off else name
        if name not in FIELD_TYPES:
            known = [each.replace("_", "-") for each in FIELD_TYPES]
            raise unknown_name("flag", flag.removeprefix("--"), known, hint="simulate --help explains them.")
        if name in flags:
            raise ConfigError(f"{flag} is given twice: write its values as one list, --{name.replace('_', '-')} a,b")
        current = flags[name] = [value] if equals else []
        if switched_off:
            if equals:
                raise ConfigError(f"{flag} takes no value")
            current.append("false")
            current = None
    return flags


def _parsed(name: str, words: list[str]) -> tuple[Any, ...]:
    """Return the values of one flag, as its field takes them, each once."""
    flag, kind = f"--{name.replace('_', '-')}", FIELD_TYPES[name]
    if _is_switch(name) and not words:
        words = ["true"]
    if not words:
        raise ConfigError(f"{flag} has no value")
    if name not in (*_WORDS, "allocator") and len(words) > 1 and not words[0].endswith(","):
        raise ConfigError(f"{flag} has {len(words)} words: separate values by commas, {flag} {','.join(words)}")
    texts = [text.strip().replace("\\,", ",") for text in _COMMA.split(" ".join(words))]
    if "" in texts:
        raise ConfigError(f"{flag} {' '.join(words)!r} has an empty value: write values between the commas")
    number = next((each for each in (int, float) if each in (get_args(kind) or (kind,))), None)
    measured = number is not None or name in (*_TIMES, *_SIZES)
    values: dict[Any, None] = {}
    for text in texts:
        for each in _range(flag, text, whole=number is int) if measured and ".." in text else [text]:
            values[_value(name, flag, each, number)] = None
            if len(values) > MOST_RUNS:
                raise ConfigError(f"{flag} {' '.join(words)} has more than {MOST_RUNS:,} values")
    if name in _TIMES:
        return tuple(sorted(values, key=lambda value: parse_seconds(value, name=flag)))
    if name in _SIZES:
        return tuple(sorted(values, key=lambda value: parse_bytes(value, name=flag)))
    return tuple(sorted(values)) if number else tuple(values)


def _is_switch(name: str) -> bool:
    kind = FIELD_TYPES.get(name)
    return bool in (get_args(kind) or (kind,))


def _value(name: str, flag: str, text: str, number: type | None) -> Any:
    if number is not None:
        with suppress(CoercionError):  # the long way says which flag it is
            return converted(number, (text,))
    if _is_switch(name):
        switches = {"true": True, "false": False}
        if text not in switches:
            raise ConfigError(f"{flag} {text!r} is a switch: true or false, or both as true,false")
        return switches[text]
    words = text.split() if name in _WORDS else [text]
    return flat(parse_config([f"{flag}={word}" for word in words]))[name]


def _range(flag: str, text: str, *, whole: bool) -> Iterator[str]:
    """Yield the values of the range `text`.

    Raises:
        ConfigError: If it is none, has none, or has too many.
    """
    match = _RANGE.fullmatch(text)
    if match is None:
        raise ConfigError(f"{flag} {text!r} is no range: write first..last or first..last:step, e.g. 50..100:10")
    first, unit, last, last_unit, step, step_unit = match.groups()
    if {unit, last_unit} | ({step_unit} if step is not None else set()) != {unit}:
        raise ConfigError(f"{flag} {text!r} mixes units: write first, last and step in the same")
    if step is None and (not whole or unit):
        raise ConfigError(f"{flag} {text!r} has no step: write {text}:step")
    start, stop, by = Decimal(first), Decimal(last), Decimal(step or 1)
    if by <= 0 or stop < start:
        raise ConfigError(f"{flag} {text!r} is empty: write the smaller value first, and a step above 0")
    count = int((stop - start) // by) + 1
    if count > MOST_RUNS:
        raise ConfigError(f"{flag} {text!r} has {count:,} values: at most {MOST_RUNS:,} can be run; take a larger step")
    return (f"{start + i * by}{unit}" for i in range(count))
