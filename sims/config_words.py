"""A configuration read from words of a command line, as `simulate` reads them."""

from collections.abc import Sequence
from typing import Annotated, Any, get_type_hints

from cyclopts import App, Parameter

from pagedkv.sims.cli_output import DEFAULT_PARAMETER
from pagedkv.sims.config import LoadConfig, MeasurementConfig, ServingConfig, SimulationConfig

FIELD_TYPES: dict[str, Any] = {
    name: kind for section in (LoadConfig, ServingConfig, MeasurementConfig) for name, kind in get_type_hints(section).items()
}
"""The type of every setting, by field name."""

_words = App(name="simulate", default_parameter=DEFAULT_PARAMETER, help_flags=(), version_flags=())


@_words.default
def _configured(
    *,
    load: Annotated[LoadConfig, Parameter(name="*")] = LoadConfig(),  # noqa: B008
    serving: Annotated[ServingConfig, Parameter(name="*")] = ServingConfig(),  # noqa: B008
    measurement: Annotated[MeasurementConfig, Parameter(name="*")] = MeasurementConfig(),  # noqa: B008
) -> SimulationConfig:
    return SimulationConfig(load=load, serving=serving, measurement=measurement)


def parse_config(words: Sequence[str]) -> SimulationConfig:
    """Return the configuration that `words`, such as ["--users", "100"], spell.

    Raises:
        CycloptsError: If a flag is unknown or a value is none of its kind.
    """
    config: SimulationConfig = _words(list(words), exit_on_error=False, print_error=False, result_action="return_value")
    return config
