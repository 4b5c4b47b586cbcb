"""A machine written as a file is the same machine when read."""

import tomllib
from dataclasses import fields, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedkv.catalogue import hardware_names, load_hardware
from pagedkv.hardware_spec import Figure, HardwareSpec
from pagedkv.hardware_text import hardware_lines, quoted
from pagedkv.hardware_toml import hardware_from_table
from pagedkv.sims.step_groups import toml_lines

SPARK = load_hardware("dgx-spark")


def same(ours: HardwareSpec, theirs: HardwareSpec) -> None:
    for (label, mine), (other_label, its) in zip(ours.figures(), theirs.figures(), strict=True):
        assert (label, mine.tag, mine.source) == (other_label, its.tag, its.source)
        assert mine.value == pytest.approx(its.value, rel=1e-9), label
    for spec in fields(HardwareSpec):
        value = getattr(theirs, spec.name)
        if isinstance(value, str | bool) and spec.name not in ("name", "like"):
            assert getattr(ours, spec.name) == value


@pytest.mark.parametrize("name", hardware_names())
def test_every_machine_survives_being_written(name: str, tmp_path: Path) -> None:
    machine, path = load_hardware(name), tmp_path / "mine.toml"
    path.write_text("\n".join(hardware_lines(machine)), encoding="utf-8")
    same(load_hardware(str(path)), machine)
    assert list(hardware_lines(machine, like=machine)) == [f'like = "{name}"']


@pytest.mark.parametrize("name", hardware_names())
def test_any_machine_can_be_written_as_another_that_differs(name: str, tmp_path: Path) -> None:
    machine, path = load_hardware(name), tmp_path / "mine.toml"
    path.write_text("\n".join(hardware_lines(machine, like=SPARK)), encoding="utf-8")
    written = load_hardware(str(path))
    assert written.like == "dgx-spark"
    missing = set(SPARK.spec_flops) - set(machine.spec_flops)  # a file adds rates and takes none away
    if not missing and machine.disk_read_bandwidth is not None:
        same(written, machine)
    assert written.read_bandwidth.source == machine.read_bandwidth.source


@given(text=st.text(), value=st.floats(1e3, 1e13))
def test_any_source_and_number_survive(text: str, value: float) -> None:
    source = f"x{text}"
    figure = Figure(value, "measured", source)
    machine = replace(SPARK, name="mine.toml", like="dgx-spark", read_bandwidth=figure)
    table = tomllib.loads("\n".join(hardware_lines(machine, like=SPARK)))
    again = hardware_from_table("mine.toml", table, like=SPARK)
    assert again.read_bandwidth.source == source
    assert again.read_bandwidth.value == pytest.approx(value, rel=1e-9)


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_is_quoted_as_toml_reads_it(text: str) -> None:
    assert tomllib.loads(f"x = {quoted(text)}") == {"x": text}
    assert tomllib.loads("\n".join(toml_lines({"a": [text], "b": text, "c": 3, "d": 0.25, "e": True}))) == {
        "a": [text],
        "b": text,
        "c": 3,
        "d": 0.25,
        "e": True,
    }
