"""`simulate --watch`: the memory map and some counters in the terminal while simulated time runs; plain lines elsewhere."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.text import Text

from pagedkv.errors import ConfigError
from pagedkv.scheduling.scheduler_memory import memory_of
from pagedkv.scheduling.step import StepScheduler
from pagedkv.sims.scenario import Scenario
from pagedkv.sims.simulation import Watch, run
from pagedkv.snapshot import NOBODY, MemorySnapshot, UnitState, snapshot

WIDTH, HEIGHT = 78, 14
"""Characters of the map: each stands for as many blocks as it takes."""
NUM_MOMENTS = 120
_COLOURS = ("blue", "yellow", "green", "magenta", "red", "cyan", "bright_blue", "bright_yellow", "bright_green", "bright_magenta")
_LEGEND = "█ held, one colour per request   ▓ shared   ░ cached, free for anyone   · empty"


def watch_run(scenario: Scenario, allocator: str, console: Console) -> None:
    """Simulate `allocator` once and show it on `console` as it goes on.

    Raises:
        ConfigError: If its memory cannot be looked at.
    """
    seed = scenario.config.measurement.seed
    end_s = run(scenario, allocator, seed=seed).end_s if scenario.duration_s is None else scenario.warmup_s + scenario.duration_s
    times_s = np.linspace(0, end_s, NUM_MOMENTS + 1, endpoint=False)[1:].tolist()
    with _shown(console) as show:

        def see(now_s: float, scheduler: StepScheduler) -> None:
            show(allocator, now_s, scheduler)

        run(scenario, allocator, seed=seed, watch=Watch(times_s=times_s, see=see))


def check_watchable(scenario: Scenario) -> str:
    """Return the allocator that is watched: the first.

    Raises:
        ConfigError: If its memory cannot be looked at.
    """
    allocator = scenario.allocators[0]
    try:
        memory_of(scenario.deployment.scheduler_over(allocator))
    except ConfigError as error:
        raise ConfigError(f"--watch: {error}") from error
    return allocator


class _Shown:
    def __init__(self, console: Console, live: Live | None) -> None:
        self._console, self._live = console, live
        self._preemptions = 0

    def __call__(self, allocator: str, now_s: float, scheduler: StepScheduler) -> None:
        one = snapshot(memory_of(scheduler))
        self._preemptions = int(scheduler.requests.arrays["num_preemptions"].sum())
        line = self._line(allocator, now_s, scheduler, one)
        if self._live is None:
            self._console.print(line, soft_wrap=True, highlight=False)
        else:
            self._live.update(Group(Text(line, "bold"), terminal_map(one), Text(_LEGEND, "dim")), refresh=True)

    def _line(self, allocator: str, now_s: float, scheduler: StepScheduler, one: MemorySnapshot) -> str:
        parts, usable = one.parts, max(one.parts.usable, 1)
        return (
            f"{allocator} {now_s:7.1f} s  running {scheduler.num_running:3d}  waiting {scheduler.num_waiting:3d}  "
            f"KV {(parts.tokens + parts.unfilled + parts.state) / usable:5.1%}  cached {parts.cached / usable:5.1%}  "
            f"preempted {self._preemptions}"
        )


@contextmanager
def _shown(console: Console) -> Iterator[_Shown]:
    if not console.is_terminal:
        yield _Shown(console, None)
        return
    with Live(console=console, auto_refresh=False) as live:
        yield _Shown(console, live)


def terminal_map(one: MemorySnapshot, *, width: int = WIDTH, height: int = HEIGHT) -> RenderableType:
    """Return the map as text: a character for every so many units, what the first of them that is held is, else the first."""
    per_character = max(-(-one.states.size // (width * height)), 1)
    text = Text()
    for first in range(0, one.states.size, per_character):
        units = slice(first, first + per_character)
        held = np.flatnonzero(one.owners[units] != NOBODY)
        unit = first + (int(held[0]) if held.size else 0)
        text.append(*_character(one, unit))
        if (first // per_character) % width == width - 1:
            text.append("\n")
    if per_character > 1:
        text.append(f"\n(a character is {per_character} blocks)", "dim")
    return text


def _character(one: MemorySnapshot, unit: int) -> tuple[str, str]:
    owner = int(one.owners[unit])
    if owner != NOBODY:
        name = one.requests[owner]
        number = name if isinstance(name, int) else sum(name.encode())
        return ("▓" if one.ref_counts[unit] > 1 else "█", _COLOURS[number % len(_COLOURS)])
    return {UnitState.CACHED: ("░", "white"), UnitState.SET_ASIDE: ("x", "dim")}.get(UnitState(int(one.states[unit])), ("·", "dim"))
