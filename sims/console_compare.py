"""Two runs side by side in the terminal."""

from typing import Any

from rich.console import Console
from rich.text import Text

from pagedkv.sims.console_table import plain_table
from pagedkv.sims.run_comparison import RunComparison


def show_run_comparison(compared: RunComparison, console: Console) -> None:
    """Print settings that differ, then the figures that do; a star marks a difference that is more than noise."""
    console.print(Text.assemble(("A  ", "bold"), compared.first, "\n", ("B  ", "bold"), compared.second, "\n"), soft_wrap=True)
    if compared.settings:
        table = plain_table("setting", "A", "B", no_wrap=False)
        for setting in compared.settings:
            table.add_row(setting.name.replace("_", "-"), _text(setting.first), _text(setting.second))
        console.print(table, "\n")
    else:
        console.print("The configurations are equal.\n")
    starred = False
    for allocator, differences in compared.figures.items():
        console.print(Text(allocator, "bold"))
        differing = [each for each in differences if each.first != each.second]
        if not differing:
            console.print("  every figure is equal\n")
            continue
        table = plain_table("figure", "A", "B", "B − A", "", "", no_wrap=False)
        for each in differing:
            starred |= each.significant is not None
            relative = "" if each.relative is None else f"{each.relative:+.1%}"
            mark = "" if each.significant is None else "*" if each.significant else "noise"
            table.add_row(each.figure, _text(each.first), _text(each.second), _text(each.difference), relative, mark)
        console.print(table, "\n")
    for run, names in (("A", compared.only_first), ("B", compared.only_second)):
        if names:
            console.print(f"Only in {run}: {', '.join(names)}", markup=False)
    if starred:
        console.print("* beyond the 95 % interval of the difference; noise: within it.")
    else:
        console.print("Whether a difference is more than noise needs --repeats 2 or more in both runs.")


def _text(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, list):
        return " ".join(map(str, value)) or "–"
    return f"{value:,.5g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)
