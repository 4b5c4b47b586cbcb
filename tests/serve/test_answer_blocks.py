"""What several answers to one prompt hold, and how they are counted: by a real model once, to a simulated vLLM as n requests."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("torch", reason="a real model needs torch")
pytest.importorskip("transformers", reason="and transformers")
pytest.importorskip("starlette", reason="the server is made of starlette: pip install 'pagedkv[serve]'")
pytest.importorskip("uvicorn", reason="and of uvicorn")
pytest.importorskip("httpx", reason="the tests' client is httpx")

from small_server import LONG_PROMPT, Watched, blocks_held, engine, served
from test_real_model import llm, real


async def most_blocks(of: Any, blocks: Callable[[], int], bodies: list[dict[str, Any]]) -> int:
    async with served(of) as server:
        answers = await asyncio.gather(*(server.post("completions", **body) for body in bodies))
        assert sum(answer.json()["usage"]["completion_tokens"] for answer in answers) == 5 * 6
        assert server.is_empty()
    return blocks()


@pytest.mark.parametrize(("caching", "forks", "requests"), [(True, 32, 32), (False, 32, 120)])
def test_five_answers_hold_the_prompt_once(caching: bool, forks: int, requests: int) -> None:
    body = {"prompt": LONG_PROMPT, "max_tokens": 6, "temperature": 1.0}

    def blocks(bodies: list[dict[str, Any]]) -> int:
        watched = Watched(llm(num_blocks=200, max_num_batched_tokens=500, enable_prefix_caching=caching))
        return asyncio.run(most_blocks(real(watched.model), lambda: watched.most_blocks, bodies))

    assert blocks([{**body, "n": 5}]) == forks
    assert blocks([{**body, "seed": seed} for seed in range(5)]) == requests


@pytest.mark.parametrize("bodies", [[{"n": 5}], [{}] * 5], ids=["one request", "five"])
@pytest.mark.parametrize(("caching", "expected"), [(True, 5 + 5), (False, 5 * 6)])
def test_to_a_simulated_vllm_they_are_requests_that_find_each_others_full_blocks(
    caching: bool, expected: int, bodies: list[dict[str, Any]]
) -> None:
    of = engine(enable_prefix_caching=caching)  # the prompt has 5 blocks of 16, and part of one
    schedule, seen = of.scheduler.schedule, [0]

    def watched() -> Any:
        decided = schedule()
        of.scheduler.check_integrity()
        seen.append(blocks_held(of))
        return decided

    of.scheduler.schedule = watched  # type: ignore[method-assign]
    body = {"prompt": LONG_PROMPT, "max_tokens": 6}
    assert asyncio.run(most_blocks(of, lambda: max(seen), [{**body, **more} for more in bodies])) == expected


def test_usage_counts_the_prompt_once_and_says_what_was_there_before() -> None:
    async def test() -> None:
        for of in (real(llm(num_blocks=300)), engine(block_size=16)):
            async with served(of) as server:
                body = {"prompt": LONG_PROMPT, "max_tokens": 5, "n": 3, "stream": True, "stream_options": {"include_usage": True}}
                for cached in (0, 88 if of.can_fork else 80):
                    last = (await server.post("completions", **body)).text.split("data: ")[-2]
                    usage = json.loads(last)["usage"]
                    assert usage["prompt_tokens_details"] == {"cached_tokens": cached}
                    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (90, 15, 105)

    asyncio.run(test())
