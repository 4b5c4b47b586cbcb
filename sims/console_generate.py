"""What a running engine did, in the terminal: the rows of a simulation."""

from typing import Any

from rich.console import Console

from pagedkv.sims.comparison import comparison
from pagedkv.sims.console_table import plain_table
from pagedkv.units import gib


def show_real(document: dict[str, Any], console: Console) -> None:
    """Print the figures of a run."""
    config, budget, result = document["config"], document["budget"], document["results"][0]
    users = f"{config['users']:,} user{'s' if config['users'] > 1 else ''}"
    console.print(f"{users} on {result['hardware']}, {result['model']}, really run", style="bold")
    drafted, number = "", config["num_speculative_tokens"]
    if number:
        drafted = f" · {number} draft{'s' if number > 1 else ''} a step by {config['speculative_model']}"
    console.print(
        f"{budget['num_blocks']:,} blocks of {budget['block_size']} tokens ({gib(budget['kv_cache'])}) · weights "
        f"{gib(budget['weights'])} · max-model-len {config['max_model_len']:,} · max-num-seqs {config['max_num_seqs']} · "
        f"max-num-batched-tokens {config['max_num_batched_tokens']:,} · "
        f"prefix caching {'on' if config['enable_prefix_caching'] else 'off'}{drafted}",
        style="dim",
    )
    console.print()
    table = plain_table("", result["allocator"])
    for row in comparison(document):
        table.add_row("  " * row.depth + row.label, *(row.values or ("",)))
    console.print(table)
