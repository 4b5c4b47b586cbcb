"""How long a call takes on a device, and what its memory reaches, both by torch."""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

CALLS = 8
"""Of a sample, at least: it is as many passes over all copies as this takes."""

WAKING_S = 0.5
"""How long a GPU works before anything is measured: one that idled has low clocks."""


def cache_bytes(device: torch.device) -> int:
    """Return how much memory is more than caches remember: 4 times the GPU's L2 cache; 256 MiB on the CPU, where torch knows none.

    A cache that replaces at random still holds a fifth of what was read twice its size ago, of 4 times its size a fiftieth.
    """
    return 4 * int(torch.cuda.get_device_properties(device).L2_cache_size) if device.type == "cuda" else 256 << 20


def wake(device: torch.device) -> None:
    """Keep a GPU busy until its clocks have risen."""
    if device.type == "cuda":
        data, end = torch.ones(1 << 26, device=device), time.perf_counter() + WAKING_S
        while time.perf_counter() < end:
            data.mul_(1.0)
            torch.cuda.synchronize(device)


def measure_bandwidth(device: torch.device, *, num_bytes: int, repeats: int) -> dict[str, float]:
    """Return what torch moves: "copy_bytes_per_s" (read and written) and "read_bytes_per_s" (summed), of `num_bytes` at a time.

    Of two ways to copy the faster one counts: a device may have an engine for copies that is slower than its multiprocessors.
    """
    source, target = (torch.randn(num_bytes // 4, device=device) for _ in range(2))
    parts = source.view(2, -1), target.view(2, -1)
    ways: tuple[Callable[[int], Any], ...] = (
        lambda i: parts[1][i].copy_(parts[0][i]),
        lambda i: torch.mul(parts[0][i], 1.0, out=parts[1][i]),
    )
    copy_s = min(time_s(way, 2, device, repeats=repeats)[0] for way in ways)
    read_s, _ = time_s(lambda i: parts[0][i].sum(), 2, device, repeats=repeats)
    return {"copy_bytes_per_s": num_bytes / copy_s, "read_bytes_per_s": num_bytes / 2 / read_s}


def time_s(run: Callable[[int], Any], copies: int, device: torch.device, *, repeats: int) -> tuple[float, str | None]:
    """Return (median seconds of a call, why no CUDA graph launched it). Calls walk over all copies, once untimed.

    The reason is None on the CPU, where there are no graphs.
    """
    order = list(range(copies)) * (-(-CALLS // copies) if repeats > 1 else 1)
    for copy in range(copies):
        run(copy)
    if device.type != "cuda":
        samples = []
        for _ in range(repeats):
            start = time.perf_counter()
            for copy in order:
                run(copy)
            samples.append((time.perf_counter() - start) / len(order))
        return statistics.median(samples), None
    torch.cuda.synchronize()
    graph, no_graph = captured(run, order)
    samples, event = [], partial(torch.cuda.Event, enable_timing=True)
    for _ in range(repeats):
        start_event, end_event = event(), event()
        start_event.record()
        if graph is None:
            for copy in order:
                run(copy)
        else:
            graph.replay()
        end_event.record()
        torch.cuda.synchronize()
        samples.append(start_event.elapsed_time(end_event) / 1e3 / len(order))
    return statistics.median(samples), no_graph


def captured(run: Callable[[int], Any], order: list[int]) -> tuple[Any, str | None]:
    """Return (the calls as a CUDA graph, which launches without Python between, None), or (None, why they cannot be captured)."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            for copy in order:
                run(copy)
        graph.replay()
        torch.cuda.synchronize()
    except Exception as failure:  # whatever a kernel does that a graph forbids: it is launched one by one then, and this is told
        torch.cuda.set_stream(stream)  # a capture that fails leaves its own stream behind, where events would time nothing
        torch.cuda.synchronize()
        return None, told(failure)
    return graph, None


def told(failure: BaseException) -> str:
    """Return the first line of what an exception says, behind its type."""
    return f"{type(failure).__name__}: {next(iter(str(failure).strip().splitlines()), '')}"
