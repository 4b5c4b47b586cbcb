"""Requests that cannot be answered get OpenAI's error body, and change nothing."""

import asyncio
import json
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the server is made of starlette: pip install 'pagedkv[serve]'")
pytest.importorskip("uvicorn", reason="and of uvicorn")
pytest.importorskip("httpx", reason="the tests' client is httpx")

from small_server import MODEL, engine, samples, served

HELLO = [{"role": "user", "content": "Hello"}]
BAD: list[tuple[str, Any, int, str]] = [
    ("completions", b"", 400, "no JSON"),
    ("completions", b"{", 400, "no JSON"),
    ("completions", b"\xff\xfe", 400, "no JSON"),
    ("completions", b"[" * 100_000, 400, "no JSON"),
    ("completions", [], 400, "no JSON object"),
    ("completions", {}, 400, "prompt is None"),
    ("completions", {"prompt": []}, 400, "prompt is []"),
    ("completions", {"prompt": ""}, 400, "no tokens"),
    ("completions", {"prompt": [1, "a"]}, 400, "prompt is 1"),
    ("completions", {"prompt": [True]}, 400, "prompt is True"),
    ("completions", {"prompt": [-1]}, 400, "token ids"),
    ("completions", {"prompt": [2**31]}, 400, "token ids"),
    ("completions", {"prompt": [10**400]}, 400, "token ids"),
    ("completions", {"prompt": [[1], []]}, 400, "prompt is []"),
    ("completions", {"prompt": ["a"] * 129}, 400, "at most 128"),
    ("completions", {"prompt": "a", "n": 129}, 400, "n is 129"),
    ("completions", {"prompt": "a", "max_tokens": 0}, 400, "max_tokens is 0"),
    ("completions", {"prompt": "a", "max_tokens": 2.5}, 400, "max_tokens is 2.5"),
    ("completions", {"prompt": "a", "max_tokens": True}, 400, "max_tokens is True"),
    ("completions", {"prompt": "a", "max_tokens": 2047}, 200, ""),
    ("completions", {"prompt": "a", "max_tokens": 2048}, 400, "more than 2048"),
    ("completions", {"prompt": [1] * 2048}, 400, "more than 2048"),
    ("completions", {"prompt": "a", "max_tokens": 5, "min_tokens": 6}, 400, "min_tokens is 6"),
    ("completions", {"prompt": "a", "temperature": -1}, 400, "temperature is -1"),
    ("completions", b'{"prompt": "a", "temperature": NaN}', 400, "temperature is nan"),
    ("completions", b'{"prompt": "a", "temperature": Infinity}', 400, "temperature is inf"),
    ("completions", {"prompt": "a", "top_p": 0}, 400, "top_p is 0"),
    ("completions", {"prompt": "a", "stream": "yes"}, 400, "stream is 'yes'"),
    ("completions", {"prompt": "a", "stream_options": {"include_usage": True}}, 400, "stream_options"),
    ("completions", {"prompt": "a", "stream": True, "stream_options": 3}, 400, "stream_options is 3"),
    ("completions", {"prompt": "a", "stop": ["a", "b", "c", "d", "e"]}, 400, "stop is"),
    ("completions", {"prompt": "a", "stop": ""}, 400, "stop is ''"),
    ("completions", {"prompt": "a", "stop": {"a": 1}}, 400, "stop is"),
    ("completions", {"prompt": "a", "seed": 2**63}, 400, "seed is"),
    ("completions", {"prompt": "a", "cache_salt": 3}, 400, "cache_salt is 3"),
    ("completions", {"prompt": "a", "echo": True}, 400, "echo is not supported"),
    ("completions", {"prompt": "a", "logprobs": 3}, 400, "logprobs is not supported"),
    ("completions", {"prompt": "a", "logprobs": 0}, 400, "logprobs is not supported"),
    ("completions", {"prompt": "a", "n": 2, "best_of": 2}, 400, "best_of is not supported"),
    ("completions", {"prompt": "a", "stop_token_ids": "x"}, 400, "stop_token_ids is 'x'"),
    ("completions", {"prompt": "a", "stop_token_ids": [1, True]}, 400, "stop_token_ids is [1, True]"),
    ("completions", {"prompt": "a", "model": "gpt-4"}, 404, "'gpt-4' does not exist"),
    ("completions", {"prompt": "a", "model": ["x"]}, 404, "does not exist"),
    ("completions", {"prompt": "a" * (1 << 20)}, 413, "--max-body-bytes"),
    ("chat/completions", {}, 400, "messages is None"),
    ("chat/completions", {"messages": []}, 400, "messages is []"),
    ("chat/completions", {"messages": ["hi"]}, 400, "messages[0] is 'hi'"),
    ("chat/completions", {"messages": [{"content": "hi"}]}, 400, "messages[0].role is None"),
    ("chat/completions", {"messages": [{"role": "user"}]}, 400, "messages[0].content is None"),
    ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "parts of type text"),
    ("chat/completions", {"messages": HELLO, "tools": [{}]}, 400, "tools is not supported"),
    ("chat/completions", {"messages": HELLO, "response_format": {"type": "json_object"}}, 400, "response_format"),
    ("chat/completions", {"messages": HELLO, "max_completion_tokens": -3}, 400, "max_tokens is -3"),
    ("embeddings", {"input": "a"}, 404, "/v1/embeddings"),
]


def test_bad_requests_say_what_is_wrong_and_change_nothing() -> None:
    async def test() -> None:
        async with served() as server:
            for path, body, status, says in BAD:
                content = body if isinstance(body, bytes) else json.dumps(body).encode()
                scheduler = server.loop.engine.scheduler
                before = scheduler.requests.size
                answer = await server.client.post(f"/v1/{path}", content=content)
                assert answer.status_code == status, (body, answer.text[:200])
                assert server.is_empty()
                if status == 200:
                    continue
                error = answer.json()["error"]
                assert error.keys() == {"message", "type", "param", "code"}
                assert says in error["message"], (says, error)
                assert len(error["message"]) < 400
                assert scheduler.requests.size == before
            counted = samples(server.loop.metrics.text(MODEL, num_waiting=0))
            assert sum(number for name, number in counted.items() if name.startswith("request_success_total")) == 1

    asyncio.run(test())


def test_of_several_prompts_all_are_taken_or_none() -> None:
    async def test() -> None:
        async with served() as server:
            answer = await server.post("completions", prompt=[[1], [2], [3] * 3000])
            assert answer.status_code == 400
            assert answer.json()["error"]["code"] == "context_length_exceeded"
            assert server.loop.engine.scheduler.requests.size == 0

    asyncio.run(test())


def test_a_body_without_a_length_is_not_read_beyond_the_limit() -> None:
    async def test() -> None:
        sent = 0

        async def endless() -> Any:
            nonlocal sent
            while True:
                sent += 1
                yield b" " * 1000

        async with served(max_body_bytes=10_000) as server:
            answer = await server.client.post("/v1/completions", content=endless())
        assert answer.status_code == 413
        assert sent < 20

    asyncio.run(test())


def test_a_wrong_method_is_told_which_are_right() -> None:
    async def test() -> None:
        async with served() as server:
            answer = await server.client.get("/v1/completions")
            assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
            assert "error" in answer.json()

    asyncio.run(test())


def test_a_full_queue_refuses_and_takes_in_again() -> None:
    async def test() -> None:
        async with served(engine(max_num_seqs=1), max_queue=3) as server:
            first = asyncio.create_task(server.post("completions", prompt=[1], max_tokens=1500))
            await server.until(lambda: server.loop.engine.scheduler.num_running == 1)
            others = [asyncio.create_task(server.post("completions", prompt=[1], max_tokens=2)) for _ in range(3)]
            await server.until(lambda: server.loop.num_waiting == 3)
            refused = await server.post("completions", prompt=[1], max_tokens=2)
            assert refused.status_code == 503
            assert refused.json()["error"]["type"] == "overloaded_error"
            answers = await asyncio.gather(first, *others)
            assert [answer.status_code for answer in answers] == [200] * 4
            assert (await server.post("completions", prompt=[1], max_tokens=2)).status_code == 200

    asyncio.run(test())


def test_an_engine_that_fails_at_a_new_request_tells_that_one_too() -> None:
    async def test() -> None:
        broken = engine()

        def fail(*_: object) -> int:
            raise RuntimeError("out of order")

        async with served(broken) as server:
            broken.add = fail  # type: ignore[method-assign]
            assert (await server.post("completions", prompt=[[1], [2]])).status_code == 500
            assert (await server.client.get("/health")).status_code == 500

    asyncio.run(test())


def test_an_engine_that_fails_ends_every_answer_and_says_so() -> None:
    async def test() -> None:
        broken = engine()
        async with served(broken) as server:
            going = asyncio.create_task(server.post("completions", prompt=[1], max_tokens=2000))
            streaming = asyncio.create_task(server.post("completions", prompt=[1], max_tokens=2000, stream=True))
            await server.until(lambda: broken.scheduler.num_running == 2)

            def fail() -> None:
                raise RuntimeError("out of order")

            broken.scheduler.schedule = fail  # type: ignore[method-assign, assignment]
            assert (await going).status_code == 500
            assert json.loads((await streaming).text.split("\n\n")[-3].removeprefix("data: "))["error"]["type"] == "server_error"
            assert (await server.client.get("/health")).status_code == 500
            assert "out of order" in (await server.post("completions", prompt=[1])).json()["error"]["message"]

    asyncio.run(test())
