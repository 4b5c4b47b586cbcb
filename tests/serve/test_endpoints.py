"""Every endpoint answers in the shape that OpenAI's API has, streaming and not."""

import asyncio
import json
from collections.abc import Coroutine
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the server is made of starlette: pip install 'pagedkv[serve]'")
pytest.importorskip("uvicorn", reason="and of uvicorn")
pytest.importorskip("httpx", reason="the tests' client is httpx")

from small_server import MODEL, Served, engine, samples, served

from pagedkv.sims.serve.filler import FillerTokenizer, filler_tokens


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(test)


def events(text: str) -> list[Any]:
    """What a stream says, its end checked."""
    *parts, done, rest = text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(part.removeprefix("data: ")) for part in parts]


def test_a_completion_of_a_text() -> None:
    async def test() -> None:
        async with served() as server:
            answer = (await server.post("completions", model=MODEL, prompt="How many tokens?", max_tokens=7)).json()
            again = (await server.post("completions", model=MODEL, prompt="How many tokens?", max_tokens=7)).json()
            assert server.is_empty()
        assert (answer["object"], answer["model"]) == ("text_completion", MODEL)
        (choice,) = answer["choices"]
        assert (choice["index"], choice["finish_reason"], len(choice["text"])) == (0, "length", 7 * 4)
        usage = answer["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (4, 7, 11)
        assert again["choices"] == answer["choices"]
        assert again["id"] != answer["id"]

    run(test())


def test_prompts_of_every_kind_and_several_answers() -> None:
    async def test() -> None:
        async with served() as server:
            for prompt, total in (([5, 6, 7], 3), (["abcd", "abcdefgh"], 3), ([[1, 2], [3]], 3)):
                answer = (await server.post("completions", prompt=prompt, n=2, max_tokens=3)).json()
                answers = len(prompt) * 2 if not isinstance(prompt[0], int) else 2
                assert [choice["index"] for choice in answer["choices"]] == list(range(answers))
                assert answer["usage"]["prompt_tokens"] == total
                assert answer["usage"]["completion_tokens"] == 3 * answers
            assert server.is_empty()

    run(test())


def test_without_max_tokens_a_completion_has_sixteen() -> None:
    async def test() -> None:
        async with served() as server:
            assert (await server.post("completions", prompt="x")).json()["usage"]["completion_tokens"] == 16

    run(test())


def test_a_chat_answers_and_finds_its_history() -> None:
    async def test() -> None:
        messages = [{"role": "system", "content": "Be brief. " * 40}, {"role": "user", "content": "Hello"}]
        async with served() as server:
            first = (await server.post("chat/completions", messages=messages, max_completion_tokens=64)).json()
            said = first["choices"][0]["message"]
            assert (said["role"], first["object"]) == ("assistant", "chat.completion")
            messages += [
                {"role": "assistant", "content": said["content"]},
                {"role": "user", "content": [{"type": "text", "text": "?"}]},
            ]
            second = (await server.post("chat/completions", messages=messages, max_tokens=2)).json()
        known = first["usage"]["total_tokens"] - 1  # the last token was never computed
        assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == known // 16 * 16

    run(test())


def test_a_cache_salt_keeps_tenants_apart() -> None:
    async def test() -> None:
        async with served() as server:
            found = []
            for salt in ("a", "b", "a"):
                answer = await server.post("completions", prompt=list(range(100)), max_tokens=2, cache_salt=salt)
                found.append(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])
        assert found == [0, 0, 96]

    run(test())


@pytest.mark.parametrize("with_usage", [True, False])
def test_a_stream_says_the_same_token_by_token(with_usage: bool) -> None:
    async def test() -> None:
        body: dict[str, Any] = {"prompt": "Tell me", "max_tokens": 9}
        async with served() as server:
            whole = (await server.post("completions", **body)).json()
            options = {"include_usage": True} if with_usage else {}
            streamed = await server.post("completions", **body, stream=True, stream_options=options)
        assert streamed.headers["content-type"].startswith("text/event-stream")
        chunks = events(streamed.text)
        if with_usage:
            last = chunks.pop()
            assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 9)
        assert [len(chunk["choices"][0]["text"]) for chunk in chunks] == [4] * 9
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["choices"][0]["text"]
        assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 8 + ["length"]
        assert all(chunk["usage"] is None for chunk in chunks)
        assert len({chunk["id"] for chunk in chunks}) == 1

    run(test())


def test_a_streamed_chat_begins_with_who_speaks() -> None:
    async def test() -> None:
        async with served() as server:
            body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3, "n": 2, "stream": True}
            chunks = events((await server.post("chat/completions", **body)).text)
        for which in range(2):
            mine = [chunk["choices"][0] for chunk in chunks if chunk["choices"][0]["index"] == which]
            assert mine[0]["delta"] == {"role": "assistant", "content": ""}
            assert len(mine) == 4
            assert mine[-1]["finish_reason"] == "length"

    run(test())


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_ends_before_a_stop_text(stream: bool) -> None:
    async def test() -> None:
        async with served() as server:
            whole = (await server.post("completions", prompt="Story", max_tokens=40)).json()["choices"][0]["text"]
            stop = whole[41:47]
            answer = await server.post("completions", prompt="Story", max_tokens=40, stop=[stop, "never"], stream=stream)
            choices = [chunk["choices"][0] for chunk in (events(answer.text) if stream else [answer.json()])]
            await server.until(server.is_empty)
            ended = samples(server.loop.metrics.text(MODEL, num_waiting=0))
            behind = await server.post("completions", prompt="Story", max_tokens=40, stop=stop, include_stop_str_in_output=True)
        assert "".join(choice["text"] for choice in choices) == whole[: whole.index(stop)]
        assert (choices[-1]["finish_reason"], choices[-1]["stop_reason"]) == ("stop", stop)
        assert ended['request_success_total{finished_reason="stop"}'] == 1
        assert behind.json()["choices"][0]["text"] == whole[: whole.index(stop) + len(stop)]

    run(test())


def test_drawn_lengths_end_answers_within_what_is_asked() -> None:
    async def test() -> None:
        async with served(engine(draws_all=True, drawn=30)) as server:

            async def length(**body: Any) -> tuple[int, str]:
                answer = (await server.post("completions", prompt="x", **body)).json()
                return answer["usage"]["completion_tokens"], answer["choices"][0]["finish_reason"]

            assert await length(max_tokens=100) == (30, "stop")
            assert await length(max_tokens=20) == (20, "length")
            assert await length(max_tokens=100, min_tokens=50) == (50, "stop")
            assert await length(max_tokens=100, ignore_eos=True) == (100, "length")
        async with served(engine(drawn=30)) as server:
            chat = await server.post("chat/completions", messages=[{"role": "user", "content": "x"}])
            assert chat.json()["usage"]["completion_tokens"] == 30
            assert await length(max_tokens=100) == (100, "length")

    run(test())


def test_models_health_and_metrics() -> None:
    async def test() -> None:
        async with served() as server:
            models = (await server.client.get("/v1/models")).json()
            assert (models["object"], models["data"][0]["id"], models["data"][0]["max_model_len"]) == ("list", MODEL, 2048)
            assert (await server.client.get("/health")).status_code == 200
            await asyncio.gather(*(server.post("completions", prompt=[i] * 50, max_tokens=5) for i in range(8)))
            scrape = await server.client.get("/metrics")
        assert scrape.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        counted = samples(scrape.text)
        assert counted["prompt_tokens_total"] == counted["prefix_cache_queries_total"] == 400
        assert counted["generation_tokens_total"] == 40
        assert counted['request_success_total{finished_reason="length"}'] == 8
        assert counted["inter_token_latency_seconds_count"] == 32
        assert counted['time_to_first_token_seconds_bucket{le="+Inf"}'] == 8

    run(test())


async def left(server: Served, *, stream: bool) -> None:
    """Begin a long answer and go away."""
    task = asyncio.create_task(server.post("completions", prompt=[3] * 500, max_tokens=1500, stream=stream))
    await server.until(lambda: server.loop.engine.scheduler.num_running > 0)
    assert server.loop.engine.scheduler.allocator.free_slots < server.loop.engine.scheduler.allocator.usable_slots
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@pytest.mark.parametrize("stream", [True, False])
def test_whoever_goes_away_gives_blocks_back_at_the_end_of_the_step(stream: bool) -> None:
    async def test() -> None:
        async with served(engine(num_gpu_blocks_override=200)) as server:
            await left(server, stream=stream)
            steps_before = server.loop.engine.scheduler.requests.arrays["num_known_tokens"][0]
            await server.until(server.is_empty)
            assert server.loop.engine.scheduler.requests.arrays["num_known_tokens"][0] <= steps_before + 1
            counted = samples(server.loop.metrics.text(MODEL, num_waiting=0))
            assert counted['request_success_total{finished_reason="abort"}'] == 1
            assert counted["e2e_request_latency_seconds_count"] == 0

    run(test())


def test_the_rule_for_texts_is_a_token_for_four_characters_begun() -> None:
    rule = FillerTokenizer()
    assert [len(rule.encode(text)) for text in ("", "a", "abcd", "abcde", "äöüß", "🙂🙂🙂🙂🙂", "\ud800")] == [0, 1, 1, 2, 1, 2, 1]
    assert rule.encode("abcdefgh")[:1] == rule.encode("abcdxyz")[:1]
    assert rule.encode("abcd") != rule.encode("abce")
    answer = filler_tokens([1, 2, 3], 50)
    assert rule.encode(rule.decoder().push(answer, last=True)) == answer
    assert filler_tokens([1, 2, 3], 20) == answer[:20]
    assert filler_tokens([1, 2, 4], 50) != answer
