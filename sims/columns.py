"""The columns of an answer for files that hold several: whose run it is, under which name."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from pagedkv.sims.results import Results
from pagedkv.sims.scenario import Scenario
from pagedkv.sims.simulation import Run


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One run of one allocator under one engine."""

    scenario: Scenario
    engine: str
    """The preset's name."""
    allocator: str
    repeat: int
    """From 0 on."""
    run: Run

    @property
    def title(self) -> str:
        """What a reader calls it."""
        name = f"{self.engine} {self.allocator}"
        return f"{name}, repeat {self.repeat}" if self.repeat else name


def columns(answers: Iterable[Results]) -> Iterator[Column]:
    """Yield every run of `answers`, one answer per engine, in the order in which tables show them."""
    for results in answers:
        for allocator, result in results.by_allocator.items():
            for repeat, run in enumerate(result.runs):
                yield Column(
                    scenario=results.scenario,
                    engine=results.scenario.config.serving.engine,
                    allocator=allocator,
                    repeat=repeat,
                    run=run,
                )
