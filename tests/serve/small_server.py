"""A simulated server small enough for tests, in time that passes by itself or at once."""

import asyncio
import heapq
import itertools
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx

from pagedkv.sims.config import ServingConfig
from pagedkv.sims.deployment import deploy
from pagedkv.sims.serve.app import ServeApp
from pagedkv.sims.serve.serve_loop import ServeLoop
from pagedkv.sims.serve.server import Server, bound_socket
from pagedkv.sims.serve.simulated import SimulatedEngine
from pagedkv.sims.serve.wall_clock import ServeClock, WallClock

MODEL = "llama-3.1-8b"
FAST = 1000.0
"""So fast that a test spends no time waiting."""


class VirtualClock:
    """Time that jumps to the next moment somebody waits for, once nobody has anything to do."""

    def __init__(self) -> None:
        self._now_s = 0.0
        self._sleepers: list[tuple[float, int, asyncio.Future[None]]] = []
        self._number = itertools.count()

    def now(self) -> float:
        return self._now_s

    async def sleep_until(self, at_s: float) -> None:
        waiting: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._sleepers, (max(at_s, self._now_s), next(self._number), waiting))
        await waiting

    async def run(self, done: Callable[[], bool]) -> None:
        while True:
            for _ in range(20):  # more turns than any chain of wake-ups has links
                await asyncio.sleep(0)
            if done():
                return
            self._now_s, _, waiting = heapq.heappop(self._sleepers)
            waiting.set_result(None)


def engine(clock: ServeClock | None = None, *, draws_all: bool = False, drawn: int = 30, **serving: Any) -> SimulatedEngine:
    asked = ServingConfig(**{"model": MODEL, "num_gpu_blocks_override": 400, "max_model_len": 2048, **serving})
    return SimulatedEngine(deploy(asked), clock or WallClock(FAST), drawn_lengths=itertools.repeat(drawn), draws_all=draws_all)


class Served:
    """A loop, and a client of the application around it, without a network."""

    def __init__(self, loop: ServeLoop, client: httpx.AsyncClient) -> None:
        self.loop, self.client = loop, client

    async def post(self, path: str, **body: Any) -> httpx.Response:
        return await self.client.post(f"/v1/{path}", json=body)

    def is_empty(self) -> bool:
        if not self.loop.is_idle:
            return False
        scheduler = self.loop.engine.scheduler
        scheduler.check_integrity()
        nobody = scheduler.num_running == scheduler.num_waiting == self.loop.num_unfinished == 0
        return nobody and scheduler.allocator.free_slots == scheduler.allocator.usable_slots

    async def until(self, true: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not true():
                await asyncio.sleep(0.001)


@asynccontextmanager
async def served(of: Any = None, *, max_queue: int = 512, max_body_bytes: int = 1 << 20) -> AsyncIterator[Served]:
    loop = ServeLoop(of or engine(), max_queue=max_queue)
    app = ServeApp(loop, model_name=MODEL, created=0, max_body_bytes=max_body_bytes).asgi()
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=30) as client:
            yield Served(loop, client)


def samples(text: str) -> dict[str, float]:
    """The samples of a scrape by name, with those labels that tell samples of one metric apart."""
    found = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            name, inside, value = re.fullmatch(r"([a-z0-9_:]+)\{(.*)\} (\S+)", line).groups()  # type: ignore[union-attr]
            kept = re.findall(r'(?:le|finished_reason)="[^"]*"', inside)
            found[name.removeprefix("vllm:") + ("{" + ",".join(kept) + "}" if kept else "")] = float(value)
    return found


@asynccontextmanager
async def listening(of: Any = None, *, max_queue: int = 512) -> AsyncIterator[tuple[ServeLoop, str]]:
    """A loop behind uvicorn on the loopback device, and its address."""
    loop, address = ServeLoop(of or engine(), max_queue=max_queue), asyncio.get_running_loop().create_future()
    app = ServeApp(loop, model_name=MODEL, created=0, max_body_bytes=1 << 20).asgi()
    server = Server(app, loop, grace_s=0.0, told=address.set_result)
    task = asyncio.create_task(server.serve([bound_socket("127.0.0.1", 0)]))
    try:
        yield loop, await asyncio.wait_for(address, 30)
    finally:
        server.end()
        await task


LONG_PROMPT = [(13 * i) % 250 for i in range(90)]
"""22 blocks of 4, and half of one."""


class Watched:
    """A model whose every step is looked at: everything is in order, and what is held is noted."""

    def __init__(self, model: Any) -> None:
        self.model, self.most_blocks, self._step = model, 0, model.step
        self.num_texts: list[int] = []
        model.step = self.step

    def step(self) -> Any:
        self.num_texts.append(self.model.num_unfinished)
        new = self._step()
        self.model.scheduler.check_integrity()
        self.most_blocks = max(self.most_blocks, blocks_held(self.model))
        return new


def blocks_held(of: Any) -> int:
    """Blocks that somebody holds."""
    allocator = of.scheduler.allocator
    return int((allocator.usable_slots - allocator.free_slots) // allocator.unit_slots)
