"""A bar, what came out, and whether it holds: what every comparison comes down to."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Outcome = Literal["holds", "fails", "no bar"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One bar."""

    what: str
    """What is compared."""
    measured: str
    """As published or logged; empty where the bar is about an error."""
    simulated: str
    """What comes out here."""
    bar: str
    """What it must meet; empty: it is reported and not judged."""
    outcome: Outcome
    why: str = ""
    """Why there is no bar, or what is known of a miss."""

    def document(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return asdict(self)


def within(what: str, measured: float, simulated: float, *, share: float, digits: int = 1, unit: str = "") -> Check:
    """Return the check that `simulated` is within `share` of `measured`."""
    error = simulated / measured - 1
    return Check(
        what=what,
        measured=f"{measured:,.{digits}f}{unit}",
        simulated=f"{simulated:,.{digits}f}{unit} ({error:+.1%})",
        bar=f"within {share:.0%}",
        outcome="holds" if abs(error) <= share else "fails",
    )


def at_most(what: str, value: float, limit: float, *, percent: bool = True, why: str = "") -> Check:
    """Return the check that an error is at most `limit`."""

    def text(number: float) -> str:
        return f"{number:.1%}" if percent else f"{number:.1f}"

    return Check(
        what=what,
        measured="",
        simulated=text(value),
        bar=f"at most {text(limit)}",
        outcome="holds" if value <= limit else "fails",
        why=why,
    )


def reported(what: str, measured: str, simulated: str, why: str) -> Check:
    """Return what is shown and not judged, and why it is not."""
    return Check(what=what, measured=measured, simulated=simulated, bar="", outcome="no bar", why=why)


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One comparison."""

    name: str
    """What it is called in the document, such as published_rows."""
    title: str
    """Its heading."""
    source: str
    """What is compared with, and where its data is."""
    checks: tuple[Check, ...] = ()
    skipped: str = ""
    """Why it was not run; empty: it was."""
    notes: tuple[str, ...] = ()
    """What a reader should know."""
    tables: tuple["Table", ...] = ()
    """What the checks are made of."""
    pictures: dict[str, str] = field(default_factory=dict)
    """SVG files by name."""
    details: dict[str, Any] = field(default_factory=dict)
    """The same for the JSON document."""

    @property
    def holds(self) -> bool:
        """Whether no bar fails."""
        return all(check.outcome != "fails" for check in self.checks)

    def document(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return {
            "name": self.name,
            "title": self.title,
            "source": self.source,
            "skipped": self.skipped or None,
            "holds": self.holds if not self.skipped else None,
            "checks": [check.document() for check in self.checks],
            "notes": list(self.notes),
            **self.details,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows to show."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    detail: bool = False
    """Whether only a full listing shows it."""
