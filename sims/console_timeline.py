"""The memory timeline in the terminal: a bar for each phase at its worst moment, what goes wrong, and what avoids it."""

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from pagedkv.memory_timeline import MemoryPhase, MemoryTimeline, Moment
from pagedkv.sims.budget_timeline import STACK, BudgetTimeline, headline, troubles
from pagedkv.sims.console_table import plain_table
from pagedkv.units import GIB

_BAR_WIDTH = 24
_NARROW = 72
"""Columns of a terminal below which the bars stand below the names of their phases."""
_LOOKS = {
    "OS, programs": ("▓", "dim"),
    "engine, weights": ("█", "blue"),
    "KV cache": ("■", "cyan"),
    "comes and goes": ("▒", "yellow"),
    "page cache": ("░", "green"),
}
_FREE = "·"
_STYLES = {"ok": "green", "crowded": "yellow", "starved": "yellow", "dangerous": "red", "out_of_memory": "red", "refused": "red"}


def show_timeline(answer: BudgetTimeline, console: Console) -> None:
    """Print the timeline."""
    timeline = answer.timeline
    request = timeline.request
    console.print(Text(f"Memory over time: {request.model.title} on {request.hardware.title}", "bold"))
    console.print(_narrow_table(timeline) if console.width < _NARROW else _table(timeline))
    what = "MemAvailable" if request.hardware.unified else "what is free"
    console.print(Text(f"Bars: each phase's worst moment. Least, and at its end: {what}, GiB", "dim"))
    legend = Text()
    for name, (mark, style) in _LOOKS.items():
        if any(_size(phase.worst, name) for phase in timeline.phases):
            legend.append(mark, style).append(f" {name} ")
    console.print(legend.append(_FREE).append(" free"))
    console.print()
    console.print(Text(headline(timeline), _STYLES[timeline.worst.verdict.kind]))
    for phase in troubles(timeline):
        console.print(Padding(Text.assemble((f"{phase.title}: ", "bold"), phase.verdict.text), (0, 0, 0, 2)))
    if answer.advice is not None:
        console.print("This avoids it:" if answer.advice.solved else "This helps, but not enough:", style="bold")
        for setting in answer.advice.settings:
            console.print(f"  {setting}", soft_wrap=True, markup=False)  # whole, to be copied
        for phase in () if answer.advice.solved else troubles(answer.advice.timeline):
            console.print(Padding(Text(f"left: {phase.title}: {phase.verdict.text}"), (0, 0, 0, 2)))
    elif timeline.worst.verdict.kind != "ok":
        console.print("No setting that is known here avoids it: a smaller model, narrower weights or fewer programs would.")
    after = () if answer.advice is None else answer.advice.timeline.notes
    for note in dict.fromkeys((*timeline.notes, *after)):
        console.print(Text(note, "dim"))


def _table(timeline: MemoryTimeline) -> Table:
    bar = f"of {timeline.request.hardware.visible_bytes / GIB:.2f} GiB"
    table = plain_table("", "takes", bar, "least", "at its end", left=(0, 2))
    table.columns[0].no_wrap, table.columns[2].min_width = False, _BAR_WIDTH
    for phase in timeline.phases:
        bar_of_phase = _bar(phase.worst, timeline.request.hardware.visible_bytes)
        table.add_row(Text(phase.title), _takes(phase), bar_of_phase, *_available(phase))
    return table


def _narrow_table(timeline: MemoryTimeline) -> Table:
    table = plain_table(f"of {timeline.request.hardware.visible_bytes / GIB:.2f} GiB", "least", "at end")
    table.columns[0].no_wrap = False
    for phase in timeline.phases:
        title = ", ".join(filter(None, (phase.title, _takes(phase))))
        bar = _bar(phase.worst, timeline.request.hardware.visible_bytes)
        table.add_row(Text.assemble(title, "\n", bar), *_available(phase))
    return table


def _takes(phase: MemoryPhase) -> str:
    return "" if phase.seconds is None else f"≥ {phase.seconds:,.0f} s"


def _available(phase: MemoryPhase) -> tuple[Text, str]:
    """Return what is available at the phase's worst moment and at its end."""
    style = "" if phase.verdict.kind == "ok" else _STYLES[phase.verdict.kind]
    return Text(f"{phase.worst.mem_available / GIB:,.2f}", style), f"{phase.end.mem_available / GIB:,.2f}"


def _bar(moment: Moment, visible: int) -> Text:
    """Return who has the memory at a moment, in marks that differ without colours too."""
    bar, before = Text(), 0
    for name, (mark, style) in _LOOKS.items():
        start, before = round(_BAR_WIDTH * before / visible), before + _size(moment, name)
        end = min(round(_BAR_WIDTH * before / visible), _BAR_WIDTH)
        bar.append(mark * (end - start), style)
    return bar.append(_FREE * (_BAR_WIDTH - len(bar)))


def _size(moment: Moment, name: str) -> int:
    return sum(moment.parts[part] for part in STACK[name])
