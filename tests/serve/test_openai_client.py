"""The official client of OpenAI's API, against a server on the loopback device."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the server is made of starlette: pip install 'pagedkv[serve]'")
pytest.importorskip("uvicorn", reason="and of uvicorn")
openai = pytest.importorskip("openai", reason="the client that this is about: pip install openai")

from small_server import MODEL, engine, listening

from pagedkv.sims.serve.serve_loop import ServeLoop

HELLO: Any = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]


@asynccontextmanager
async def client(**changes: Any) -> "AsyncIterator[tuple[openai.AsyncOpenAI, ServeLoop]]":
    async with (
        listening(engine(**changes)) as (loop, url),
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as it,
    ):
        yield it, loop


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(test)


def test_completions_chats_and_models() -> None:
    async def test() -> None:
        async with client() as (it, _):
            assert [model.id async for model in it.models.list()] == [MODEL]
            text = await it.completions.create(model=MODEL, prompt="Once", max_tokens=6)
            assert (text.choices[0].finish_reason, text.usage.completion_tokens) == ("length", 6)
            chat = await it.chat.completions.create(model=MODEL, messages=HELLO, max_completion_tokens=5, temperature=0.5)
            assert chat.choices[0].message.role == "assistant"
            assert len(chat.choices[0].message.content) == 5 * 4
            assert chat.usage.total_tokens == chat.usage.prompt_tokens + 5

    run(test())


def test_streams_of_both_kinds() -> None:
    async def test() -> None:
        async with client() as (it, _):
            options: Any = {"include_usage": True}
            whole = await it.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=12)
            parts, usage = [], None
            async for chunk in await it.chat.completions.create(
                model=MODEL, messages=HELLO, max_tokens=12, stream=True, stream_options=options
            ):
                parts += [choice.delta.content for choice in chunk.choices]
                usage = chunk.usage
            assert "".join(parts) == whole.choices[0].message.content
            assert (usage.completion_tokens, usage.prompt_tokens) == (12, whole.usage.prompt_tokens)
            texts = [
                chunk.choices[0].text
                async for chunk in await it.completions.create(model=MODEL, prompt="x", max_tokens=4, stream=True)
            ]
            assert len(texts) == 4

    run(test())


def test_a_stream_that_is_closed_gives_its_blocks_back() -> None:
    async def test() -> None:
        async with client() as (it, loop):
            chunks = await it.completions.create(model=MODEL, prompt=[9] * 300, max_tokens=1700, stream=True)
            async for _ in chunks:
                break
            allocator = loop.engine.scheduler.allocator
            assert allocator.free_slots < allocator.usable_slots
            await chunks.close()
            async with asyncio.timeout(20):
                while loop.num_unfinished:
                    await asyncio.sleep(0.005)
                while allocator.free_slots < allocator.usable_slots:
                    await asyncio.sleep(0.005)
            assert loop.engine.scheduler.requests.arrays["num_known_tokens"][0] < 2000
            loop.engine.scheduler.check_integrity()

    run(test())


def test_errors_are_the_clients_own() -> None:
    async def test() -> None:
        async with client(max_num_seqs=1) as (it, _):
            with pytest.raises(openai.NotFoundError, match="does not exist"):
                await it.completions.create(model="other", prompt="x")
            with pytest.raises(openai.BadRequestError, match="more than 2048 in all") as error:
                await it.completions.create(model=MODEL, prompt="x", max_tokens=5000)
            assert error.value.code == "context_length_exceeded"

    run(test())
