"""The one task that schedules: takes in what clients ask, lets the engine step, hands out tokens, takes out whoever has left."""

import asyncio
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

from pagedkv.sims.serve.errors import SERVER_ERROR, UNAVAILABLE, ApiError
from pagedkv.sims.serve.live_metrics import LiveMetrics
from pagedkv.sims.serve.served_engine import ABORT, ERROR, Ask, Output, ServedEngine, StepReport

FORGET_AT = 4096
"""Requests that the engine's table holds, done ones included, before these are forgotten: under a megabyte. Chosen."""


class Piece(NamedTuple):
    """What an answer's reader gets at a time."""

    which: int
    """The answer's index among those that were asked together."""
    tokens: list[int]
    finish_reason: str | None
    """Set in the last one."""


@dataclass(slots=True, eq=False)
class Answer:
    """An answer on its way."""

    ask: Ask
    place: int
    """Which of the ask's answers."""
    index: int
    """Which of all that were asked together."""
    pieces: "asyncio.Queue[Piece]"
    """Shared by all that were asked together."""
    arrived_s: float
    request: int | None = None
    """The number at the engine of the request that it belongs to, once that is there."""
    scheduled_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None
    num_tokens: int = 0
    num_cached_tokens: int = 0
    """Tokens of the prompt that the prefix cache had."""
    over: bool = False
    """Nothing more comes."""


class ServeLoop:
    """Serves requests by an engine. All methods are for the thread of its event loop, and none of them waits for a step."""

    def __init__(self, engine: ServedEngine, *, max_queue: int) -> None:
        """Let no more than `max_queue` requests wait to be started."""
        self.engine = engine
        self.metrics = LiveMetrics(engine.scheduler)
        self._max_queue = max_queue
        self._pending: deque[list[Answer]] = deque()
        """By request: its answers. Not known to the engine yet."""
        self._active: dict[int, list[Answer]] = {}
        """By the request's number: its answers, of which not all are over."""
        self._num_unfinished = 0
        self._left: list[Answer] = []
        """Known to the engine, and to be taken out."""
        self._wake, self._empty = asyncio.Event(), asyncio.Event()
        self._empty.set()
        self._stopping = False
        self.failure: BaseException | None = None
        """What ended the engine, if something did."""

    @property
    def num_waiting(self) -> int:
        """Answers that have not been started, as the last step left them."""
        to_fork = sum(len(answers) - 1 for answers in self._active.values() if answers[0].scheduled_s is None)
        return sum(map(len, self._pending)) + to_fork + self.engine.scheduler.num_waiting

    @property
    def num_unfinished(self) -> int:
        """Answers on their way."""
        return self._num_unfinished

    @property
    def is_idle(self) -> bool:
        """Whether nobody is served and no step is in flight: only then is what the engine holds for others to read."""
        return self._empty.is_set()

    def submit(self, asks: Sequence[Ask]) -> list[Answer]:
        """Take in what is asked together: all of it, or nothing. Return the answers, those to the first ask first.

        Where the engine cannot fork, each answer is a request of its own.

        Raises:
            ApiError: If one can never be answered, too many wait, or the server is about to end.
        """
        self.check_up()
        for ask in asks:
            self.engine.check(ask)
        waiting, number = self.num_waiting, sum(ask.n for ask in asks)
        if waiting + number > self._max_queue:
            raise ApiError(UNAVAILABLE, f"{waiting} requests wait already: try again later (--max-queue)")
        pieces: asyncio.Queue[Piece] = asyncio.Queue()
        now_s = self.engine.now()
        answers: list[Answer] = []
        for each in asks if self.engine.can_fork else [alone for ask in asks for alone in ask.apart()]:
            first = len(answers)
            answers += [Answer(each, place, first + place, pieces, now_s) for place in range(each.n)]
            self._pending.append(answers[first:])
        self._num_unfinished += number
        self._empty.clear()
        self._wake.set()
        return answers

    def check_up(self) -> None:
        """Raise ApiError if nothing is answered any more."""
        if self.failure is not None:
            raise ApiError(SERVER_ERROR, f"the engine has failed: {self.failure!r}")
        if self._stopping:
            raise ApiError(UNAVAILABLE, "the server is shutting down")

    def leave(self, answers: Sequence[Answer], reason: str = ABORT) -> None:
        """Take answers out, for `reason`, before they are done: now, or at the end of the step in flight."""
        for answer in answers:
            if not answer.over:
                self._finish(answer, reason)
                if answer.request is not None:
                    self._left.append(answer)
        if any(answer.request is None for answer in answers):
            self._pending = deque(request for request in self._pending if not all(answer.over for answer in request))
        self._wake.set()

    async def run(self) -> None:
        """Serve until `close`. What the engine raises ends every answer, and is raised."""
        try:
            while True:
                self._settle()
                if self._active:
                    self._hand_out(await self.engine.step())
                    continue
                self._empty.set()
                if self._stopping:
                    return
                self._wake.clear()
                await self._wake.wait()
        except BaseException as error:
            self.failure = error
            for answer in self._unfinished():
                self._finish(answer, ERROR)
            self._pending.clear()
            self._active.clear()
            self._empty.set()
            raise
        finally:
            self.engine.close()

    async def close(self, grace_s: float) -> None:
        """Take nothing in any more, let answers come to their end for `grace_s`, end the others, and return when all is free."""
        self._stopping = True
        self._wake.set()
        with suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await self._empty.wait()
        self.leave(self._unfinished())
        await self._empty.wait()

    def _unfinished(self) -> list[Answer]:
        requests = (*self._pending, *self._active.values())
        return [answer for request in requests for answer in request if not answer.over]

    def _settle(self) -> None:
        """Between two steps: take out who has left, then take in who has come."""
        for answer in self._left:
            assert answer.request is not None
            self.engine.abort(answer.request, answer.place)
        self._left.clear()
        if self.engine.scheduler.requests.size > FORGET_AT + 2 * self._num_unfinished:
            new = self.engine.forget_done()
            self._active = {new[old]: answers for old, answers in self._active.items()}
            for number, answers in self._active.items():
                for answer in answers:
                    answer.request = number
        while self._pending:
            answers = self._pending[0]  # they stay there until the engine has them: if it fails, they are told as all others
            number = self.engine.add(answers[0].ask, answers[0].arrived_s)
            self._pending.popleft()
            self._active[number] = answers
            for answer in answers:
                answer.request = number
                if answer.over:
                    self.engine.abort(number, answer.place)

    def _hand_out(self, report: StepReport) -> None:
        for each in report.admitted:
            if (answers := self._active.get(each.request)) is not None and answers[0].scheduled_s is None:
                for answer in answers:
                    answer.scheduled_s, answer.num_cached_tokens = report.began_s, each.num_hit_tokens
                self.metrics.admitted(each)
        self.metrics.stepped(report)
        for output in report.outputs:
            self._give(output, report.ended_s)

    def _give(self, output: Output, now_s: float) -> None:
        answers = self._active.get(output.request)
        if answers is None or answers[output.place].over:  # it has left while the step was computed
            if output.finish_reason is not None:
                self._left = [each for each in self._left if (each.request, each.place) != (output.request, output.place)]
            return
        answer = answers[output.place]
        if output.tokens:
            self.metrics.tokens(answer, len(output.tokens), now_s)
            answer.num_tokens += len(output.tokens)
            answer.first_token_s = now_s if answer.first_token_s is None else answer.first_token_s
            answer.last_token_s = now_s
        if output.finish_reason is None:
            answer.pieces.put_nowait(Piece(answer.index, output.tokens, None))
        else:
            self._finish(answer, output.finish_reason, output.tokens)

    def _finish(self, answer: Answer, reason: str, tokens: Sequence[int] = ()) -> None:
        answer.over = True
        self._num_unfinished -= 1
        if answer.request is not None and all(other.over for other in self._active[answer.request]):
            del self._active[answer.request]
        answer.pieces.put_nowait(Piece(answer.index, list(tokens), reason))
        self.metrics.finished(answer, reason)
