"""`pagedkv fuzz`: random operations on allocators, each held to its laws, reproducible from the seed."""

import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

from pagedkv.allocation import KVPoolSettings
from pagedkv.allocators import ALLOCATORS
from pagedkv.errors import ConfigError
from pagedkv.fuzz_owner import Choose, FuzzCounts
from pagedkv.fuzzing import FuzzFailure, fuzz, fuzz_settings

ALL = "all"
"""Stands for every registered allocator."""
_CHECK_EVERY = 251


@dataclass(frozen=True, slots=True, kw_only=True)
class FuzzResult:
    """What came of one allocator with one pool."""

    allocator: str
    """Its registered name."""
    settings: KVPoolSettings
    """Its pool."""
    seed: str
    """What `choose_from` takes to do the same again."""
    ops: int
    """Operations done, the one that failed included."""
    counts: FuzzCounts
    """What they were; zeros if one failed."""
    failure: str
    """What went wrong and how to see it again; empty if nothing did."""
    elapsed_s: float
    """Wall time: the only part that is not the same for the same seed."""

    def document(self) -> dict[str, object]:
        """Return it as plain values, without the time that it took."""
        plain = asdict(self)
        del plain["elapsed_s"]
        return plain


def choose_from(seed: int | str) -> Choose:
    """Return a source of choices for the fuzzer: choose(n) is one of 0 to n - 1."""
    draw = random.Random(seed).random
    return lambda n: int(draw() * n)


def run_fuzz(
    allocators: tuple[str, ...] = (ALL,),
    ops: int = 100_000,
    seed: int = 0,
    *,
    progress: Callable[[str, float], None] = lambda what, share: None,
) -> list[FuzzResult]:
    """Fuzz allocators one after the other; a failure ends the run of its pool only, and is traced to the operation that caused it.

    Args:
        allocators: Registered names, or `ALL`.
        ops: Operations for each allocator, divided among its pools (`pagedkv.fuzzing.fuzz_settings`).
        seed: Same seed, same operations.
        progress: Is told what is being fuzzed, and the share of all operations that is done.

    Returns:
        One result per allocator and pool. Whoever calls decides what a failure means.

    Raises:
        ConfigError: If there is no such allocator, or no operation to do.
    """
    if ops < 1:
        raise ConfigError(f"{ops} operations: needs 1 or more")
    names = tuple(dict.fromkeys(name for given in allocators for name in (ALLOCATORS.names() if given == ALL else (given,))))
    runs = []
    for name in names:
        pools = fuzz_settings(name)[:ops]
        shares = [ops // len(pools) + (i < ops % len(pools)) for i in range(len(pools))]
        runs += [(name, pool, f"{seed}/{name}/{i}", share) for i, (pool, share) in enumerate(zip(pools, shares, strict=True))]
    results: list[FuzzResult] = []
    done = 0
    for name, pool, run_seed, share in runs:

        def tell(operations: int, name: str = name, before: int = done) -> None:
            progress(name, (before + operations) / (ops * len(names)))

        results.append(_run(name, pool, run_seed, share, tell))
        done += share
    return results


def _run(name: str, pool: KVPoolSettings, seed: str, ops: int, progress: Callable[[int], None]) -> FuzzResult:
    counts, failure, start_s = FuzzCounts(), "", time.perf_counter()
    try:
        counts = fuzz(name, pool, choose_from(seed), ops=ops, seed=seed, check_every=_CHECK_EVERY, progress=progress)
    except FuzzFailure as error:
        first = _earliest(error)
        failure, ops = str(first), first.operation + 1
    return FuzzResult(
        allocator=name,
        settings=pool,
        seed=seed,
        ops=ops,
        counts=counts,
        failure=failure,
        elapsed_s=time.perf_counter() - start_s,
    )


def _earliest(failure: FuzzFailure) -> FuzzFailure:
    """Return the failure as all checks see it in the operations since the last full check, which found nothing."""
    try:
        fuzz(
            failure.allocator,
            failure.settings,
            choose_from(failure.seed),
            ops=failure.operation + 1,
            seed=failure.seed,
            check_every=_CHECK_EVERY,
            check_all_from=failure.operation - _CHECK_EVERY,
        )
    except FuzzFailure as first:
        return first
    return failure
