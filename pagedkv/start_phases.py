"""The phases of a start: what an engine's ledger and its start come to, one after the other. No clock, no files."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from pagedkv.errors import ConfigError
from pagedkv.memory_budget import MemoryBudget, Shortage
from pagedkv.memory_request import MemoryRequest
from pagedkv.memory_timeline import TIMELINE_PARTS, MemoryPhase, MemoryTimeline, Moment, PhaseVerdict
from pagedkv.start_up import READAHEAD_BYTES, StartOptions, StartUp, compiler_bytes, disk_read_s
from pagedkv.timeline_notes import notes
from pagedkv.timeline_verdicts import Starvation, phase_verdict
from pagedkv.units import gib

_OTHERS = ("os_reserve", "other_programs")


def attempt_timeline(request: MemoryRequest, options: StartOptions = StartOptions()) -> MemoryTimeline | Shortage:  # noqa: B008
    """Return the phases from before the engine starts until it serves; or why the request has no budget.

    An engine that refuses to start ends the timeline there.

    Raises:
        ConfigError: If a value of the request is invalid, or an option cannot be, with what can.
    """
    request.check()
    start = request.ledger.start_up(request)
    _check(request, start, options)
    outcome = request.attempt()
    if isinstance(outcome, Shortage):
        if outcome.kind != "gate":
            return outcome
        phases, budget, least = tuple(_refused(request, outcome)), None, None
    else:
        life = _Life(request=request, budget=outcome, start=start, options=options)
        phases, budget, least = tuple(life.phases()), outcome, life.starvation.least_blocks
    return MemoryTimeline(
        request=request,
        options=options,
        start=start,
        budget=budget,
        phases=phases,
        least_blocks=least,
        notes=notes(request, start, options),
    )


def _check(request: MemoryRequest, start: StartUp, options: StartOptions) -> None:
    if options.direct_io and not start.direct_loader:
        raise ConfigError("--direct-io: this engine has no loader that reads past the page cache; --drop-caches helps as much")
    if options.compile_jobs is not None and options.compile_jobs < 1:
        raise ConfigError(f"--compile-jobs is {options.compile_jobs}: needs 1 or more; --warm-caches says that nothing is compiled")
    if options.host_cache_bytes is not None and not start.host_cache_bytes:
        raise ConfigError("--cache-ram: this engine keeps no old prompts in the processor's memory; it is for llama-cpp and ollama")
    sizes = [("--kv-offloading-size", options.host_tier_bytes), ("--cache-ram", options.host_cache(start))]
    for name, size in (*sizes, *((guest.name, guest.num_bytes) for guest in options.guests)):
        if not 0 <= size <= request.hardware.visible_bytes:
            all_of_it = gib(request.hardware.visible_bytes)
            raise ConfigError(f"{name} {gib(size)}: needs 0 to {all_of_it}, all of {request.hardware.title}")


def _refused(request: MemoryRequest, shortage: Shortage) -> Iterator[MemoryPhase]:
    held = dict(zip(_OTHERS, request.taken_by_others, strict=True))
    idle = _moment(request, held)
    yield MemoryPhase(name="idle", title="before the start", worst=idle, end=idle, verdict=phase_verdict(request, "idle", idle))
    verdict = PhaseVerdict(kind="refused", text=request.ledger.reason(request, shortage))
    yield MemoryPhase(name="start", title="process start", worst=idle, end=idle, verdict=verdict)


def _moment(request: MemoryRequest, held: dict[str, int], *, cached: int = 0) -> Moment:
    """Return the moment at which `held` is taken, and up to `cached` of page cache is kept in what that leaves."""
    free = request.hardware.visible_bytes - sum(held.values())
    page_cache = min(max(free, 0), cached)
    parts = dict.fromkeys(TIMELINE_PARTS, 0) | held | {"page_cache": page_cache, "unassigned": free - page_cache}
    return Moment(parts=parts)


@dataclass(slots=True, kw_only=True)
class _Life:
    """An engine's life, told in order."""

    request: MemoryRequest
    """What was asked for."""
    budget: MemoryBudget
    """What it comes to."""
    start: StartUp
    """What the engine does when it starts."""
    options: StartOptions
    """How it is started."""
    held: dict[str, int] = field(default_factory=dict)
    """By part: bytes that stay from now on."""
    cached: int = 0
    """Bytes that Linux keeps of the weights' files, if there is room."""

    def phases(self) -> Iterator[MemoryPhase]:
        """Yield the phases, up to serving and whoever comes then."""
        budget, start, options = self.budget, self.start, self.options
        compiling, building = self._compilers
        late = 0 if start.reads is not None else self._guests("loading")  # who is measured is missing in the KV cache instead
        self.held = {name: getattr(budget, name) for name in _OTHERS}
        yield self._phase("idle", "before the start")
        yield self._phase("start", "process start", stays={"engine_overhead": budget.engine_overhead})
        yield self._loading()
        if start.profiles:
            passing = {
                "activations": budget.activations,
                "compilers": max(compiling, building),
                "guests": self._guests("loading"),
                "loading": self._buffer,
            }
            yield self._phase("profile", "compile, trial step" if compiling or building else "trial step", passing=passing)
        pool = {"kv_cache": budget.kv_cache, "host_tier": self._host_tier}
        if not start.profiles:
            pool["activations"] = budget.activations
        yield self._phase("kv_cache", "KV cache", stays=pool, passing={"guests": late}, starvation=self.starvation)
        if budget.cuda_graphs:
            yield self._phase("warm_up", "CUDA graphs", stays={"cuda_graphs": budget.cuda_graphs})
        old_prompts = options.host_cache(start) + start.window_copies_bytes if self.request.hardware.unified else 0
        self.held["activations"] = budget.activations
        yield self._phase("serving", "serving", passing={"host_tier": self._host_tier + old_prompts} if old_prompts else {})
        for guest in options.guests:
            if guest.during == "serving":
                passing = {"guests": guest.num_bytes, "host_tier": self._host_tier + old_prompts}
                yield self._phase("guest", f"beside {guest.name}", passing=passing)

    def _loading(self) -> MemoryPhase:
        budget, request, options = self.budget, self.request, self.options
        hardware, file_bytes = request.hardware, request.weight_bytes
        mapped = not options.direct_io
        self.cached = file_bytes if mapped and not options.drops_caches and hardware.unified else 0
        narrow = request.weight_format.bits_per_weight < 16
        layer = budget.weights // request.model.num_layers if self.start.repacks and narrow and hardware.unified else 0
        return self._phase(
            "loading",
            "loading weights",
            stays={"weights": budget.weights},
            passing={"loading": max(layer, self._buffer), "guests": self._guests("loading")},
            seconds=disk_read_s(hardware, file_bytes, read_bytes=READAHEAD_BYTES if mapped else None),
        )

    def _phase(
        self,
        name: str,
        title: str,
        *,
        stays: dict[str, int] | None = None,
        passing: dict[str, int] | None = None,
        seconds: float | None = None,
        starvation: Starvation | None = None,
    ) -> MemoryPhase:
        self.held = self.held | (stays or {})
        worst = _moment(self.request, self.held | (passing or {}), cached=self.cached)
        end = _moment(self.request, self.held, cached=self.cached)
        self.cached = end.parts["page_cache"]  # what was given back is read again only if somebody asks for it
        verdict = phase_verdict(self.request, name, worst, starvation=starvation)
        return MemoryPhase(name=name, title=title, worst=worst, end=end, verdict=verdict, seconds=seconds)

    @property
    def starvation(self) -> Starvation:
        """What the KV cache may lose to what passes while the engine reads how much is free."""
        missing: dict[str, int] = {}
        if self.start.reads is not None:
            for guest in self.options.guests:
                if guest.during == "loading":
                    missing[guest.name] = missing.get(guest.name, 0) + guest.num_bytes
            missing["the loader's buffer"] = self._buffer
            if self.start.profiles:
                missing["the compiler's heap"] = self._compilers[0]
            if self.start.reads == "MemFree":
                missing["page cache"] = self._page_cache_when_read()
        missing = {name: size for name, size in missing.items() if size}
        least = self.request.ledger.starved_blocks(self.request, self.budget, sum(missing.values()))
        return Starvation(budget=self.budget, least_blocks=min(max(least, 0), self.budget.num_blocks), missing=missing)

    def _page_cache_when_read(self) -> int:
        if not self.request.hardware.unified or self.options.direct_io or self.options.drops_caches:
            return 0
        names = (*_OTHERS, "engine_overhead", "weights", "activations")
        held = {name: getattr(self.budget, name) for name in names} | {"guests": self._guests("loading")}
        return _moment(self.request, held, cached=self.request.weight_bytes).parts["page_cache"]

    def _guests(self, during: str) -> int:
        return sum(guest.num_bytes for guest in self.options.guests if guest.during == during)

    @property
    def _compilers(self) -> tuple[int, int]:
        request = self.request
        return compiler_bytes(
            self.start, self.options, hardware=request.hardware, model=request.model, weight_format=request.weight_format
        )

    @property
    def _buffer(self) -> int:
        return min(self.start.direct_buffer_bytes, self.budget.weights) if self.options.direct_io else 0

    @property
    def _host_tier(self) -> int:
        return self.options.host_tier_bytes if self.request.hardware.unified else 0
