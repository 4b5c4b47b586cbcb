"""Derive a table of `lengths.toml` from a file of request lengths.

Example:
    python -m pagedkv.sims.derive_lengths sharegpt_lengths.csv.gz --name sharegpt --source "origin, licence"
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pagedkv.sims.traces import read_lengths

PROBABILITIES = tuple(
    round(percent / 100, 7)
    for percent in (0, 0.1, 0.5, *range(1, 100), 99.5, 99.75, 99.9, 99.95, 99.98, 99.99, 99.995, 99.998, 100)
)
"""Where quantiles are taken: dense at the top, where few requests carry much of the mean (the longest 0.1 % of the
ShareGPT prompts hold 7 % of the prompt tokens)."""

RANK_BINS = 20
"""Bins per length in the joint table. Fewer blur which prompts have which outputs, more would count rows one by one."""

Lengths = npt.NDArray[np.int64]


def spearman(first: Lengths, second: Lengths) -> float:
    """Return Spearman's rank correlation, equal values having their mean rank."""
    ranks = []
    for values in (first, second):
        _, index, count = np.unique(values, return_inverse=True, return_counts=True)
        ranks.append((np.cumsum(count) - (count - 1) / 2)[index])
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1])


def joint_ranks(first: Lengths, second: Lengths) -> Lengths:
    """Return how many rows have rank bin i in `first` and j in `second`, shape (`RANK_BINS`, `RANK_BINS`).

    Equal values are ranked in random order (fixed seed), so that all rows and all columns sum to the same number, give
    or take one.
    """
    rng = np.random.default_rng(0)
    n = len(first)
    bins = []
    for values in (first, second):
        rank = np.empty(n, dtype=np.int64)
        rank[np.lexsort((rng.random(n), values))] = np.arange(n)
        bins.append(rank * RANK_BINS // n)
    joint = np.zeros((RANK_BINS, RANK_BINS), dtype=np.int64)
    np.add.at(joint, tuple(bins), 1)
    return joint


def table(path: Path, *, name: str, source: str) -> str:
    """Return the TOML table `name` for the lengths in `path`."""
    prompt_tokens, output_tokens = read_lengths(path)
    quantiles = [np.rint(np.quantile(x, PROBABILITIES)).astype(int).tolist() for x in (prompt_tokens, output_tokens)]
    text = [
        f"[{name}]",
        f"source = {json.dumps(source)}",
        f"derived = {json.dumps(f'python -m pagedkv.sims.derive_lengths {path.name} --name {name}')}",
        f"rows = {len(prompt_tokens)}",
        f"spearman = {spearman(prompt_tokens, output_tokens):.4f}",
        _array("probabilities", PROBABILITIES),
        _array("prompt_tokens", quantiles[0]),
        _array("output_tokens", quantiles[1]),
        "joint_ranks = [",
        *(f"  {row}," for row in joint_ranks(prompt_tokens, output_tokens).tolist()),
        "]",
    ]
    return "\n".join(text) + "\n"


def _array(key: str, values: Sequence[float]) -> str:
    """Return a TOML array, 20 values a line."""
    lines = (", ".join(str(value) for value in values[i : i + 20]) for i in range(0, len(values), 20))
    return "\n".join([f"{key} = [", *(f"  {line}," for line in lines), "]"])


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m pagedkv.sims.derive_lengths", description="Derive lengths.toml.")
    parser.add_argument("file", type=Path, help="a trace or a file of lengths, in any trace format")
    parser.add_argument("--name", required=True, help="the name of the table")
    parser.add_argument("--source", required=True, help="where the file comes from, and its licence")
    parsed = parser.parse_args(arguments)
    sys.stdout.write(table(parsed.file, name=parsed.name, source=parsed.source))


if __name__ == "__main__":
    main()
