"""The HTTP side, an ASGI application on starlette: routes, limits, and who has gone away."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from pagedkv.sims.serve.answer_format import ChatFormat, CompletionFormat
from pagedkv.sims.serve.answer_response import AnswerResponse
from pagedkv.sims.serve.errors import BAD_REQUEST, SERVER_ERROR, TOO_LARGE, ApiError
from pagedkv.sims.serve.questions import Question, read_chat, read_completion
from pagedkv.sims.serve.serve_loop import ServeLoop
from pagedkv.sims.serve.served_engine import Ask, Tokenizer

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""Source: https://prometheus.io/docs/instrumenting/exposition_formats."""


class ServeApp:
    """The endpoints over one loop."""

    def __init__(
        self,
        loop: ServeLoop,
        *,
        model_name: str,
        created: int,
        max_body_bytes: int,
        on_failure: Callable[[], None] | None = None,
    ) -> None:
        """Say `created` (seconds since 1970) of the model; call `on_failure` when the engine has failed."""
        self._loop, self._model_name, self._created, self._max_body = loop, model_name, created, max_body_bytes
        self._on_failure = on_failure
        self._encoding = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")

    def asgi(self) -> Starlette:
        """Return the application."""
        routes = [
            Route("/v1/completions", self._completions, methods=["POST"]),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/models", self._models, methods=["GET"]),
            Route("/health", self._health, methods=["GET"]),
            Route("/metrics", self._metrics, methods=["GET"]),
        ]
        handlers: Any = {ApiError: _refuse, HTTPException: _no_such_route, ClientDisconnect: _left, Exception: _broken}
        return Starlette(routes=routes, exception_handlers=handlers, lifespan=self._lifespan)

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        del app
        task = asyncio.create_task(self._serve())
        try:
            yield
        finally:
            await self._loop.close(0.0)
            await task
            self._encoding.shutdown()

    async def _serve(self) -> None:
        """Run the loop; its failure is its to tell: `/health` and every request do."""
        try:
            await self._loop.run()
        except Exception:
            if self._on_failure is not None:
                self._on_failure()

    async def _completions(self, request: Request) -> Response:
        question = read_completion(await self._body(request), self._model_name)
        return await self._answer(question, CompletionFormat(self._model_name))

    async def _chat(self, request: Request) -> Response:
        question = read_chat(await self._body(request), self._model_name)
        return await self._answer(question, ChatFormat(self._model_name))

    async def _answer(self, question: Question, shape: CompletionFormat) -> Response:
        self._loop.check_up()
        tokenizer, prompts = self._loop.engine.tokenizer, question.prompts
        running = asyncio.get_running_loop()
        ids = [
            prompt if isinstance(prompt, list) else await running.run_in_executor(self._encoding, _encode, tokenizer, prompt)
            for prompt in prompts
        ]
        asks = [Ask(prompt=each, n=question.n, **question.settings) for each in ids]
        return AnswerResponse(self._loop, self._loop.submit(asks), question, shape)

    async def _body(self, request: Request) -> bytes:
        """Return the body.

        Raises:
            ApiError: If it is larger than allowed; no more than that is read.
        """
        error = ApiError(TOO_LARGE, f"the body has more than {self._max_body} bytes (--max-body-bytes)")
        with contextlib.suppress(ValueError):
            if int(request.headers.get("content-length", "0")) > self._max_body:
                raise error
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size > self._max_body:
                raise error
            parts.append(part)
        return b"".join(parts)

    async def _models(self, request: Request) -> Response:
        del request
        limit = self._loop.engine.scheduler.settings.max_model_len
        model = {"id": self._model_name, "object": "model", "created": self._created, "owned_by": "pagedkv", "max_model_len": limit}
        return JSONResponse({"object": "list", "data": [model]})

    async def _health(self, request: Request) -> Response:
        del request
        self._loop.check_up()
        return Response()

    async def _metrics(self, request: Request) -> Response:
        del request
        text = self._loop.metrics.text(self._model_name, num_waiting=self._loop.num_waiting)
        return PlainTextResponse(text, headers={"content-type": METRICS_TYPE})


def _encode(tokenizer: Tokenizer, prompt: Any) -> list[int]:
    return tokenizer.encode(prompt) if isinstance(prompt, str) else tokenizer.encode_chat(prompt)


async def _refuse(request: Request, error: ApiError) -> Response:
    del request
    return JSONResponse(error.body(), status_code=error.status)


async def _no_such_route(request: Request, error: HTTPException) -> Response:
    where = f"{request.method} {request.url.path}"
    return JSONResponse(ApiError(error.status_code, f"{where}: {error.detail}").body(), error.status_code, headers=error.headers)


async def _left(request: Request, error: ClientDisconnect) -> Response:
    """Answer a client that went away while it asked: nobody reads it, and nothing was wrong."""
    del request, error
    return Response(status_code=BAD_REQUEST)


async def _broken(request: Request, error: Exception) -> Response:
    del request
    return JSONResponse(ApiError(SERVER_ERROR, f"{type(error).__name__}: a bug in pagedkv").body(), status_code=SERVER_ERROR)
