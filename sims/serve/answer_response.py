"""Sends answers as they come, or whole; when the client goes away they are taken out at once."""

import asyncio
from collections.abc import AsyncIterator, Sequence

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from pagedkv.sims.serve.answer_format import DONE, CompletionFormat, StopReason, event
from pagedkv.sims.serve.errors import SERVER_ERROR, ApiError
from pagedkv.sims.serve.questions import Question
from pagedkv.sims.serve.serve_loop import Answer, ServeLoop
from pagedkv.sims.serve.served_engine import ERROR, STOP
from pagedkv.sims.serve.text_stream import TextStream

_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]


class AnswerResponse(Response):
    """The response to one request, of one or more answers."""

    def __init__(self, loop: ServeLoop, answers: Sequence[Answer], question: Question, shape: CompletionFormat) -> None:
        """Take over `answers`: they are taken out if they are not done when the response is."""
        self.background = None
        self._loop, self._answers, self._question, self._shape = loop, answers, question, shape

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until all is said, or nobody listens."""
        respond = self._stream(send) if self._question.stream else self._whole(scope, receive, send)
        sending, gone = asyncio.ensure_future(respond), asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                sending.result()
        except OSError:  # uvicorn: the connection is closed
            pass
        finally:
            self._loop.leave(self._answers)
            for task in (sending, gone):
                task.cancel()
            await asyncio.gather(sending, gone, return_exceptions=True)

    async def _texts(self) -> AsyncIterator[tuple[int, str, str | None, StopReason]]:
        """Yield (index, new text, why it ended, which stop ended it) until all answers are over."""
        tokenizer, answers = self._loop.engine.tokenizer, self._answers
        texts = [TextStream(tokenizer.decoder(), each.ask.stop, include_stop=each.ask.include_stop) for each in answers]
        over = [False] * len(answers)
        while not all(over):
            index, tokens, reason = await answers[0].pieces.get()
            if over[index]:
                continue
            text = texts[index].push(tokens, last=reason is not None)
            stopped_by: StopReason = texts[index].stopped_by
            if stopped_by is not None:
                reason = STOP
                self._loop.leave([answers[index]], STOP)
            elif reason == STOP and tokens and tokens[-1] in answers[index].ask.stop_token_ids:
                stopped_by = tokens[-1]
            over[index] = reason is not None
            if text or reason is not None:
                yield index, text, reason, stopped_by

    async def _whole(self, scope: Scope, receive: Receive, send: Send) -> None:
        texts = [""] * len(self._answers)
        ends: list[tuple[str, StopReason]] = [("", None)] * len(self._answers)
        async for index, text, reason, stopped_by in self._texts():
            texts[index] += text
            if reason is not None:
                ends[index] = reason, stopped_by
        if any(reason == ERROR for reason, _ in ends):
            error = self._error()
            await JSONResponse(error.body(), status_code=error.status)(scope, receive, send)
            return
        whole = self._shape.whole([(text, *end) for text, end in zip(texts, ends, strict=True)], self._answers)
        await JSONResponse(whole)(scope, receive, send)

    async def _stream(self, send: Send) -> None:
        async def write(body: bytes, *, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": body, "more_body": more})

        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        begun = set[int]()
        async for index, text, reason, stopped_by in self._texts():
            if reason == ERROR:
                await write(event(self._error().body()) + DONE, more=False)
                return
            if index not in begun and (opening := self._shape.opening(index)) is not None:
                await write(event(opening))
            begun.add(index)
            await write(event(self._shape.chunk(index, text, reason, stopped_by)))
        if self._question.include_usage:
            await write(event(self._shape.closing(self._answers)))
        await write(DONE, more=False)

    def _error(self) -> ApiError:
        return ApiError(SERVER_ERROR, "the engine has given the request up")


async def _gone(receive: Receive) -> None:
    """Return when the client has gone away."""
    while (await receive())["type"] != "http.disconnect":
        pass
