"""How fast the allocator is: `python -m pagedkv.sims.bench_allocator`. Prints medians, and ratios to a pool in plain Python.

Through the public API, checks for double free and shortage on, an aged (shuffled) pool. Both pools run in the same process.
"""

import argparse
import hashlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from pagedkv.allocation import KVPoolSettings
from pagedkv.arrays import Int32Array
from pagedkv.block_hash import BlockHashChain
from pagedkv.block_pool import BlockPool
from pagedkv.paged_steps import PagedStepAllocator
from pagedkv.scheduling.scheduler import Scheduler
from pagedkv.scheduling.scheduler_settings import SchedulerSettings
from pagedkv.sims.python_pool import PythonBlockPool
from pagedkv.step_batch import empty_batch

BLOCK_SIZE, PROMPT, OUTPUT, BATCH = 16, 1000, 256, 64
_LIVES = 21


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One line: seconds per unit, ours and the plain pool's."""

    name: str
    unit: str
    scale: float
    ours_s: float
    python_s: float | None = None
    vllm: str = ""
    """What vLLM's own allocator in Python needed on two such cores, measured apart from this run."""


def median_s(call: Callable[[], Any], *, per: int = 1, repeats: int = 101, inner: int = 20) -> float:
    """Return the median seconds of one `per`-th of `call`."""
    call()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(inner):
            call()
        seconds.append((time.perf_counter() - start) / inner / per)
    return statistics.median(seconds)


def aged(pool: Any, num_blocks: int, rng: np.random.Generator, keys: Any = None) -> Any:
    """Take all blocks of `pool`, and give them back in random order; with `keys` they carry one each."""
    taken = pool.get_new_blocks(num_blocks)
    order = rng.permutation(num_blocks)
    shuffled = taken[order] if isinstance(taken, np.ndarray) else [taken[i] for i in order]
    if keys is not None:
        pool.cache_full_blocks(shuffled, keys)
    for i in range(0, num_blocks, 64):
        pool.free_blocks(shuffled[i : i + 64])
    return pool


def pools(num_blocks: int, *, caching: bool) -> tuple[BlockPool, PythonBlockPool]:
    """Return an aged pool of each kind."""
    ours = aged(BlockPool(num_blocks=num_blocks + 1, enable_caching=caching), num_blocks, np.random.default_rng(0))
    plain = aged(PythonBlockPool(num_blocks=num_blocks + 1, enable_caching=caching), num_blocks, np.random.default_rng(0))
    return ours, plain


def _cycle(pool: Any, batch: int) -> Callable[[], None]:
    def take_and_give_back() -> None:
        pool.free_blocks(pool.get_new_blocks(batch))

    return take_and_give_back


def take_and_give(num_blocks: int) -> Iterator[Measurement]:
    """Blocks taken and given back, by batch, without caching and with."""
    vllm = {(False, 63): "210 ns", (False, 1024): "195 ns", (True, 63): "402 ns", (True, 1024): "374 ns"}
    for caching in (False, True):
        ours, plain = pools(num_blocks, caching=caching)
        for batch in (63, 1024):
            yield Measurement(
                name=f"take and give back, {batch} blocks, caching {'on' if caching else 'off'}",
                unit="ns/block",
                scale=1e9,
                ours_s=median_s(_cycle(ours, batch), per=batch),
                python_s=median_s(_cycle(plain, batch), per=batch, inner=3),
                vllm=vllm[caching, batch],
            )


def take_key_and_give(num_blocks: int) -> Iterator[Measurement]:
    """The same where every block gets a key, and loses it when it is handed out again: eviction at work."""
    rng = np.random.default_rng(1)
    keys = rng.integers(0, 2**63, (2 * num_blocks, 2)).astype(np.uint64)
    digests = [row.tobytes() for row in keys]
    ours, plain = pools(num_blocks, caching=True)
    aged(ours, num_blocks, rng, keys[:num_blocks])
    aged(plain, num_blocks, rng, digests[:num_blocks])
    for batch in (63, 1024):
        yield Measurement(
            name=f"take, evict, key and give back, {batch} blocks",
            unit="ns/block",
            scale=1e9,
            ours_s=median_s(_keyed_cycle(ours, keys, batch), per=batch),
            python_s=median_s(_keyed_cycle(plain, digests, batch), per=batch, inner=3),
        )


def _keyed_cycle(pool: Any, keys: Any, batch: int) -> Callable[[], None]:
    place = 0

    def take_key_and_give_back() -> None:
        nonlocal place
        table = pool.get_new_blocks(batch)
        pool.cache_full_blocks(table, keys[place : place + batch])
        pool.free_blocks(table)
        place = (place + batch) % (len(keys) - batch)

    return take_key_and_give_back


def prefix(num_blocks: int) -> Iterator[Measurement]:
    """A cached prefix of 31 blocks: found and revived."""
    rng = np.random.default_rng(2)
    keys = rng.integers(0, 2**63, (num_blocks, 2)).astype(np.uint64)
    digests = [row.tobytes() for row in keys]
    ours, plain = pools(num_blocks, caching=True)
    aged(ours, num_blocks, rng, keys)
    aged(plain, num_blocks, rng, digests)
    wanted, wanted_digests = keys[:31], digests[:31]
    held: list[Any] = []

    def timed(call: Callable[[], Any]) -> float:
        start = time.perf_counter()
        held.append(call())
        return time.perf_counter() - start

    def median_of_hits(pool: Any, keys: Any) -> float:
        seconds = []
        for _ in range(501):
            seconds.append(timed(lambda: pool.hold_prefix(keys)))
            pool.free_blocks(held.pop())
        return statistics.median(seconds)

    yield Measurement(
        name="a prefix of 31 blocks found and revived",
        unit="µs",
        scale=1e6,
        ours_s=median_of_hits(ours, wanted),
        python_s=median_of_hits(plain, wanted_digests),
        vllm="29 µs",
    )


def hashing() -> Iterator[Measurement]:
    """1,000 token ids to keys."""
    tokens = np.random.default_rng(3).integers(0, 128_000, PROMPT).astype(np.int32)

    def plain() -> None:
        parent, listed = b"", tokens.tolist()
        for i in range(0, PROMPT // BLOCK_SIZE * BLOCK_SIZE, BLOCK_SIZE):
            parent = hashlib.sha256(repr((parent, tuple(listed[i : i + BLOCK_SIZE]))).encode()).digest()

    python_s = median_s(plain, inner=3)
    for algorithm in ("siphash", "blake2b"):
        yield Measurement(
            name=f"1,000 token ids hashed, {algorithm}",
            unit="µs",
            scale=1e6,
            ours_s=median_s(_hashed(tokens, algorithm)),
            python_s=python_s,
            vllm="122 µs",
        )


def _hashed(tokens: Int32Array, algorithm: Any) -> Callable[[], None]:
    def hash_all() -> None:
        BlockHashChain(block_size=BLOCK_SIZE, hash_algorithm=algorithm).extend(tokens)

    return hash_all


def batches(num_blocks: int) -> Iterator[Measurement]:
    """Decode steps and whole lives of a batch of 64 requests."""
    allocator = PagedStepAllocator(
        KVPoolSettings(num_blocks=num_blocks + 1, block_size=BLOCK_SIZE, max_num_seqs=BATCH, max_model_len=PROMPT + OUTPUT)
    )
    aged(allocator.pool, num_blocks, np.random.default_rng(4))
    batch = empty_batch(BATCH)
    batch["row"] = range(BATCH)
    steps: list[float] = []

    def life() -> None:
        batch["num_slots_needed"] = batch["num_known_tokens"] = PROMPT
        allocator.allocate_slots(batch, 0, BATCH, 0)
        start = time.perf_counter()
        for _ in range(OUTPUT):
            allocator.append_slots(batch, BATCH)
        steps.append((time.perf_counter() - start) / OUTPUT / BATCH)
        for row in range(BATCH):
            allocator.free(row)

    life_s = median_s(life, per=BATCH, inner=1, repeats=21)
    yield Measurement(
        name="decode append, batch of 64, caching off", unit="ns/token", scale=1e9, ours_s=statistics.median(steps), vllm="4,600 ns"
    )
    yield Measurement(name="life of a 1,000 + 256-token request, caching off", unit="µs", scale=1e6, ours_s=life_s, vllm="1,320 µs")


def cached_life(num_blocks: int) -> Iterator[Measurement]:
    """Whole lives with prefix caching: hashed, looked up, scheduled step by step, registered, freed; other blocks are evicted.

    Of a scheduler that serves one batch after another, by the calls that an engine makes: add, then schedule and complete a step.
    """
    longest = PROMPT + OUTPUT
    pool = KVPoolSettings(num_blocks=num_blocks + 1, max_num_seqs=BATCH, max_model_len=longest, enable_prefix_caching=True)
    limits = SchedulerSettings(max_num_seqs=BATCH, max_num_batched_tokens=BATCH * PROMPT, max_model_len=longest)
    allocator = PagedStepAllocator(pool)
    rng = np.random.default_rng(6)
    aged(allocator.pool, num_blocks, rng, rng.integers(0, 2**63, (num_blocks, 2)).astype(np.uint64))

    scheduler = Scheduler(limits, allocator)
    texts = iter(rng.integers(0, 128_000, (_LIVES + 1, BATCH, PROMPT + OUTPUT), np.int32))

    def life() -> None:
        for tokens in next(texts):
            chain = BlockHashChain(block_size=BLOCK_SIZE, hash_algorithm="siphash")
            chain.extend(tokens)
            scheduler.add(prompt_tokens=PROMPT, output_tokens=OUTPUT, keys=chain.keys)
        while scheduler.num_waiting + scheduler.num_running:
            scheduler.schedule()
            scheduler.complete()

    yield Measurement(
        name="the same, caching on, hashing and scheduling included",
        unit="µs",
        scale=1e6,
        ours_s=median_s(life, per=BATCH, inner=1, repeats=_LIVES),
        vllm="1,710 µs",
    )


def by_size() -> Iterator[Measurement]:
    """The cost of a block by the size of the pool."""
    for num_blocks in (1_000, 10_000, 100_000, 1_000_000, 10_000_000):
        pool = aged(BlockPool(num_blocks=num_blocks + 1), num_blocks, np.random.default_rng(5))
        yield Measurement(
            name=f"take and give back 256 blocks of {num_blocks:,}",
            unit="ns/block",
            scale=1e9,
            ours_s=median_s(_cycle(pool, 256), per=256),
        )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--blocks", type=int, default=65_536)
    options = parser.parse_args()
    print(f"{'':62}{'pagedkv':>10}{'plain Python':>16}{'ratio':>8}   vLLM")  # noqa: T201
    for measurements in (
        take_and_give(options.blocks),
        take_key_and_give(options.blocks),
        prefix(options.blocks),
        hashing(),
        batches(options.blocks),
        cached_life(options.blocks),
        by_size(),
    ):
        for m in measurements:
            plain, ratio = "", ""
            if m.python_s is not None:
                plain, ratio = f"{m.python_s * m.scale:,.1f}", f"{m.python_s / m.ours_s:,.1f} ×"
            print(f"{m.name:52}{m.unit:>10}{m.ours_s * m.scale:10,.1f}{plain:>16}{ratio:>8}   {m.vllm}")  # noqa: T201
    pool = BlockPool(num_blocks=options.blocks, enable_caching=True)
    print(f"bookkeeping with caching: {pool.num_bytes / pool.num_blocks:.1f} bytes per block")  # noqa: T201


if __name__ == "__main__":
    main()
