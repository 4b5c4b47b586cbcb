"""The memory timeline as a picture: a bar for each phase at its worst moment, in Okabe and Ito's colours."""

import plotly.graph_objects as go

from pagedkv.memory_timeline import MemoryTimeline
from pagedkv.sims.budget_timeline import STACK, headline
from pagedkv.sims.palette import BLUE, GREEN, NEUTRAL, PANEL, SKY, VERMILION, WHITE, base_layout
from pagedkv.units import GIB

_COLOURS = {
    "OS, programs": NEUTRAL,
    "engine, weights": SKY,
    "KV cache": BLUE,
    "comes and goes": VERMILION,
    "page cache": GREEN,
}
_HATCHES = {"OS, programs": "", "engine, weights": "", "KV cache": "", "comes and goes": "/", "page cache": "."}
_FLOOR_COLOUR = VERMILION


def memory_over_time(timeline: MemoryTimeline) -> go.Figure:
    """Return the phases as horizontal bars, first on top; what is left of a bar is free, and a line marks the machine's floor."""
    hardware = timeline.request.hardware
    titles = [phase.title for phase in timeline.phases]
    figure = go.Figure()
    for name, parts in STACK.items():
        sizes = [sum(phase.worst.parts[part] for part in parts) / GIB for phase in timeline.phases]
        if any(sizes):
            figure.add_bar(
                y=titles,
                x=sizes,
                name=name,
                orientation="h",
                marker={
                    "color": _COLOURS[name],
                    "line": {"color": WHITE, "width": 1},
                    "pattern": {"shape": _HATCHES[name], "fgcolor": WHITE, "size": 5, "solidity": 0.25},
                },
                hovertemplate="%{y}: %{x:,.2f} GiB<extra>%{fullData.name}</extra>",
            )
    most = max(hardware.visible_bytes, *(hardware.visible_bytes - min(phase.worst.mem_free, 0) for phase in timeline.phases))
    for phase in timeline.phases:
        available = f"{phase.worst.mem_available / GIB:,.1f} GiB left" + ("" if phase.verdict.kind == "ok" else " ⚠")
        figure.add_annotation(
            x=1, xref="paper", y=phase.title, text=available, xanchor="right", showarrow=False, bgcolor=PANEL, opacity=0.9
        )
    if most > hardware.visible_bytes:
        figure.add_vline(x=hardware.visible_bytes / GIB, line={"color": _FLOOR_COLOUR, "width": 2})
    if hardware.memory_floor.value:
        floor = (hardware.visible_bytes - hardware.memory_floor.value) / GIB
        figure.add_vline(x=floor, line={"color": _FLOOR_COLOUR, "dash": "dash", "width": 2})
    figure.update_layout(**base_layout(130 + 38 * len(titles)), barmode="stack")
    figure.update_layout(margin={"t": 60}, legend={"traceorder": "normal"}, hovermode="closest")
    figure.update_yaxes(autorange="reversed", automargin=True)
    figure.update_xaxes(title="GiB", range=[0, most / GIB])
    return figure


def caption(timeline: MemoryTimeline) -> str:
    """Return what the picture shows, and the verdict."""
    what = "Left is MemAvailable" if timeline.request.hardware.unified else "Left is what is free"
    floor = timeline.request.hardware.memory_floor.value
    line = (
        f" The dashed line marks the machine's floor of {floor / GIB:g} GiB: only page cache may reach beyond it." if floor else ""
    )
    return f"Each phase at its worst moment. {what}. {headline(timeline)}{line}"
