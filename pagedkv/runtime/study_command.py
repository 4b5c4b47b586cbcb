"""The command line of a study: `python -m pagedkv.runtime.memory_study` and others."""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numba
import torch

from pagedkv.errors import ConfigError


def study_parser(module: str, description: str | None, *, budget: str) -> argparse.ArgumentParser:
    """Return a parser of the flags that every study has, for `python -m pagedkv.runtime.<module>`; `budget` its flag's help."""
    parser = argparse.ArgumentParser(prog=f"python -m pagedkv.runtime.{module}", description=description)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--budget", default="6MiB", help=budget)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    return parser


def run_study(parser: argparse.ArgumentParser, arguments: Sequence[str] | None, study: Callable[[argparse.Namespace], Any]) -> int:
    """Run `study`, on one thread: models this small only wait for a second one. Print what came out, and return the exit status.

    Args:
        parser: By `study_parser`, with the study's own flags.
        arguments: None: those of the process.
        study: Returns a dataclass with a method `table`, or a list of them.
    """
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    numba.set_num_threads(1)
    try:
        studied = study(given)
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    tables = studied if isinstance(studied, list) else [studied]
    documents = [asdict(each) for each in tables]
    text = "\n\n".join(each.table() for each in tables)
    if given.json:
        text = json.dumps(documents if isinstance(studied, list) else documents[0])
    sys.stdout.write(f"{text}\n")
    return 0
