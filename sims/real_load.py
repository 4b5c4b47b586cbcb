"""Users in a closed loop before a running engine: each asks the next prompt when it has its answer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from pagedkv.scheduling.scheduler import Scheduler
from pagedkv.sims.real_clock import RealClock
from pagedkv.sims.simulation import Run


class TextEngine(Protocol):
    """What serves: `pagedkv.runtime.LLMEngine`."""

    scheduler: Scheduler
    observer: Any

    def step(self) -> Sequence[Any]:
        """Compute a step; return the tokens that came out, as `pagedkv.runtime.texts.NewToken`."""

    def abort(self, request: int) -> bool:
        """Take a request out."""


@dataclass(slots=True)
class Answer:
    """What came back for a prompt."""

    prompt: int
    """Its number in the file, from 0 on."""
    index: int = 0
    """Which of the prompt's texts it is."""
    tokens: list[int] = field(default_factory=list)
    """New token ids."""
    finish_reason: str | None = None
    """"stop", "length", "rejected", or None: it was interrupted."""
    score: float | None = None
    """By which a beam was chosen."""


def serve_prompts(
    engine: TextEngine,
    submit: Callable[[int], int | None],
    lengths: Sequence[tuple[int, int]],
    *,
    users: int,
    num_texts: int = 1,
    now: Callable[[], float],
    told: Callable[[Answer], None],
    stopped: Callable[[], bool],
) -> tuple[Run, list[Answer]]:
    """Serve all prompts, or until `stopped`; return what was measured, and the answers in order.

    Args:
        engine: Serves; nobody else uses it.
        submit: Gives the engine the prompt of that number; None if it is refused.
        lengths: By prompt: its tokens and the most new ones.
        users: How many ask at a time; who has all texts of a prompt asks the next one.
        num_texts: Texts of each prompt.
        now: The clock, seconds from any moment on.
        told: Is told an answer with each of its tokens.
        stopped: Whether to end before all is answered: who runs is aborted.
    """
    clock = RealClock(engine.scheduler, now)
    engine.observer = clock
    answers = [[Answer(prompt=number, index=index) for index in range(num_texts)] for number in range(len(lengths))]
    numbers, active = iter(range(len(lengths))), dict[int, list[Answer]]()

    def ask() -> None:
        for number in numbers:
            request = submit(number)
            if request is not None:
                clock.arrival(request)
                active[request] = answers[number]
                return
            clock.rejection(*lengths[number])
            for answer in answers[number]:
                answer.finish_reason = "rejected"

    for _ in range(min(users, len(lengths))):
        ask()
    while active and not stopped():
        for new in engine.step():
            answer = active[new.request][new.text]
            answer.tokens.append(new.token)
            answer.finish_reason, answer.score = new.finish_reason, new.score
            told(answer)
            if all(each.finish_reason is not None for each in active[new.request]):
                del active[new.request]
                ask()
    run = clock.close()
    engine.observer = None
    for request in active:
        engine.abort(request)
    return run, [answer for each in answers for answer in each]


def warm_up(engine: TextEngine, submit: Callable[[], int | None], now: Callable[[], float]) -> None:
    """Let all that is compiled at its first use be compiled, by a request that is not measured."""
    clock = RealClock(engine.scheduler, now)
    engine.observer = clock
    request = submit()
    if request is not None:
        clock.arrival(request)
        while not any(new.finish_reason is not None for new in engine.step()):
            pass
    engine.observer = None
