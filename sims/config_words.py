"""Settings read from words of a command line, as `simulate` reads them."""

from collections.abc import Sequence
from typing import Annotated, Any, get_type_hints

from cyclopts import App, Parameter, convert

from pagedkv.sims.config import LoadConfig, MeasurementConfig, ServingConfig, SimulationConfig

FIELD_TYPES: dict[str, Any] = {
    name: kind for section in (LoadConfig, ServingConfig, MeasurementConfig) for name, kind in get_type_hints(section).items()
}
"""The type of every setting, by field name."""


def _whole(kind: Any, text: str) -> Any:
    """Convert as cyclopts would, but take only whole numbers for whole numbers: it would round 5.5 users to 6.

    As in vLLM, 16k is 16,000 and 16K is 16,384.
    """
    if kind is int:
        scale = {"k": 1000, "K": 1024}.get(text[-1:], 1)
        try:
            return int(text[:-1] if scale > 1 else text) * scale
        except ValueError:
            raise ValueError(f"{text!r} is not a whole number") from None
    return convert(kind, [text])


def converted(kind: Any, tokens: Sequence[Any]) -> Any:
    """Return the value of type `kind` that `tokens` spell."""
    return convert(kind, tokens, converter=_whole)


DEFAULT_PARAMETER = Parameter(consume_multiple=True, negative_iterable=(), converter=converted)
"""How every command reads its flags."""

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
