"""The study of prefix caches in the terminal."""

from pathlib import Path

from rich.console import Console
from rich.text import Text

from pagedkv.sims.console_table import plain_table
from pagedkv.sims.prefix_study import ENOUGH, UNLIMITED, PrefixStudy


def show_prefix_study(study: PrefixStudy, console: Console) -> None:
    """Print what each cache found and how large it must be."""
    console.print(Text(f"Prefix caching on {Path(study.trace).name}", "bold"))
    console.print(
        f"{study.requests:,} requests, {study.prompt_tokens:,} prompt tokens in {study.prompt_blocks:,} blocks of "
        f"{study.block_tokens:,}, {study.distinct_blocks:,} of them distinct\n",
        markup=False,
    )
    table = plain_table("cache", "eviction", "blocks", "blocks found", "tokens found", left=(0, 1))
    for row in study.rows:
        blocks = UNLIMITED if row.blocks is None else f"{row.blocks:,}"
        table.add_row(row.cache, row.eviction, blocks, f"{row.hit_ratio_blocks:.2%}", f"{row.hit_ratio_tokens:.2%}")
    console.print(table)
    console.print()
    table = plain_table("cache", "eviction", "best", f"blocks for {ENOUGH:.0%} of it", "tokens of KV", left=(0, 1))
    for line in study.capacities:
        needed = line.capacity_for_90_percent
        best = f"{line.best_hit_ratio_blocks:.2%}"
        table.add_row(line.cache, line.eviction, best, f"{needed:,}", f"{needed * study.block_tokens:,}")
    console.print(table)
