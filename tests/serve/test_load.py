"""Many clients at once, patient and not: nothing is lost, and nothing stays behind."""

import asyncio
import gc
import json
import random
from pathlib import Path

import pytest

pytest.importorskip("starlette", reason="the server is made of starlette: pip install 'pagedkv[serve]'")
pytest.importorskip("uvicorn", reason="and of uvicorn")
httpx = pytest.importorskip("httpx", reason="the tests' client is httpx")

from small_server import MODEL, engine, listening, samples

from pagedkv.sims.serve.serve_loop import Answer, ServeLoop

CLIENTS = 200


def resident_bytes() -> int:
    """Resident memory of this process. Source: proc(5), statm counts pages."""
    import resource

    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


async def settled(loop: ServeLoop) -> None:
    async with asyncio.timeout(30):
        while loop.num_unfinished or loop.engine.scheduler.num_running:
            await asyncio.sleep(0.01)
    scheduler = loop.engine.scheduler
    scheduler.check_integrity()
    assert scheduler.num_running == scheduler.num_waiting == 0
    assert scheduler.allocator.free_slots == scheduler.allocator.usable_slots


async def stream(client: "httpx.AsyncClient", rng: random.Random, leave_after: int | None = None) -> int:
    """Read an answer, or part of it, and return its tokens."""
    asked = rng.randrange(10, 60)
    prompt = [rng.randrange(4)] * rng.randrange(20, 200)
    body = {"prompt": prompt, "max_tokens": asked, "stream": True, "stream_options": {"include_usage": True}}
    seen, ended, usage = 0, False, None
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.status_code == 200
        async for line in answer.aiter_lines():
            if line == "data: [DONE]":
                ended = True
            elif line:
                chunk = json.loads(line.removeprefix("data: "))
                usage = chunk["usage"]
                seen += len(chunk["choices"])
                if seen == leave_after:
                    return seen
    assert ended
    assert usage["completion_tokens"] == seen == asked
    return seen


def test_two_hundred_streams_at_once_lose_nothing_and_leave_nothing() -> None:
    async def test() -> None:
        crowded = engine(num_gpu_blocks_override=400, max_num_seqs=128)
        async with listening(crowded) as (loop, url):
            limits = httpx.Limits(max_connections=None)
            async with httpx.AsyncClient(base_url=url, limits=limits, timeout=60) as client:

                async def user(number: int, rounds: int) -> int:
                    rng = random.Random(number)
                    return sum([await stream(client, rng) for _ in range(rounds)])

                tokens = sum(await asyncio.gather(*(user(number, 1) for number in range(CLIENTS))))
                await settled(loop)
                gc.collect()
                before_bytes, before_tasks = resident_bytes(), len(asyncio.all_tasks())
                tokens += sum(await asyncio.gather(*(user(number, 3) for number in range(CLIENTS))))
                await settled(loop)
                gc.collect()
                assert not [each for each in gc.get_objects() if isinstance(each, Answer)]
                assert len(asyncio.all_tasks()) <= before_tasks
                assert resident_bytes() - before_bytes < 32 << 20  # 600 answers: what one of them left would have to be small
                counted = samples((await client.get("/metrics")).text)
        assert counted["generation_tokens_total"] == tokens
        assert counted['request_success_total{finished_reason="length"}'] == 4 * CLIENTS
        assert counted["num_preemptions_total"] > 0
        assert counted["prefix_cache_hits_total"] > 0
        assert counted["num_requests_running"] == counted["num_requests_waiting"] == counted["kv_cache_usage_perc"] == 0

    asyncio.run(test())


def test_clients_that_are_killed_at_random_leave_a_sound_server() -> None:
    async def test() -> None:
        crowded = engine(num_gpu_blocks_override=300, max_num_seqs=32)
        async with listening(crowded) as (loop, url):

            async def user(number: int) -> bool:
                rng = random.Random(number)
                async with httpx.AsyncClient(base_url=url, timeout=60) as client:
                    kind = number % 3
                    if kind == 0:
                        await stream(client, rng)
                        return True
                    if kind == 1:
                        await stream(client, rng, leave_after=rng.randrange(1, 10))
                        return False
                    task = asyncio.create_task(client.post("/v1/completions", json={"prompt": [7] * 90, "max_tokens": 1800}))
                    await asyncio.sleep(rng.random() / 5)
                    task.cancel()
                    await asyncio.gather(task, return_exceptions=True)
                    return False

            async def look() -> None:
                while True:
                    await asyncio.sleep(0.02)
                    loop.engine.scheduler.check_integrity()

            watcher = asyncio.create_task(look())
            stayed = await asyncio.gather(*(user(number) for number in range(90)))
            await settled(loop)
            assert not watcher.done(), watcher
            watcher.cancel()
            counted = samples(loop.metrics.text(MODEL, num_waiting=0))
        assert counted['request_success_total{finished_reason="length"}'] >= sum(stayed) == 30
        assert counted['request_success_total{finished_reason="abort"}'] > 0
        assert counted['request_success_total{finished_reason="error"}'] == 0

    asyncio.run(test())
