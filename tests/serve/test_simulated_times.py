"""A simulated server is the simulator on another clock: the same arrivals have the same steps, times and counts, bit for bit."""

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("starlette", reason="the server is made of starlette: pip install 'pagedkv[serve]'")
pytest.importorskip("uvicorn", reason="and of uvicorn")
pytest.importorskip("httpx", reason="the tests' client is httpx")

from small_server import VirtualClock, engine, samples

from pagedkv.sims.config import LoadConfig, MeasurementConfig, ServingConfig, SimulationConfig
from pagedkv.sims.deployment import deploy
from pagedkv.sims.records import Outcome
from pagedkv.sims.results import Results, simulate
from pagedkv.sims.scenario import resolve
from pagedkv.sims.serve.serve_loop import Answer, ServeLoop
from pagedkv.sims.serve.served_engine import Ask
from pagedkv.sims.vllm_metrics import metrics_text

REQUESTS, HASH_BLOCK = 70, 512


def trace_lines(seed: int) -> list[dict[str, Any]]:
    """Bursts of prompts of up to 1,500 tokens that share their beginnings; milliseconds, as Mooncake has them."""
    rng = np.random.default_rng(seed)
    at_ms = [0, *np.cumsum(rng.choice([0, 3, 40, 700], size=REQUESTS - 1)).tolist()]
    lines = []
    for number in range(REQUESTS):
        prompt = int(rng.integers(20, 1500))
        text = int(rng.integers(3)) * 10
        shared = [text + block for block in range(-(-prompt // HASH_BLOCK) - 1)]
        hashes = [*shared, 1000 + number]  # the last one is the request's own
        output = int(rng.integers(1, 400))
        lines.append({"timestamp": at_ms[number], "input_length": prompt, "output_length": output, "hash_ids": hashes})
    return lines


def tokens_of(line: dict[str, Any]) -> list[int]:
    """The prompt that a line's hashes stand for: the same hashes up to a block, the same tokens up to its end."""
    ids, before = [], 0
    for each in line["hash_ids"]:
        before = (before * 31 + each + 1) % 1_000_003
        ids += [before * 600 + i for i in range(HASH_BLOCK)]
    return ids[: line["input_length"]]


def serving(**changes: Any) -> dict[str, Any]:
    return {"model": "llama-3.1-8b", "num_gpu_blocks_override": 180, "max_model_len": 2048, "max_num_seqs": 24, **changes}


def simulated(lines: list[dict[str, Any]], folder: Path, **changes: Any) -> Results:
    file = folder / "trace.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    asked = SimulationConfig(
        load=LoadConfig(trace=str(file)),
        serving=ServingConfig(**serving(**changes)),
        measurement=MeasurementConfig(allocator=("paged",)),
    )
    return simulate(resolve(asked))


async def serve_all(lines: list[dict[str, Any]], **changes: Any) -> tuple[list[Answer], ServeLoop]:
    clock = VirtualClock()
    loop, answers = ServeLoop(engine(clock, **serving(**changes)), max_queue=512), []

    async def arrive() -> None:
        for line in lines:
            await clock.sleep_until(line["timestamp"] * 1e-3)
            answers.extend(loop.submit([Ask(prompt=tokens_of(line), max_tokens=line["output_length"])]))

    tasks = [asyncio.create_task(loop.run()), asyncio.create_task(arrive())]
    await clock.run(lambda: len(answers) == len(lines) and all(answer.over for answer in answers))
    await loop.close(0.0)
    await asyncio.gather(*tasks)
    return answers, loop


SETTINGS = [
    {},
    {"enable_prefix_caching": False},
    {"max_num_batched_tokens": 256, "watermark": 0.05},
    {"speculative_method": "ngram", "num_speculative_tokens": 3},
]


@pytest.mark.parametrize("changes", SETTINGS, ids=["caching", "without caching", "small steps", "drafts"])
def test_every_request_has_the_times_that_the_simulator_gives_it(changes: dict[str, Any], tmp_path: Path) -> None:
    lines = trace_lines(seed=len(changes))
    log = simulated(lines, tmp_path, **changes).by_allocator["paged"].runs[0].log
    answers, loop = asyncio.run(serve_all(lines, **changes))
    assert (log.outcome == Outcome.FINISHED).all()
    assert log.num_preemptions.sum() > 0
    for name, times in (("arrived_s", log.arrival_s), ("scheduled_s", log.scheduled_s), ("last_token_s", log.last_token_s)):
        assert [getattr(answer, name) for answer in answers] == times.tolist(), name
    assert [answer.first_token_s for answer in answers] == log.first_token_s.tolist()
    assert [answer.num_tokens for answer in answers] == log.output_tokens.tolist()
    assert [answer.num_cached_tokens for answer in answers] == log.num_cached_tokens.tolist()
    assert bool(log.num_cached_tokens.any()) == changes.get("enable_prefix_caching", True)
    assert loop.engine.scheduler.allocator.free_slots == loop.engine.scheduler.allocator.usable_slots


def test_a_scrape_is_metrics_prom_of_the_same_run(tmp_path: Path) -> None:
    lines = trace_lines(seed=5)
    expected = samples(metrics_text([simulated(lines, tmp_path)]))
    _, loop = asyncio.run(serve_all(lines))
    scraped = samples(loop.metrics.text("llama-3.1-8b", num_waiting=loop.num_waiting))
    assert scraped.keys() == expected.keys()
    state = {"num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"}  # at the last step there, after it here
    for name in scraped.keys() - state:
        if not name.startswith("inter_token_latency_seconds_bucket"):  # there in bins 0.1 % wide
            assert scraped[name] == pytest.approx(expected[name], rel=1e-9), name
    assert expected["num_preemptions_total"] > 0


def test_the_memory_is_the_deployments() -> None:
    small = engine(num_gpu_blocks_override=None)
    pool = deploy(ServingConfig(model="llama-3.1-8b", max_model_len=2048)).pool
    assert small.scheduler.allocator.usable_slots == (pool.num_blocks - 1) * pool.block_size
