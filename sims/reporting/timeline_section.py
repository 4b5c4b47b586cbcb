"""How a unified machine's memory fills from before the start on: a section of report.html."""

from html import escape

from pagedkv.sims.budget_timeline import BudgetTimeline, budget_timeline, troubles
from pagedkv.sims.deployment import memory_request
from pagedkv.sims.reporting.page import Drawing, picture
from pagedkv.sims.scenario import Scenario
from pagedkv.sims.timeline_figure import caption, memory_over_time
from pagedkv.units import GIB


def timeline_body(scenario: Scenario) -> tuple[Drawing, str] | None:
    """Return the picture, and it with what goes wrong and what avoids it; None where the host has a memory of its own."""
    if not scenario.deployment.hardware.unified or scenario.model_serving is not None:
        return None
    answer = budget_timeline(memory_request(scenario.config.serving))
    drawing = Drawing(name="timeline", figure=memory_over_time(answer.timeline), words=_words(answer))
    items = "".join(f"<li><strong>{escape(p.title)}</strong>: {escape(p.verdict.text)}</li>" for p in troubles(answer.timeline))
    avoid = "" if answer.advice is None else f"<p>What avoids it: <code>{escape(' · '.join(answer.advice.settings))}</code></p>"
    notes = "".join(f"<p>{escape(note)}</p>" for note in answer.timeline.notes)
    shown = picture(drawing, escape(caption(answer.timeline)))
    return drawing, f"{shown}{f'<ul>{items}</ul>' if items else ''}{avoid}{notes}"


def _words(answer: BudgetTimeline) -> str:
    left = ", ".join(f"{phase.title} {phase.worst.mem_available / GIB:,.1f} GiB" for phase in answer.timeline.phases)
    return f"Memory that is left at the worst moment of each phase: {left}."
