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
    index: int
    pieces: "asyncio.Queue[Piece]"
    """Shared by all that were asked together."""
    arrived_s: float
    request: int | None = None
    """Its number at the engine, once it is there."""
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
        self._pending: deque[Answer] = deque()
        """Not known to the engine yet."""
        self._active: dict[int, Answer] = {}
        self._left: list[Answer] = []
        """Known to the engine, and to be taken out."""
        self._wake, self._empty = asyncio.Event(), asyncio.Event()
        self._empty.set()
        self._stopping = False
        self.failure: BaseException | None = None
        """What ended the engine, if something did."""

    @property
    def num_waiting(self) -> int:
        """Requests that have not been started, as the last step left them."""
        return len(self._pending) + self.engine.scheduler.num_waiting

    @property
    def num_unfinished(self) -> int:
        """Answers on their way."""
        return len(self._pending) + len(self._active)

    def submit(self, asks: Sequence[Ask]) -> list[Answer]:
        """Take in answers that are asked together: all of them, or none.

        Raises:
            ApiError: If one can never be answered, too many wait, or the server is about to end.
        """
        self.check_up()
        for ask in asks:
            self.engine.check(ask)
        if self.num_waiting + len(asks) > self._max_queue:
            raise ApiError(UNAVAILABLE, f"{self.num_waiting} requests wait already: try again later (--max-queue)")
        pieces: asyncio.Queue[Piece] = asyncio.Queue()
        now_s = self.engine.now()
        answers = [Answer(ask, index, pieces, now_s) for index, ask in enumerate(asks)]
        self._pending.extend(answers)
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
                    del self._active[answer.request]
                    self._left.append(answer)
        if any(answer.request is None for answer in answers):
            self._pending = deque(answer for answer in self._pending if not answer.over)
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
            for answer in (*self._pending, *self._active.values()):
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
        self.leave([*self._pending, *self._active.values()])
        await self._empty.wait()

    def _settle(self) -> None:
        """Between two steps: take out who has left, then take in who has come."""
        for answer in self._left:
            assert answer.request is not None
            self.engine.abort(answer.request)
        self._left.clear()
        if self.engine.scheduler.requests.size > FORGET_AT + 2 * len(self._active):
            new = self.engine.forget_done()
            self._active = {new[old]: answer for old, answer in self._active.items()}
            for number, answer in self._active.items():
                answer.request = number
        while self._pending:
            answer = self._pending.popleft()
            answer.request = self.engine.add(answer.ask, answer.arrived_s)
            self._active[answer.request] = answer

    def _hand_out(self, report: StepReport) -> None:
        for each in report.admitted:
            if (answer := self._active.get(each.request)) is not None and answer.scheduled_s is None:
                answer.scheduled_s, answer.num_cached_tokens = report.began_s, each.num_hit_tokens
                self.metrics.admitted(each)
        self.metrics.stepped(report)
        for output in report.outputs:
            self._give(output, report.ended_s)

    def _give(self, output: Output, now_s: float) -> None:
        answer = self._active.get(output.request)
        if answer is None:  # it has left while the step was computed
            self._left = [each for each in self._left if each.request != output.request or output.finish_reason is None]
            return
        if output.tokens:
            self.metrics.tokens(answer, len(output.tokens), now_s)
            answer.num_tokens += len(output.tokens)
            answer.first_token_s = now_s if answer.first_token_s is None else answer.first_token_s
            answer.last_token_s = now_s
        if output.finish_reason is None:
            answer.pieces.put_nowait(Piece(answer.index, output.tokens, None))
        else:
            del self._active[output.request]
            self._finish(answer, output.finish_reason, output.tokens)

    def _finish(self, answer: Answer, reason: str, tokens: Sequence[int] = ()) -> None:
        answer.over = True
        answer.pieces.put_nowait(Piece(answer.index, list(tokens), reason))
        self.metrics.finished(answer, reason)
