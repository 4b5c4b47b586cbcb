"""A configuration as a command line and as TOML says the same as the configuration."""

import contextlib
import io
import shlex
import tomllib
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pagedkv.errors import ConfigError
from pagedkv.sims.cli import main
from pagedkv.sims.command import changed, command_line, flat, to_toml
from pagedkv.sims.config import LoadConfig, MeasurementConfig, ServingConfig, SimulationConfig

TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=12).filter(lambda text: not text.startswith("-"))
VALUES: dict[Any, st.SearchStrategy[Any]] = {
    str: TEXT,
    int: st.integers(0, 2**62),
    float: st.floats(0, 1e300),
    bool: st.booleans(),
    tuple[str, ...]: st.lists(TEXT.filter(lambda text: "," not in text), min_size=1, max_size=3).map(tuple),
}


def values(annotation: Any) -> st.SearchStrategy[Any]:
    if annotation in VALUES:
        return VALUES[annotation]
    kinds = get_args(annotation)  # of a union or of a Literal
    return st.one_of(*(values(kind) for kind in kinds if kind is not type(None))) if type(None) in kinds else st.sampled_from(kinds)


SETTINGS = st.fixed_dictionaries(
    {},
    optional={f.name: values(f.type) for section in (LoadConfig, ServingConfig, MeasurementConfig) for f in fields(section)}
    | {"engine": TEXT.filter(lambda text: "," not in text)},  # a comma list is a comparison of engines
)


def parsed(argv: Sequence[str]) -> SimulationConfig:
    """Return the configuration that the command line makes of `argv`."""
    stop = mock.patch("pagedkv.sims.scenario.resolve", side_effect=ConfigError("seen"))
    with stop as resolve, contextlib.redirect_stderr(io.StringIO()) as err, pytest.raises(SystemExit):
        main(argv)
    assert err.getvalue() == "error: seen\n"
    return one_by_one(resolve.call_args[0][0])


def one_by_one(config: SimulationConfig) -> SimulationConfig:
    """Return `config` with every comma list of allocators spelt out: that is what it means."""
    names = config.measurement.allocator
    return config if names is None else changed(config, allocator=tuple(",".join(names).split(",")))


@given(changes=SETTINGS)
@settings(max_examples=60)
def test_a_command_line_gives_its_configuration_again(changes: dict[str, Any]) -> None:
    config = changed(SimulationConfig(), **changes)
    program, *argv = shlex.split(command_line(config))
    assert program == "simulate"
    assert parsed(argv) == config


@given(changes=SETTINGS)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_toml_gives_its_configuration_again(changes: dict[str, Any], tmp_path: Path) -> None:
    config = changed(SimulationConfig(), **changes)
    text = to_toml(flat(config))
    kept = {name: list(value) if isinstance(value, tuple) else value for name, value in flat(config).items() if value is not None}
    assert tomllib.loads(text) == {name.replace("_", "-"): value for name, value in kept.items()}
    (tmp_path / "config.toml").write_text(text, encoding="utf-8", newline="")
    assert parsed(["--config", str(tmp_path / "config.toml")]) == config


def test_toml_keeps_every_character() -> None:
    text = "".join(map(chr, range(1, 300))) + "\U0001f600"
    assert tomllib.loads(to_toml({"trace": text})) == {"trace": text}


def test_the_shortest_command() -> None:
    config = SimulationConfig(load=LoadConfig(users=100))
    assert command_line(config) == "simulate --users 100"
    assert command_line(config, users=200, enforce_eager=True) == "simulate --users 200 --enforce-eager"
    assert command_line(config, enable_chunked_prefill=False) == "simulate --users 100 --no-enable-chunked-prefill"
    assert command_line(config, goodput=("ttft:9", "tpot:8")) == "simulate --users 100 --goodput ttft:9 tpot:8"
    assert command_line(config, users=None, trace="my file.csv") == "simulate --trace 'my file.csv'"


def test_a_change_touches_nothing_else() -> None:
    config = SimulationConfig(load=LoadConfig(users=5, think_time="3s"))
    after = changed(config, seed=3, block_size=32)
    assert flat(after) == flat(config) | {"seed": 3, "block_size": 32}
    assert config.measurement.seed == 0


def test_a_change_of_no_setting_is_an_error() -> None:
    with pytest.raises((TypeError, KeyError, ValueError)):
        changed(SimulationConfig(), user=5)
