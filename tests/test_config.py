"""What can be asked for: times, defaults, and one flag per field."""

from dataclasses import FrozenInstanceError, fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedkv.errors import ConfigError
from pagedkv.sims.config import LoadConfig, MeasurementConfig, ServingConfig, SimulationConfig, parse_seconds

SECTIONS = (LoadConfig, ServingConfig, MeasurementConfig)
UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


@given(number=st.decimals(0, 10**6, places=6), unit=st.sampled_from(sorted(UNITS)), space=st.sampled_from(["", " "]))
def test_a_time_is_a_number_and_a_unit(number: float, unit: str, space: str) -> None:
    assert parse_seconds(f"{space}{number:f}{space}{unit}{space}", name="duration") == pytest.approx(float(number) * UNITS[unit])


@pytest.mark.parametrize(
    "text", ["", "s", "abc", "5x", "-5s", "+5s", "nan", "inf", "1e999", "5 5s", "5S", "1,5s", "５s", "0x10", "5s;"]
)
def test_what_is_no_time_is_named_with_what_would_be(text: str) -> None:
    with pytest.raises(ConfigError, match=r"think-time .* is not a time: write a number with a unit, such as 20s") as error:
        parse_seconds(text, name="think-time")
    assert repr(text) in str(error.value)


def test_a_time_is_finite() -> None:
    with pytest.raises(ConfigError, match="duration"):
        parse_seconds("9" * 400 + "s", name="duration")


def test_a_name_is_one_setting() -> None:
    names = [f.name for section in SECTIONS for f in fields(section)]
    assert len(names) == len(set(names))
    assert {f.type for f in fields(SimulationConfig)} == set(SECTIONS)


def test_a_configuration_does_not_change() -> None:
    with pytest.raises(FrozenInstanceError):
        SimulationConfig().measurement.seed = 1  # type: ignore[misc]
