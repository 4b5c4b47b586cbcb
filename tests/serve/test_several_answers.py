"""`n` answers to a prompt: by a real model they are forks that share its blocks, each of them what it would be alone."""

import asyncio
import json
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="a real model needs torch")
pytest.importorskip("transformers", reason="and transformers")
pytest.importorskip("starlette", reason="the server is made of starlette: pip install 'pagedkv[serve]'")
pytest.importorskip("uvicorn", reason="and of uvicorn")
pytest.importorskip("httpx", reason="the tests' client is httpx")

from small_server import LONG_PROMPT, MODEL, Served, Watched, blocks_held, listening, samples, served
from test_real_model import PROMPTS, byte_tokenizer, hybrid, llm, real

from pagedkv.runtime.sampling import SamplingParams

ROOMY = {"num_blocks": 300, "max_num_seqs": 32}
HOT = {"temperature": 1.0, "seed": 40}


def choices_of(text: str, *, stream: bool) -> list[dict[str, Any]]:
    """Choices by index, (text, finish_reason) each: of a stream put together, whose parts must come in order."""
    bodies = list(map(json.loads, text.split("data: ")[1:-1])) if stream else [json.loads(text)]
    found: dict[int, dict[str, Any]] = {}
    for choice in (choice for body in bodies for choice in body["choices"]):
        said = choice.get("delta") or choice.get("message") or choice
        whole = found.setdefault(choice["index"], {"text": "", "finish_reason": None})
        assert whole["finish_reason"] is None
        whole["text"] += said.get("content", said.get("text"))
        whole["finish_reason"] = choice["finish_reason"]
    assert sorted(found) == list(range(len(found)))
    return [found[index] for index in sorted(found)]


async def ask(server: Served, path: str = "completions", **body: Any) -> list[str]:
    """Texts of an answer of HTTP 200, by index."""
    answer = await server.post(path, **body)
    assert answer.status_code == 200, answer.text
    return [choice["text"] for choice in choices_of(answer.text, stream=bool(body.get("stream")))]


@pytest.mark.parametrize("drafts", [0, 3])
def test_greedy_answers_are_all_that_of_one_whoever_is_preempted(monkeypatch: pytest.MonkeyPatch, drafts: int) -> None:
    monkeypatch.setattr("pagedkv.sims.serve.serve_loop.FORGET_AT", -40)  # before most steps
    more = {"speculative_model": llm().models.runner.model, "num_speculative_tokens": drafts} if drafts else {}
    expected = [" ".join(map(str, text.tokens)) for text in llm().generate(PROMPTS[:6], max_tokens=30)]

    async def test() -> None:
        model = Watched(llm(**more)).model  # a pool that does not hold all of them
        async with served(real(model)) as server:

            async def texts(number: int) -> list[str]:
                await asyncio.sleep(number / 100)
                body = {"prompt": PROMPTS[number], "max_tokens": 30, "temperature": 0, "stream": bool(number % 2)}
                return [text.strip() for text in await ask(server, **body, n=3)]

            assert await asyncio.gather(*map(texts, range(6))) == [[text] * 3 for text in expected]
            assert server.is_empty()
            counted = samples(server.loop.metrics.text(MODEL, num_waiting=0))
        assert counted["num_preemptions_total"] > 0
        assert counted["prompt_tokens_total"] == sum(map(len, PROMPTS[:6]))
        assert counted["generation_tokens_total"] == 18 * 30
        assert counted['request_success_total{finished_reason="length"}'] == counted["e2e_request_latency_seconds_count"] == 18

    asyncio.run(test())


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_the_answer_at_i_is_that_of_seed_plus_i(path: str, stream: bool) -> None:
    async def test() -> None:
        asked: dict[str, Any] = {"prompt": "Grüße"} if path == "completions" else {"messages": [{"role": "user", "content": "?"}]}
        async with served(real(llm(**ROOMY), byte_tokenizer())) as server:
            together = await ask(server, path, **asked, **HOT, max_tokens=12, n=4, stream=stream)
            alone = [await ask(server, path, **asked, max_tokens=12, temperature=1.0, seed=40 + i) for i in range(4)]
            assert [[text] for text in together] == alone
            assert len(set(together)) == 4
            drawn = await ask(server, path, **asked, max_tokens=12, n=4, stream=stream)
            assert len({*drawn, *together}) == 8  # without a seed, others
            assert server.is_empty()

    asyncio.run(test())


def test_several_prompts_have_their_answers_side_by_side() -> None:
    async def test() -> None:
        async with served(real(llm(**ROOMY))) as server:
            body = {"max_tokens": 8, "temperature": 0}
            alone = [text for prompt in PROMPTS[1:4] for text in await ask(server, prompt=prompt, **body, n=2)]
            answer = (await server.post("completions", prompt=PROMPTS[1:4], **body, n=2)).json()
            assert [choice["text"] for choice in answer["choices"]] == alone
            usage = answer["usage"]
            assert (usage["prompt_tokens"], usage["completion_tokens"]) == (sum(map(len, PROMPTS[1:4])), 48)
            assert server.is_empty()

    asyncio.run(test())


def test_a_stop_text_ends_one_answer_and_gives_its_blocks_back_while_others_go_on() -> None:
    async def test() -> None:
        whole = llm(**ROOMY).generate([LONG_PROMPT], max_tokens=60, sampling=SamplingParams(temperature=1.0, seed=40), n=4)
        texts = [" ".join(map(str, text.tokens)) + " " for text in whole]
        stop = next(
            f" {word} "
            for word in texts[2].split()[3:20]
            if sum(f" {word} " in text for text in texts) == 1 and texts[2].index(f" {word} ") < 80
        )
        for stream in (True, False):
            watched = Watched(llm(**ROOMY))
            async with served(real(watched.model)) as server:
                answer = await server.post("completions", prompt=LONG_PROMPT, max_tokens=60, **HOT, n=4, stop=stop, stream=stream)
                choices = choices_of(answer.text, stream=stream)
                await server.until(server.is_empty)
            assert [choice["finish_reason"] for choice in choices] == ["length", "length", "stop", "length"]
            for choice, text in zip(choices, texts, strict=True):
                assert choice["text"].strip() == text.partition(stop)[0].strip()
            assert watched.num_texts.count(4) < 25 < watched.num_texts.count(3)

    asyncio.run(test())


def test_an_end_token_ends_one_answer_even_with_its_first_token() -> None:
    whole = llm(**ROOMY).generate([LONG_PROMPT], max_tokens=10, sampling=SamplingParams(temperature=1.0, seed=40), n=4)
    end = whole[0].tokens[0]

    async def test() -> None:
        async with served(real(llm(**ROOMY), end_tokens=[end])) as server:
            choices = (await server.post("completions", prompt=LONG_PROMPT, max_tokens=10, **HOT, n=4)).json()["choices"]
            assert server.is_empty()
        assert choices[0]["text"].split() == [str(end)]
        for choice, text in zip(choices, whole, strict=True):
            assert choice["finish_reason"] == ("stop" if end in text.tokens else "length")

    asyncio.run(test())


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("after", [0, 1, 9])
def test_whoever_leaves_gives_all_answers_back_at_once(stream: bool, after: int) -> None:
    async def test() -> None:
        watched = Watched(llm(num_blocks=300, max_num_seqs=12, max_num_batched_tokens=40))  # prompts take several steps
        model = watched.model
        async with served(real(model)) as server:
            body = {"max_tokens": 200, "temperature": 1.0, "n": 4}
            stays = asyncio.create_task(server.post("completions", prompt=PROMPTS[0], **body))
            await server.until(lambda: model.num_unfinished == 4)
            for _ in range(3):
                steps = len(watched.num_texts)
                leaves = asyncio.create_task(server.post("completions", prompt=LONG_PROMPT, stream=stream, **body))
                await server.until(lambda: model.num_unfinished == (8 if after else 5))
                if after > 1:
                    await server.until(lambda steps=steps: len(watched.num_texts) > steps + after)
                leaves.cancel()
                await server.until(lambda: model.num_unfinished <= 4)
            assert (await stays).json()["usage"]["completion_tokens"] == 800
            assert server.is_empty()
            counted = samples(server.loop.metrics.text(MODEL, num_waiting=0))
        assert set(watched.num_texts) <= {1, 4, 5, 8}  # before its prompt is computed, one text stands for all
        assert counted['request_success_total{finished_reason="abort"}'] == 12
        assert counted['request_success_total{finished_reason="length"}'] == 4

    asyncio.run(test())


def test_rows_for_fewer_than_n_and_a_queue_that_is_full() -> None:
    async def test() -> None:
        model = Watched(llm(num_blocks=300, max_num_seqs=2)).model
        expected = " ".join(map(str, llm().generate([LONG_PROMPT], max_tokens=9)[0].tokens))
        async with served(real(model), max_queue=6) as server:
            texts = await ask(server, prompt=LONG_PROMPT, max_tokens=9, temperature=0, n=5)
            assert [text.strip() for text in texts] == [expected] * 5
            refused = await server.post("completions", prompt=LONG_PROMPT, max_tokens=9, n=7)
            assert (refused.status_code, "--max-queue" in refused.text) == (503, True)
            first = asyncio.create_task(server.post("completions", prompt=LONG_PROMPT, max_tokens=150, n=5))
            await server.until(lambda: server.loop.num_waiting == 3)  # forks that found no row
            refused = await server.post("completions", prompt=LONG_PROMPT, max_tokens=9, n=4)
            assert (refused.status_code, "3 requests wait" in refused.text) == (503, True)
            first.cancel()
            await server.until(server.is_empty)
            assert server.loop.num_waiting == 0

    asyncio.run(test())


def test_an_engine_that_cannot_fork_answers_n_times() -> None:
    async def test() -> None:
        engine = real(llm(**ROOMY))
        engine.can_fork = False  # as a simulated one
        async with served(engine) as server:
            together = await ask(server, prompt=LONG_PROMPT, **HOT, max_tokens=12, n=3, stream=True)
            alone = [await ask(server, prompt=LONG_PROMPT, max_tokens=12, temperature=1.0, seed=40 + i) for i in range(3)]
            assert [[text] for text in together] == alone
            usage = (await server.post("completions", prompt=[5] * 9, max_tokens=4, n=3)).json()["usage"]
            assert (usage["prompt_tokens"], usage["completion_tokens"]) == (9, 12)
            assert server.is_empty()

    asyncio.run(test())


def test_an_engine_that_fails_tells_everybody() -> None:
    async def test() -> None:
        model = llm(**ROOMY)
        step, number = model.step, 0

        def fails() -> Any:
            nonlocal number
            number += 1
            if number == 6:
                raise RuntimeError("out of memory")
            return step()

        model.step = fails  # type: ignore[method-assign]
        async with served(real(model)) as server:
            streamed, whole = await asyncio.gather(
                server.post("completions", prompt=LONG_PROMPT, max_tokens=50, n=3, stream=True),
                server.post("completions", prompt=PROMPTS[1], max_tokens=50, n=3),
            )
            assert whole.status_code == 500
            assert '"error"' in streamed.text
            assert streamed.text.endswith("data: [DONE]\n\n")
            assert server.loop.num_unfinished == 0
            assert (await server.client.get("/health")).status_code == 500

    asyncio.run(test())


def test_the_official_client() -> None:
    openai = pytest.importorskip("openai", reason="the client that this is about: pip install openai")

    async def test() -> None:
        model = Watched(llm(**ROOMY)).model
        async with (
            listening(real(model, byte_tokenizer())) as (loop, url),
            openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as it,
        ):
            asked: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 15, "n": 3}
            whole = await it.chat.completions.create(**asked, seed=7)
            texts = ["", "", ""]
            async for chunk in await it.chat.completions.create(
                **asked, seed=7, stream=True, stream_options={"include_usage": True}
            ):
                for choice in chunk.choices:
                    texts[choice.index] += choice.delta.content
                usage = chunk.usage
            assert texts == [choice.message.content for choice in whole.choices]
            assert (usage.prompt_tokens, usage.completion_tokens) == (whole.usage.prompt_tokens, 45) == (12, 45)
            stream = await it.completions.create(model=MODEL, prompt=LONG_PROMPT, max_tokens=140, n=4, stream=True)
            seen = set[int]()
            async for chunk in stream:
                seen |= {choice.index for choice in chunk.choices}
                if len(seen) == 4:
                    break
            assert blocks_held(model) < 2 * 23 + 4  # a prompt of 23 blocks once, not four times
            await stream.close()
            async with asyncio.timeout(20):
                while not loop.is_idle or blocks_held(model):
                    await asyncio.sleep(0.005)
            model.scheduler.check_integrity()

    asyncio.run(test())


@pytest.mark.parametrize("stream", [True, False])
def test_with_linear_attention_each_has_a_state_of_its_own(stream: bool) -> None:
    async def test() -> None:
        model = Watched(hybrid(num_blocks=70, max_num_batched_tokens=40)).model  # prompts come in chunks, and not all fit
        asked: dict[str, Any] = {"max_tokens": 25, "temperature": 1.0, "stream": stream}
        async with served(real(hybrid(**ROOMY))) as apart, served(real(model)) as server:
            prompts = [LONG_PROMPT, *PROMPTS[4:7]]
            alone = [[await ask(apart, **asked, prompt=prompt, seed=40 + i) for i in range(4)] for prompt in prompts]
            together = await asyncio.gather(*(ask(server, **asked, prompt=prompt, seed=40, n=4) for prompt in prompts))
            assert [[[text] for text in texts] for texts in together] == alone
            assert server.is_empty()
            counted = samples(server.loop.metrics.text(MODEL, num_waiting=0))
        assert counted["num_preemptions_total"] > 0
        assert counted["prompt_tokens_total"] == sum(map(len, prompts))

    asyncio.run(test())
