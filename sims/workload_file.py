"""Reads the classes of a workload from a TOML file (docs/workloads.md). Every mistake names file, class and key."""

import math
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pagedkv.catalogue import USERS_UTF_8
from pagedkv.errors import ConfigError, unknown_name
from pagedkv.sims.config import MAX_S, parse_seconds
from pagedkv.sims.length_names import length_names, load_lengths
from pagedkv.sims.token_lengths import MOST_TOKENS, LengthsOf, LognormalLengths, SameLength, TokenLengths, UniformLengths
from pagedkv.sims.user_class import Turns, UserClass
from pagedkv.sims.workload import MOST_CLASSES

_BUILT_IN = Path(__file__).with_name("workloads")
_TOP_KEYS = ("class", "description")
_KEYS = (
    *("name", "users", "share", "request_rate", "think_time", "tool_time", "turns", "sessions", "system_prompt"),
    *("prompt", "output", "follow_up", "model", "source"),
)
_HOW_MANY = ("users", "share", "request_rate")
_SHARES_TOLERANCE = 1e-3
"""0.333 three times is meant to be 1."""
MOST_USERS = 1_000_000
_LENGTH_HINT = 'write a number, {mean = 500, cv = 1}, {min = 100, max = 900}, "sharegpt", or the name of a file'


@dataclass(frozen=True, slots=True)
class _Place:
    """Where in a file a value stands, for messages."""

    file: str
    user_class: str = ""
    key: str = ""

    def at(self, key: str) -> "_Place":
        return _Place(self.file, self.user_class, key)

    def __str__(self) -> str:
        parts = (self.file, self.user_class and f"class {self.user_class}", self.key)
        return ", ".join(part for part in parts if part)

    def error(self, problem: str) -> ConfigError:
        return ConfigError(f"{self}: {problem}")


def workload_names() -> tuple[str, ...]:
    """Return the names of the workloads that come along."""
    return tuple(sorted(path.stem for path in _BUILT_IN.glob("*.toml")))


def load_workload(name_or_path: str) -> tuple[UserClass, ...]:
    """Return the classes of the workload of that name, or of that file, one or more.

    Raises:
        ConfigError: If it is neither, or the file cannot be read or says what cannot be; with file, class, key and what would work.
    """
    path = Path(name_or_path)
    if name_or_path in workload_names():
        path = _BUILT_IN / f"{name_or_path}.toml"
    elif not (path.suffix or path.exists()):
        raise unknown_name("workload", name_or_path, workload_names(), hint="The path of a .toml file works as well.")
    where = _Place(name_or_path)
    try:
        document = tomllib.loads(path.read_text(encoding=USERS_UTF_8))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise where.error(f"cannot be read as a workload: {reason}") from error
    for key in document:
        if key not in _TOP_KEYS:
            raise unknown_name(f"key in {where}:", key, _TOP_KEYS, hint="A class of users begins with [[class]].")
    tables = document.get("class")
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise where.error("no classes of users in it: each begins with [[class]], then name, users or share, prompt, output, ...")
    if len(tables) > MOST_CLASSES:
        raise where.error(f"{len(tables):,} classes: at most {MOST_CLASSES:,}")
    classes = tuple(_user_class(table, where, i, path.parent) for i, table in enumerate(tables, start=1))
    _check_together(classes, where)
    return classes


def _check_together(classes: tuple[UserClass, ...], where: _Place) -> None:
    names = [user_class.name for user_class in classes]
    for name in names:
        if names.count(name) > 1:
            raise where.error(f"{names.count(name)} classes are named {name!r}: give each a name of its own")
    shares = {user_class.name: user_class.share for user_class in classes if user_class.share is not None}
    if shares and abs(math.fsum(shares.values()) - 1) > _SHARES_TOLERANCE:
        listed = " + ".join(f"{share:g}" for share in shares.values())
        raise where.error(f"the shares of {', '.join(shares)} are {listed} = {math.fsum(shares.values()):g}: they must sum to 1")


def _user_class(table: Mapping[str, Any], file: _Place, number: int, folder: Path) -> UserClass:
    name = table.get("name")
    if not isinstance(name, str) or not name.strip() or not name.isprintable():
        at = _Place(file.file, str(number), "name")
        raise at.error("missing" if name is None else f"{name!r} is no name: write a text" if name != "" else "is empty")
    where = _Place(file.file, name)
    for key in table:
        if key not in _KEYS:
            raise unknown_name(f"key in {where}:", key, _KEYS)
    given = [key for key in _HOW_MANY if key in table]
    if len(given) != 1:
        problem = f"{' and '.join(given)} contradict each other" if given else "how many are they"
        raise where.error(f"{problem}: give one of users (a number), share (of --users) and request_rate (requests per second)")
    _check_source(table, where)
    turns = _turns(table.get("turns", 1), where.at("turns"))
    _check_goes_together(table, turns, where)
    prompt = _lengths(_needed(table, "prompt", where, _LENGTH_HINT), "prompt", where.at("prompt"), folder)
    tokens, number_of_them = _system_prompt(table.get("system_prompt", 0), where.at("system_prompt"))
    return UserClass(
        name=name,
        prompt=prompt,
        output=_lengths(_needed(table, "output", where, _LENGTH_HINT), "output", where.at("output"), folder),
        follow_up=_lengths(table["follow_up"], "prompt", where.at("follow_up"), folder) if "follow_up" in table else prompt,
        turns=turns,
        think_time_s=_seconds(table.get("think_time", 0), where.at("think_time")),
        tool_time_s=_optional(table, "tool_time", where, _seconds),
        system_prompt_tokens=tokens,
        num_system_prompts=number_of_them,
        users=_optional(table, "users", where, lambda value, at: _whole(value, at, most=MOST_USERS)),
        share=_optional(table, "share", where, lambda value, at: _real(value, at, least=1e-6, most=1)),
        request_rate_per_s=_optional(table, "request_rate", where, lambda value, at: _real(value, at, least=1e-6, most=1e6)),
        model=_optional(table, "model", where, _model),
        sessions=_optional(table, "sessions", where, lambda value, at: _whole(value, at, most=MOST_TOKENS)),
    )


def _check_goes_together(table: Mapping[str, Any], turns: Turns, where: _Place) -> None:
    """Refuse keys that say nothing, and ask for those that are needed, so that no number is made up."""
    several = turns.mean > 1
    for key in ("follow_up", "tool_time"):
        if key in table and not several:
            raise where.at(key).error("is about later requests of a session, which has one: give turns as well, e.g. turns = 5")
    if several:
        _needed(table, "follow_up", where, f"what later requests add: {_LENGTH_HINT}")
    if "sessions" in table and "request_rate" in table:
        raise where.at("sessions").error("is per user, but these requests arrive at a rate: give users or share instead")
    if "request_rate" not in table:
        _needed(table, "think_time", where, 'the mean pause, e.g. "20s", or "0s" for a batch')
    elif "think_time" in table and ("tool_time" in table or not several):
        raise where.at("think_time").error("says nothing here: sessions begin at request_rate, and nothing pauses for a person")
    elif several and "think_time" not in table and "tool_time" not in table:
        raise where.error('needs think_time or tool_time, the mean pause before later requests of a session, e.g. "20s"')


def _check_source(table: Mapping[str, Any], where: _Place) -> None:
    source = table.get("source", "")
    if isinstance(source, str):
        return
    if not isinstance(source, dict) or not all(isinstance(text, str) for text in source.values()):
        raise where.at("source").error(f"{source!r} is neither a text nor a table of texts by key")
    for key in source:
        if key not in table or key == "source":
            raise where.at("source").error(f"names the source of {key}, which the class does not have")


def _needed(table: Mapping[str, Any], key: str, where: _Place, hint: str) -> Any:
    if key not in table:
        raise where.at(key).error(f"missing; {hint}")
    return table[key]


def _optional(table: Mapping[str, Any], key: str, where: _Place, read: Callable[[Any, _Place], Any]) -> Any:
    return read(table[key], where.at(key)) if key in table else None


def _whole(value: Any, where: _Place, *, most: int, least: int = 1) -> int:
    if type(value) is not int or not least <= value <= most:
        raise where.error(f"{value!r} is not a whole number from {least} to {most:,}")
    return value


def _real(value: Any, where: _Place, *, least: float, most: float) -> float:
    if type(value) not in (int, float) or not least <= value <= most:
        raise where.error(f"{value!r} is not a number from {least:g} to {most:,g}")
    return float(value)


def _model(value: Any, where: _Place) -> str:
    if not isinstance(value, str) or not value.strip():
        raise where.error(f'{value!r} is no model: write a name such as "llama-3.1-8b" (simulate models lists them)')
    return value


def _seconds(value: Any, where: _Place) -> float:
    if not isinstance(value, str) and type(value) not in (int, float):
        raise where.error(f'{value!r} is not a time: write e.g. "20s" or "500ms"')
    if not isinstance(value, str):
        return _real(value, where, least=0, most=MAX_S)
    return parse_seconds(value, name=f"{where}:")


def _table_of(value: Any, keys: tuple[str, str], where: _Place) -> tuple[Any, Any]:
    """Return the values of both `keys` of a table that has these and no others."""
    for key in value:
        if key not in keys:
            raise unknown_name(f"key in {where}:", key, keys)
    for key in keys:
        if key not in value:
            raise where.error(f"{value!r} has no {key}: {keys[0]} and {keys[1]} go together")
    return value[keys[0]], value[keys[1]]


def _turns(value: Any, where: _Place) -> Turns:
    if isinstance(value, dict):
        if list(value) != ["mean"]:
            raise where.error(f"{value!r}: write a whole number, or {{mean = 5}} for sessions that differ")
        return Turns(mean=_real(value["mean"], where.at(f"{where.key}.mean"), least=1, most=1e5), varies=value["mean"] > 1)
    return Turns(mean=_whole(value, where, most=100_000))


def _system_prompt(value: Any, where: _Place) -> tuple[int, int]:
    if not isinstance(value, dict):
        return _whole(value, where, least=0, most=MOST_TOKENS), 1
    tokens, number = _table_of(value, ("tokens", "number"), where)
    return _whole(tokens, where.at("system_prompt.tokens"), most=MOST_TOKENS), _whole(
        number, where.at("system_prompt.number"), most=MOST_USERS
    )


def _lengths(value: Any, part: str, where: _Place, folder: Path) -> TokenLengths:
    if isinstance(value, str):
        return _named_lengths(value, part, where, folder)
    if not isinstance(value, dict):
        if type(value) is not int:
            raise where.error(f"{value!r} is not a length in tokens: {_LENGTH_HINT}")
        return SameLength(tokens=_whole(value, where, most=MOST_TOKENS))
    if "mean" in value or "cv" in value:
        mean, cv = _table_of(value, ("mean", "cv"), where)
        least_mean = _real(mean, where.at(f"{where.key}.mean"), least=1, most=MOST_TOKENS)
        return LognormalLengths(mean=least_mean, cv=_real(cv, where.at(f"{where.key}.cv"), least=0, most=100))
    low, high = _table_of(value, ("min", "max"), where)
    least = _whole(low, where.at(f"{where.key}.min"), most=MOST_TOKENS)
    return UniformLengths(least=least, most=_whole(high, where.at(f"{where.key}.max"), least=least, most=MOST_TOKENS))


def _named_lengths(name: str, part: str, where: _Place, folder: Path) -> TokenLengths:
    """Return one side of a distribution that comes along, or of a file, whose path is relative to the workload's."""
    path = name if name in length_names() or not (folder / name).is_file() else str(folder / name)
    try:
        return LengthsOf(pairs=load_lengths(path), part="output" if part == "output" else "prompt")
    except ConfigError as error:
        raise where.error(str(error)) from error
