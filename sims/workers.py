"""Runs on all cores: processes that take configurations and send back results, and that end when their parent does."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

from pagedkv.errors import ConfigError
from pagedkv.sims.config import SimulationConfig


def outcome(config: SimulationConfig) -> dict[str, Any]:
    """Run `config`, which has one allocator; return {"result": entry of the result document} or {"error": why it cannot run}."""
    from pagedkv.sims.results import simulate  # noqa: PLC0415 (a sweep that is already done needs no simulator)
    from pagedkv.sims.scenario import resolve  # noqa: PLC0415

    try:
        document = simulate(resolve(config)).document()
    except ConfigError as error:
        return {"error": str(error)}
    return {"num_blocks": document["budget"]["num_blocks"], "result": document["results"][0]}


def outcomes(configs: Sequence[SimulationConfig], *, workers: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (index, outcome) of every configuration as they finish, on up to `workers` processes; on none if that is 1.

    Raises:
        ConfigError: If a worker is killed, as by a machine without memory.
    """
    workers = min(workers, len(configs))
    if workers <= 1:
        yield from ((i, outcome(config)) for i, config in enumerate(configs))
        return
    context = multiprocessing.get_context("spawn")
    at_work: dict[Connection, int] = {}
    processes = []
    todo = iter(range(len(configs)))
    try:
        with _interrupts_ignored():  # Ctrl-C goes to all processes of the terminal: children leave it to the parent
            for _ in range(workers):
                mine, theirs = context.Pipe()
                process = context.Process(target=_work, args=(theirs,), daemon=True)
                process.start()
                theirs.close()  # the worker's end closes with the worker
                processes.append(process)
                at_work[mine] = -1
        for connection in at_work:
            at_work[connection] = _next(connection, todo, configs)
        while busy := [connection for connection, i in at_work.items() if i >= 0]:
            for ready in wait(busy):
                assert isinstance(ready, Connection)
                done = at_work[ready]
                try:
                    result = ready.recv()
                    at_work[ready] = _next(ready, todo, configs)
                except (EOFError, OSError) as error:
                    raise ConfigError(
                        "a worker process was killed, perhaps for want of memory; finished runs are kept: repeat the command with "
                        f"fewer than --workers {workers}"
                    ) from error
                yield done, result
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()
        for connection in at_work:
            connection.close()


def _next(connection: Connection, todo: Iterator[int], configs: Sequence[SimulationConfig]) -> int:
    """Send the next configuration; return its index, −1 if there is none left."""
    i = next(todo, -1)
    if i >= 0:
        connection.send(configs[i])
    return i


def _work(connection: Connection) -> None:
    """Serve until the parent closes its end, or is gone: then reading or writing fails."""
    with suppress(EOFError, OSError):
        while True:
            connection.send(outcome(connection.recv()))


class _interrupts_ignored:  # noqa: N801 (reads as a statement)
    """Children started within ignore SIGINT. Only the main thread may say so; others start them as they are."""

    def __enter__(self) -> None:
        main = threading.current_thread() is threading.main_thread()
        self._before = signal.signal(signal.SIGINT, signal.SIG_IGN) if main else None

    def __exit__(self, *error: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)


def all_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
