"""Figures as PNG and SVG files, where kaleido is installed and finds a Chrome or Chromium."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plotly.graph_objects import Figure

from pagedkv.errors import ConfigError
from pagedkv.sims.export import prepare_folder

FORMATS = ("svg", "png")
_WIDTH = 1000
_SCALE = {"svg": 1, "png": 2}
"""Twice as many pixels for a bitmap: legible in print."""
_HOW = "pip install 'pagedkv[images]', and a Chrome or Chromium, write them"


def check_images() -> None:
    """Make sure that there is something to write pictures with, before anything is computed.

    Raises:
        ConfigError: If kaleido is not installed.
    """
    if importlib.util.find_spec("kaleido") is None:
        raise ConfigError(f"--images writes SVG and PNG, and kaleido is not installed; {_HOW}, and --report FILE needs neither")


def write_images(figures: Mapping[str, Figure], folder: Path) -> str | None:
    """Write each figure to `folder` as NAME.svg and NAME.png, light; return why that did not work, None if it did.

    Args:
        figures: By name.
        folder: Made if it is not there.

    Raises:
        ConfigError: If the folder cannot be written, or kaleido is not installed.
    """
    check_images()
    prepare_folder(folder, flag="--images")
    import kaleido  # noqa: PLC0415 (not part of the light install)

    tasks: list[dict[str, Any]] = []
    for name, figure in figures.items():
        drawn = _still(figure)
        for format in FORMATS:
            size = {"width": _WIDTH, "height": figure.layout.height or 500, "scale": _SCALE[format]}
            tasks.append({"fig": drawn, "path": folder / f"{name}.{format}", "opts": {"format": format, **size}})
    try:
        kaleido.write_fig_from_object_sync(tasks)
    except Exception as error:  # of kaleido, of the browser, of what lies between: the answer itself does not need them
        said = " ".join(map(str, error.args)) or type(error).__name__
        return f"no PNG or SVG of the figures: {said.splitlines()[0][:200]}; {_HOW}"
    missing = [str(task["path"]) for task in tasks if not Path(task["path"]).is_file()]
    return f"no picture in {', '.join(missing)}: kaleido did not write it" if missing else None


def _still(figure: Figure) -> dict[str, Any]:
    """Return the figure without its controls and frames: a picture does not move."""
    whole: dict[str, Any] = figure.to_plotly_json()
    layout = {name: value for name, value in whole["layout"].items() if name not in ("sliders", "updatemenus")}
    return {"data": whole["data"], "layout": layout}
