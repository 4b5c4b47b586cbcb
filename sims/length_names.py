"""Distributions of lengths by name: the tables of `lengths.toml`, and files by their path."""

import os
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from pagedkv.errors import unknown_name
from pagedkv.sims.lengths import FileLengths, LengthDistribution, QuantileLengths


def length_names() -> tuple[str, ...]:
    """Return the names of the tables in `lengths.toml`."""
    return tuple(sorted(_tables()))


def load_lengths(name_or_path: str) -> LengthDistribution:
    """Return the distribution of that name, or the lengths in that file.

    Raises:
        ConfigError: If it is neither the name of a distribution nor looks like a path.
        TraceFormatError: If it is a path, and the file cannot be read.
    """
    if name_or_path in length_names():
        table = _tables()[name_or_path]
        return QuantileLengths(
            name=name_or_path,
            source=table["source"],
            probabilities=np.array(table["probabilities"], dtype=np.float64),
            prompt_quantiles=np.array(table["prompt_tokens"], dtype=np.float64),
            output_quantiles=np.array(table["output_tokens"], dtype=np.float64),
            joint_ranks=np.array(table["joint_ranks"], dtype=np.int64),
        )
    path = Path(name_or_path)
    if os.sep in name_or_path or path.suffix or path.exists():
        return FileLengths.read(path)
    hint = "The path of a trace or of a file of lengths works as well."
    raise unknown_name("length distribution", name_or_path, length_names(), hint=hint)


@cache
def _tables() -> dict[str, dict[str, Any]]:
    with Path(__file__).with_name("lengths.toml").open("rb") as file:
        return tomllib.load(file)
