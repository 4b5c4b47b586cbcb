"""What fuzzing found, in the terminal."""

from collections.abc import Sequence

from rich.console import Console

from pagedkv.sims.console_table import plain_table
from pagedkv.sims.fuzz_command import FuzzResult


def show_fuzz(results: Sequence[FuzzResult], console: Console) -> None:
    """Print a line per allocator, and every failure with what replays it."""
    table = plain_table("allocator", "pools", "operations", "per second", "failures")
    for name in dict.fromkeys(result.allocator for result in results):
        runs = [result for result in results if result.allocator == name]
        operations, seconds = sum(run.ops for run in runs), sum(run.elapsed_s for run in runs)
        rate = operations / seconds if seconds else 0.0
        table.add_row(name, str(len(runs)), f"{operations:,}", f"{rate:,.0f}", str(sum(bool(run.failure) for run in runs)))
    console.print(table)
    for result in results:
        if result.failure:
            console.print(f"\n{result.failure}", markup=False)
