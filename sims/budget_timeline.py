"""The memory timeline of a deployment: flags read, the timeline built, and what every view says of it."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pagedkv.catalogue import known_model, load_model
from pagedkv.errors import ConfigError
from pagedkv.guest_memory import least_held_bytes
from pagedkv.memory_request import MemoryRequest
from pagedkv.memory_timeline import MemoryPhase, MemoryTimeline, Moment
from pagedkv.start_timeline import memory_timeline
from pagedkv.start_up import Guest, StartOptions, disk_read_s
from pagedkv.timeline_advice import StartAdvice, advise_start
from pagedkv.units import MIB, gib, parse_bytes

STACK = {
    "OS, programs": ("os_reserve", "other_programs"),
    "engine, weights": ("engine_overhead", "weights", "activations", "cuda_graphs"),
    "KV cache": ("kv_cache",),
    "comes and goes": ("guests", "host_tier", "loading", "compilers"),
    "page cache": ("page_cache",),
}
"""Parts of a moment as views stack them; what is left is free."""
PREFIX_TOKENS = 2048
"""Of the example of a prefix that comes back from disk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TimelineFlags:
    """What the flags of `simulate budget --timeline` say; sizes as text, such as "12GiB"."""

    comes_and_goes: tuple[str, ...] = ()
    """Who comes for a while: a model or a size, with @loading or @serving."""
    warm_caches: bool = False
    """Nothing is compiled."""
    compile_jobs: int | None = None
    """Processes of nvcc at once."""
    direct_io: bool = False
    """Weights are read past the page cache."""
    drop_caches: bool = False
    """Something drops page caches while weights are loaded."""
    cache_ram: str | None = None
    """What llama-server may keep of old prompts."""
    kv_offloading_size: str | None = None
    """A tier of KV blocks in the processor's memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetTimeline:
    """A timeline, with what to do about it."""

    timeline: MemoryTimeline
    """What was asked for."""
    advice: StartAdvice | None
    """What would make it go well; None: it goes well, or nothing that is known helps."""


def budget_timeline(request: MemoryRequest, flags: TimelineFlags = TimelineFlags()) -> BudgetTimeline:
    """Return the timeline that `flags` ask for.

    Raises:
        ConfigError: As `memory_timeline`; or for a flag that cannot be read.
    """
    request.check()
    timeline = memory_timeline(request, start_options(request, flags))
    return BudgetTimeline(timeline=timeline, advice=advise_start(timeline))


def start_options(request: MemoryRequest, flags: TimelineFlags) -> StartOptions:
    """Return what `flags` say of a start.

    Raises:
        ConfigError: If one cannot be read, with how it is written.
    """
    cache, tier = flags.cache_ram, flags.kv_offloading_size
    return StartOptions(
        direct_io=flags.direct_io,
        drops_caches=flags.drop_caches,
        warm_compile_caches=flags.warm_caches,
        compile_jobs=flags.compile_jobs,
        host_cache_bytes=None if cache is None else parse_bytes(cache, name="--cache-ram"),
        host_tier_bytes=0 if tier is None else parse_bytes(tier, name="--kv-offloading-size"),
        guests=tuple(_guest(request, text) for text in flags.comes_and_goes),
    )


def _guest(request: MemoryRequest, text: str) -> Guest:
    what, _, when = text.rpartition("@") if text.endswith(("@loading", "@serving")) else (text, "", "serving")
    if known_model(what) or Path(what).exists():
        model = load_model(what)
        return Guest(name=model.title, num_bytes=least_held_bytes(request, model), during=when)  # type: ignore[arg-type]
    try:
        size = parse_bytes(what, name="--comes-and-goes")
    except ConfigError:
        raise ConfigError(
            f"--comes-and-goes {text}: {what!r} is neither a model (simulate models) nor a size such as 12GiB; write e.g. "
            "qwen3-8b, 12GiB or 12GiB@loading (from the engine's start until its KV cache has its size; else while it serves)"
        ) from None
    return Guest(name=gib(size), num_bytes=size, during=when)  # type: ignore[arg-type]


def troubles(timeline: MemoryTimeline) -> list[MemoryPhase]:
    """Return the phases of which something is to be said, in order; of neighbours in the same trouble the one in the deepest."""
    found: list[MemoryPhase] = []
    before = "ok"
    for phase in timeline.phases:
        if phase.verdict.kind == before != "ok" and phase.worst.mem_available <= found[-1].worst.mem_available:
            found[-1] = phase
        elif phase.verdict.kind not in ("ok", before):
            found.append(phase)
        before = phase.verdict.kind
    return found


def headline(timeline: MemoryTimeline) -> str:
    """Return the verdict in a sentence."""
    worst, tightest = timeline.worst, timeline.tightest
    available = tightest.worst.mem_available
    least = f" The least available is {gib(available)}: {tightest.title}." if available >= 0 and timeline.budget is not None else ""
    words = {
        "ok": "Nothing goes wrong.",
        "crowded": "Loading depends on Linux giving page cache back in time.",
        "starved": "The KV cache may come out smaller than planned.",
        "dangerous": "The host may freeze.",
        "out_of_memory": "The host freezes." if timeline.request.hardware.unified else "Out of memory.",
        "refused": "The engine refuses to start.",
    }
    first = "With nothing compiled before, " if worst.worst.parts["compilers"] and worst.verdict.kind != "ok" else ""
    text = words[worst.verdict.kind]
    return (first + text[0].lower() + text[1:] if first else text) + least


def nvme_note(timeline: MemoryTimeline, compute_s: float) -> str | None:
    """Return how the disk would do as a second tier, beside computing a prefix in `compute_s`; None if nobody knows it."""
    request, hardware = timeline.request, timeline.request.hardware
    rate, latency = hardware.disk_read_bandwidth, hardware.disk_read_latency
    size = PREFIX_TOKENS * request.kv_bytes_per_token
    seconds = disk_read_s(hardware, size)
    if seconds is None or rate is None or latency is None:
        return None
    return (
        f"A second tier is the NVMe alone: the KV of {PREFIX_TOKENS:,} tokens ({size / MIB:,.0f} MiB) comes back in "
        f"{1e3 * seconds:,.0f} ms ({rate.value / 1e9:g} GB/s, {1e3 * latency.value:.1f} ms of latency); computing it takes "
        f"{1e3 * compute_s:,.0f} ms. With it: simulate --offload-size 200GiB."
    )


def with_note(answer: BudgetTimeline, note: str | None) -> BudgetTimeline:
    """Return `answer` with one note more."""
    if note is None:
        return answer
    return replace(answer, timeline=replace(answer.timeline, notes=(*answer.timeline.notes, note)))


def document(answer: BudgetTimeline) -> dict[str, Any]:
    """Return the timeline for a program to read; sizes in bytes."""
    timeline, advice = answer.timeline, answer.advice
    block_bytes = timeline.request.block_bytes
    return {
        "visible": timeline.request.hardware.visible_bytes,
        "memory_kind": timeline.request.hardware.memory_kind,
        "memory_floor": int(timeline.request.hardware.memory_floor.value),
        "verdict": timeline.worst.verdict.kind,
        "worst_phase": timeline.worst.name,
        "least_available_phase": timeline.tightest.name,
        "least_available": timeline.tightest.worst.mem_available,
        "num_blocks": None if timeline.budget is None else timeline.budget.num_blocks,
        "least_blocks": timeline.least_blocks,
        "least_kv_cache": None if timeline.least_blocks is None else timeline.least_blocks * block_bytes,
        "phases": [
            {
                "name": phase.name,
                "title": phase.title,
                "at_least_s": phase.seconds,
                "verdict": phase.verdict.kind,
                "text": phase.verdict.text,
                "worst": _moment(phase.worst),
                "end": _moment(phase.end),
            }
            for phase in timeline.phases
        ],
        "avoid": None if advice is None else {"settings": list(advice.settings), "verdict": advice.timeline.worst.verdict.kind},
        "notes": list(timeline.notes),
    }


def _moment(moment: Moment) -> dict[str, int]:
    return {**moment.parts, "mem_free": moment.mem_free, "mem_available": moment.mem_available}
