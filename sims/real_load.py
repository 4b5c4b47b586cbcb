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
        """Compute a step; return (request, token, reason why it is the last one or None) of each token that came out."""

    def abort(self, request: int) -> bool:
        """Take a request out."""


@dataclass(slots=True)
class Answer:
    """What came back for a prompt."""

    prompt: int
    """Its number in the file, from 0 on."""
    tokens: list[int] = field(default_factory=list)
    """New token ids."""
    finish_reason: str | None = None
    """"stop", "length", "rejected", or None: it was interrupted."""


def serve_prompts(
    engine: TextEngine,
    submit: Callable[[int], int | None],
    lengths: Sequence[tuple[int, int]],
    *,
    users: int,
    now: Callable[[], float],
    told: Callable[[Answer], None],
    stopped: Callable[[], bool],
) -> tuple[Run, list[Answer]]:
    """Serve all prompts, or until `stopped`; return what was measured, and the answers in order.

    Args:
        engine: Serves; nobody else uses it.
        submit: Gives the engine the prompt of that number; None if it is refused.
        lengths: By prompt: its tokens and the most new ones.
        users: How many ask at a time.
        now: The clock, seconds from any moment on.
        told: Is told an answer with each of its tokens.
        stopped: Whether to end before all is answered: who runs is aborted.
    """
    clock = RealClock(engine.scheduler, now)
    engine.observer = clock
    answers = [Answer(prompt=number) for number in range(len(lengths))]
    numbers, active = iter(range(len(lengths))), dict[int, Answer]()

    def ask() -> None:
        for number in numbers:
            request = submit(number)
            if request is not None:
                clock.arrival(request)
                active[request] = answers[number]
                return
            clock.rejection(*lengths[number])
            answers[number].finish_reason = "rejected"

    for _ in range(users):
        ask()
    while active and not stopped():
        for request, token, reason in engine.step():
            answer = active[request]
            answer.tokens.append(token)
            answer.finish_reason = reason
            told(answer)
            if reason is not None:
                del active[request]
                ask()
    run = clock.close()
    engine.observer = None
    for request in active:
        engine.abort(request)
    return run, answers


def warm_up(engine: TextEngine, submit: Callable[[], int | None], now: Callable[[], float]) -> None:
    """Let all that is compiled at its first use be compiled, by a request that is not measured."""
    clock = RealClock(engine.scheduler, now)
    engine.observer = clock
    request = submit()
    if request is not None:
        clock.arrival(request)
        while not any(reason is not None for _, _, reason in engine.step()):
            pass
    engine.observer = None
