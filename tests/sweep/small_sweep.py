"""A sweep of ten short runs: its flags, and its files."""

import shlex
from pathlib import Path

from pagedkv.sims.sweep_grid import Grid, parse_grid

BASE = (
    "--think-time 1s --random-input-len 400 --random-output-len 60 --hardware rtx-4090 --max-model-len 1024 "
    "--duration 8s --warmup 2s --goodput ttft:400 tpot:40"
)
FLAGS = f"{BASE} --users 2..10:2 --num-gpu-blocks-override 100,200"
FINAL = ("results.csv", "results.json", "sweep.html")


def grid(text: str) -> Grid:
    return parse_grid(shlex.split(text))


def same(folder: Path, other: Path) -> None:
    for name in FINAL:
        assert (folder / name).read_bytes() == (other / name).read_bytes(), name
