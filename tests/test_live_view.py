"""The live view: a map of characters that says what the memory is, counters beside it, plain lines where there is no terminal."""

import io
import re
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from rich.text import Text

from pagedkv.scheduling.scheduler_memory import memory_of
from pagedkv.scheduling.step import StepScheduler
from pagedkv.sims.cli import main
from pagedkv.sims.config import LoadConfig, MeasurementConfig, ServingConfig, SimulationConfig
from pagedkv.sims.live_view import HEIGHT, NUM_MOMENTS, WIDTH, terminal_map, watch_run
from pagedkv.sims.scenario import Scenario, resolve
from pagedkv.sims.simulation import Watch, run
from pagedkv.snapshot import NOBODY, MemorySnapshot, UnitState, snapshot


def scenario(blocks: int = 400, **load: Any) -> Scenario:
    asked = {"users": 6, "think_time": "1s", "prefix_len": 200, "random_input_len": 300, "random_output_len": 50, **load}
    measurement = MeasurementConfig(allocator=("paged",), **({} if "num_prompts" in load else {"duration": "20s", "warmup": "0s"}))
    serving = ServingConfig(num_gpu_blocks_override=blocks, max_model_len=1024)
    return resolve(SimulationConfig(load=LoadConfig(**asked), serving=serving, measurement=measurement))


def moments(setup: Scenario) -> list[MemorySnapshot]:
    seen: list[MemorySnapshot] = []

    def see(now_s: float, scheduler: StepScheduler) -> None:
        del now_s
        seen.append(snapshot(memory_of(scheduler)))

    run(setup, "paged", seed=0, watch=Watch(times_s=[4.0, 12.0, 19.0], see=see))
    return seen


def test_a_character_is_a_block_where_there_is_room() -> None:
    for one in moments(scenario()):
        shown = terminal_map(one)
        assert isinstance(shown, Text)
        characters = shown.plain.replace("\n", "")
        assert len(characters) == one.states.size
        for character, state, owner, count in zip(characters, one.states, one.owners, one.ref_counts, strict=True):
            held = "▓" if count > 1 else "█"
            expected = held if owner != NOBODY else {UnitState.FREE: "·", UnitState.CACHED: "░", UnitState.SET_ASIDE: "x"}[state]
            assert character == expected
        assert max(map(len, shown.plain.split("\n"))) <= WIDTH


def test_a_large_memory_shows_what_is_held_first() -> None:
    one = moments(scenario(blocks=20_000))[-1]
    shown = terminal_map(one)
    assert isinstance(shown, Text)
    *lines, note = shown.plain.split("\n")
    per_character = int(re.findall(r"\d+", note)[0])
    assert per_character == -(-20_000 // (WIDTH * HEIGHT))
    characters = "".join(lines)
    groups = [one.owners[first : first + per_character] for first in range(0, 20_000, per_character)]
    assert [c in "█▓" for c in characters] == [bool((group != NOBODY).any()) for group in groups]


@pytest.mark.parametrize("load", [{}, {"num_prompts": 30}])
def test_without_a_terminal_every_moment_is_a_line(load: dict[str, Any]) -> None:
    text = io.StringIO()
    watch_run(scenario(**load), "paged", Console(file=text, width=80))
    lines = text.getvalue().splitlines()
    assert len(lines) == NUM_MOMENTS
    times = [float(re.findall(r"paged +([\d.]+) s", line)[0]) for line in lines]
    assert (np.diff(times) > 0).all()
    assert all(re.search(r"running +\d+  waiting +\d+  KV +[\d.]+%  cached +[\d.]+%  preempted \d+$", line) for line in lines)


def test_in_a_terminal_the_map_is_drawn_in_place() -> None:
    text = io.StringIO()
    watch_run(scenario(), "paged", Console(file=text, width=80, force_terminal=True))
    assert text.getvalue().count("one colour per request") == NUM_MOMENTS + 1  # and once when it ends
    assert "\x1b[" in text.getvalue()


def test_the_answer_follows(capsys: pytest.CaptureFixture[str]) -> None:
    load = ["--users", "4", "--think-time", "1s", "--duration", "20s", "--warmup", "0s", "--allocator", "paged"]
    main([*load, "--watch"])
    watched = capsys.readouterr().out
    main(load)
    assert watched.endswith(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("words", "says"), [(["--json", "-"], "both write to stdout"), (["--engine", "vllm,sglang"], "--watch shows one engine")]
)
def test_what_cannot_be_watched_is_refused(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--users", "4", "--watch", *words])
    assert stop.value.code == 2
    assert says in capsys.readouterr().err
