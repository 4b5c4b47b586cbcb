"""What max-users and max-context found: the head and the first section of the report that they write."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from pagedkv.sims.attainment import share_words
from pagedkv.sims.capacity_answer import CapacityAnswer, calibrated, shown_value
from pagedkv.sims.limits import LIMIT_NAMES
from pagedkv.sims.reporting.capacity_curve import CURVE_CAPTION, Curve, CurvePoint, amount, capacity_curve, curve_words
from pagedkv.sims.reporting.page import Drawing, command, picture, rows, table


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """A search, done, of which a report shows the run at what was found."""

    unit: str
    """What is counted: users, or tokens of context."""
    answers: Sequence[CapacityAnswer]
    """One per allocator, one or more. The run is at what the first one found."""
    attain: float
    """Share of the requests that must meet the goals."""
    command: str
    """What asks for it."""
    further: str | None = None
    """What asks for more than it found; None: nothing is known to help."""


def capacity_head(capacity: Capacity) -> str:
    """Return the answer, the command that gives it, and which run the rest of the page is about."""
    first = capacity.answers[0]
    items = "".join(
        f"<li><strong>{escape(each.allocator)}</strong>: {escape(_said(each, capacity.unit, attain=capacity.attain))}</li>"
        for each in capacity.answers
    )
    run_value = shown_value(first)
    shown = (
        f"the {amount(run_value, capacity.unit)} that fit{'s' if run_value == 1 else ''}"
        if first.value
        else f"{amount(run_value, capacity.unit)}, the smallest that was tried"
    )
    return (
        f'<section id="capacity-answer" aria-labelledby="answer-title">\n<h1 id="answer-title">{escape(_headline(capacity))}</h1>\n'
        f'<p class="soft">To fit means: {escape(first.criterion)}.</p>\n<ul>{items}</ul>\n'
        f"<p>This search:</p>{command('this-search', capacity.command)}\n"
        f"<p>The rest of this page is the run with {escape(shown)}.</p>\n</section>\n"
    )


def _headline(capacity: Capacity) -> str:
    value, unit = capacity.answers[0].value, capacity.unit
    if not value:
        return f"Not even the smallest number of {unit} fits"
    return f"{amount(value, unit)} fit{'s' if value == 1 else ''}"


def _said(found: CapacityAnswer, unit: str, *, attain: float) -> str:
    low, high = found.interval
    until = "more than was tried" if high is None else f"{high:,}"
    parts = [f"{amount(found.value, unit)}, interval {low:,} to {until} ({found.interval_means})"]
    parts.append(f"{calibrated(found)} if all steps take as long, or as short, as their constants may be off")
    if found.attained is not None:
        parts.append(f"{share_words(found.attained, attain)} of the requests meet the goals there")
    limit = "" if found.binding is None else f", limit: {LIMIT_NAMES[found.binding]}"
    smallest = min((each.value for each in found.tried if not each.fits and each.value > found.value), default=None)
    parts.append(f"next limit: {limit[9:]}" if smallest is None else f"at {smallest:,}: {found.stops.rstrip('.')}{limit}")
    if found.preemption_from is None:
        parts.append(f"no preemptions up to {found.preemption_tried:,}")
    else:
        parts.append(f"preemptions set in at {found.preemption_from:,}")
    if found.anomalies:
        parts.append(f"{', '.join(f'{value:,}' for value in found.anomalies)} fit again: near its limit the figure is noisy")
    return "; ".join(parts) + "."


def capacity_body(capacity: Capacity) -> tuple[Drawing, str]:
    """Return the curve, and it with every run of the search."""
    curves = [
        Curve(
            name=found.allocator,
            points=tuple(
                CurvePoint(
                    value=tried.value,
                    attained=tried.attained,
                    output_tokens_per_s=tried.output_tokens_per_s,
                    num_preemptions=tried.num_preemptions,
                    fits=tried.fits,
                )
                for tried in found.tried
                if tried.num_preemptions is not None
            ),
            chosen=found.value or None,
        )
        for found in capacity.answers
    ]
    drawing = Drawing(
        name="capacity",
        figure=capacity_curve(curves, unit=capacity.unit, attain=capacity.attain),
        words=curve_words(curves, unit=capacity.unit),
    )
    body = [
        (
            f"{tried.value:,}",
            found.allocator,
            "yes" if tried.fits else "no",
            tried.status,
            share_words(tried.attained, capacity.attain),
            "–" if tried.num_preemptions is None else f"{tried.num_preemptions:,}",
            "–" if tried.output_tokens_per_s is None else f"{tried.output_tokens_per_s:,.0f}",
        )
        for found in capacity.answers
        for tried in found.tried
    ]
    head = (capacity.unit, "allocator", "fits", "status", "within goals", "preemptions", "output tokens/s")
    shown = picture(drawing, f"{CURVE_CAPTION} The dotted line is the wanted share.")
    return drawing, shown + table(head, rows(body), label="Runs of the search")
