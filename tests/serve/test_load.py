"""Many clients at once, patient and not: nothing is lost, and nothing stays behind."""

import asyncio
import gc
import random

import pytest

pytest.importorskip("starlette", reason="the server is made of starlette: pip install 'pagedkv[serve]'")
pytest.importorskip("uvicorn", reason="and of uvicorn")
pytest.importorskip("httpx", reason="what these tests share has a client of httpx")

from client_load import resident_bytes, run_load, scraped, stream
from small_server import MODEL, engine, listening, samples

from pagedkv.sims.serve.serve_loop import Answer, ServeLoop

CLIENTS = 200


async def settled(loop: ServeLoop) -> None:
    async with asyncio.timeout(30):
        while not loop.is_idle:
            await asyncio.sleep(0.01)
    scheduler = loop.engine.scheduler
    scheduler.check_integrity()
    assert scheduler.num_running == scheduler.num_waiting == 0
    assert scheduler.allocator.free_slots == scheduler.allocator.usable_slots


async def most_at_once(loop: ServeLoop) -> int:
    """Watch until nobody is left, and return how many there were at most."""
    most = 0
    while loop.num_unfinished or not most:
        most = max(most, loop.num_unfinished)
        await asyncio.sleep(0.01)
    return most


def test_two_hundred_streams_at_once_lose_nothing_and_leave_nothing() -> None:
    async def test() -> None:
        crowded = engine(num_gpu_blocks_override=400, max_num_seqs=128)
        async with listening(crowded) as (loop, url):

            async def user(number: int, rounds: int) -> int:
                rng = random.Random(number)
                return sum([await stream(url, rng) for _ in range(rounds)])

            tokens = sum(await asyncio.gather(*(user(number, 1) for number in range(CLIENTS))))
            await settled(loop)
            gc.collect()
            before_bytes, before_tasks = resident_bytes(), len(asyncio.all_tasks())
            peak = asyncio.create_task(most_at_once(loop))
            tokens += sum(await asyncio.gather(*(user(number, 2) for number in range(CLIENTS))))
            await settled(loop)
            assert await peak > CLIENTS // 2
            gc.collect()
            assert not [each for each in gc.get_objects() if type(each) is Answer]
            assert len(asyncio.all_tasks()) <= before_tasks
            assert resident_bytes() - before_bytes < 32 << 20  # of 400 answers: a connection or a text that stayed would be more
            counted = samples(loop.metrics.text(MODEL, num_waiting=loop.num_waiting))
        assert counted["generation_tokens_total"] == tokens
        assert counted['request_success_total{finished_reason="length"}'] == 3 * CLIENTS
        assert counted["num_preemptions_total"] > 0
        assert counted["prefix_cache_hits_total"] > 0
        assert counted["num_requests_running"] == counted["num_requests_waiting"] == counted["kv_cache_usage_perc"] == 0

    asyncio.run(test())


def test_clients_that_are_killed_at_random_leave_a_sound_server() -> None:
    async def test() -> None:
        crowded = engine(num_gpu_blocks_override=200, max_num_seqs=32)
        async with listening(crowded) as (loop, url):

            async def user(number: int) -> bool:
                rng = random.Random(number)
                if number % 3 == 0:
                    await stream(url, rng)
                    return True
                task = asyncio.create_task(stream(url, rng, leave_after=rng.randrange(1, 60)))
                if number % 3 == 1:
                    await asyncio.sleep(rng.random())
                    task.cancel()  # its socket is closed when it is collected
                await asyncio.gather(task, return_exceptions=True)
                return False

            async def look() -> None:
                while True:
                    await asyncio.sleep(0.02)
                    loop.engine.scheduler.check_integrity()

            watcher = asyncio.create_task(look())
            stayed = await asyncio.gather(*(user(number) for number in range(150)))
            gc.collect()
            await settled(loop)
            assert not watcher.done(), watcher
            watcher.cancel()
            counted = samples(loop.metrics.text(MODEL, num_waiting=0))
        assert counted['request_success_total{finished_reason="length"}'] >= sum(stayed) == 50
        assert counted['request_success_total{finished_reason="abort"}'] > 10
        assert counted['request_success_total{finished_reason="error"}'] == 0

    asyncio.run(test())


def test_who_leaves_in_the_middle_of_a_body_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    async def test() -> None:
        async with listening() as (loop, url):
            host, port = url.removeprefix("http://").split(":")
            for sent in (b"", b'{"prompt": [1', b"{" * 500):
                _, writer = await asyncio.open_connection(host, int(port))
                writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n" + sent)
                await writer.drain()
                await asyncio.sleep(0.05)
                writer.transport.abort()
            await stream(url, random.Random(0))
            await settled(loop)

    asyncio.run(test())
    assert capsys.readouterr().err == ""


def test_requests_that_are_done_are_forgotten_while_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pagedkv.sims.serve.serve_loop.FORGET_AT", 8)

    async def test() -> None:
        async with listening(engine(num_gpu_blocks_override=200)) as (loop, url):

            async def user(number: int) -> None:
                rng = random.Random(number)
                for _ in range(4):
                    await stream(url, rng, leave_after=rng.choice([None, None, 20]))

            await asyncio.gather(*map(user, range(40)))
            await settled(loop)
            assert loop.engine.scheduler.requests.size < 100

    asyncio.run(test())


def test_requests_for_several_answers_lose_nothing_either() -> None:
    async def test() -> None:
        async with listening(engine(num_gpu_blocks_override=200, max_num_seqs=32)) as (loop, url):
            load = await run_load(url, seconds=0.2, clients=20, most_answers=4, output=(20, 60))
            await settled(loop)
            assert load.failures == []
            assert load.answers >= 18
            assert load.num_left >= 2
            assert len(load.gaps_s) > load.answers
            assert (await scraped(url))["kv_cache_usage_perc"] == 0

    asyncio.run(test())
