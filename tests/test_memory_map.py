"""The memory map: what its cells say is what the allocator has, frame by frame, and looking changes nothing."""

import itertools
from typing import Any

import numpy as np
import pytest

from pagedkv.allocation import KVPoolSettings
from pagedkv.allocators import ALLOCATORS
from pagedkv.errors import ConfigError
from pagedkv.kv_request import KVRequest
from pagedkv.scheduling.scheduler_memory import memory_of
from pagedkv.scheduling.step import StepScheduler
from pagedkv.sims.config import LoadConfig, MeasurementConfig, ServingConfig, SimulationConfig
from pagedkv.sims.engines import ENGINES
from pagedkv.sims.memory_frames import frames_of
from pagedkv.sims.memory_map import MOST_NUMBERED, Frame, cells_of, memory_map
from pagedkv.sims.metrics import measure
from pagedkv.sims.scenario import Scenario, resolve
from pagedkv.sims.simulation import Watch, run
from pagedkv.snapshot import NOBODY, MemorySnapshot, UnitState, snapshot


def scenario(engine: str = "vllm", allocator: tuple[str, ...] | None = ("paged",), **serving: Any) -> Scenario:
    load = LoadConfig(users=5, think_time="1s", prefix_len=100, random_input_len=200, random_output_len=40, random_range_ratio=0.5)
    measurement = MeasurementConfig(duration="30s", warmup="0s", allocator=allocator)
    return resolve(SimulationConfig(load=load, serving=ServingConfig(engine=engine, **serving), measurement=measurement))


def shown(trace: Any) -> np.ndarray[Any, Any]:
    """The cells that a heatmap of the figure shows, row by row, without the ones that fill its last row."""
    cells = np.asarray(trace.customdata).reshape(-1, 6)
    return cells[cells[:, 0] >= 0]


@pytest.mark.parametrize("allocator", ["paged", "contiguous-max", "contiguous-oracle", "vattention", "hybrid"])
def test_the_cells_of_every_frame_are_the_memory_of_that_moment(allocator: str) -> None:
    setup = scenario(allocator=(allocator,), num_gpu_blocks_override=300, max_model_len=1024)
    frames = frames_of(setup, allocator, seed=0, end_s=30, number=5)
    figure = memory_map({allocator: frames})
    assert len(figure.frames) == len(frames) == 5
    assert [step.label for step in figure.layout.sliders[0].steps] == [frame.label for frame in frames]
    assert any((frame.snapshot.states == UnitState.HELD).any() for frame in frames)
    for drawn, frame in zip(figure.frames, frames, strict=True):
        one = frame.snapshot
        cells = shown(drawn.data[0])
        for place, values in enumerate(
            (np.arange(one.states.size), one.states, one.owners, one.ref_counts, one.tokens, one.unfilled)
        ):
            assert np.array_equal(cells[:, place], values)
        hatched = set(zip(drawn.data[1].x, drawn.data[1].y, strict=True))
        width = np.asarray(drawn.data[0].z).shape[1]
        assert hatched == {(unit % width, unit // width) for unit in np.flatnonzero(one.unfilled > 0)}
    assert np.array_equal(shown(figure.data[0]), shown(figure.frames[0].data[0]))


@pytest.mark.parametrize("engine", ENGINES.names())
def test_looking_changes_nothing_and_every_engine_can_be_looked_at(engine: str) -> None:
    setup = scenario(engine, None)
    name = setup.allocators[0]
    seen: list[MemorySnapshot] = []

    def see(now_s: float, scheduler: StepScheduler) -> None:
        del now_s
        memory = memory_of(scheduler)
        seen.append(snapshot(memory))
        assert seen[-1].parts.usable == memory.usable_slots
        assert len(seen[-1].requests) == scheduler.num_running

    watched = run(setup, name, seed=3, watch=Watch(times_s=[5.0, 11.5, 20.25], see=see))
    plain = run(setup, name, seed=3)
    assert len(seen) == 3
    assert measure(watched, ()) == measure(plain, ())


def test_of_paged_memory_under_a_scheduler_the_map_is_that_of_the_pool() -> None:
    setup = scenario(num_gpu_blocks_override=200, max_model_len=1024)

    def see(now_s: float, scheduler: StepScheduler) -> None:
        del now_s
        one, allocator = snapshot(memory_of(scheduler)), scheduler.allocator
        pool = allocator.pool  # type: ignore[attr-defined]
        assert np.array_equal(one.ref_counts, pool.ref_cnt)
        keyed = np.isin(np.arange(one.states.size), pool.cache.blocks())
        assert np.array_equal(one.states == UnitState.CACHED, keyed & (pool.ref_cnt == 0))
        assert one.states[0] == UnitState.SET_ASIDE
        rows = scheduler.requests.arrays["row"]
        for request, (table,) in zip(one.requests, one.tables, strict=True):
            assert table.tolist() == allocator.tables.of(rows[request]).tolist()  # type: ignore[attr-defined]

    run(setup, "paged", seed=0, watch=Watch(times_s=[3.0, 9.0, 15.0, 25.0], see=see))


def small(name: str = "paged", blocks: int = 40) -> list[Frame]:
    allocator = ALLOCATORS.load(name)(KVPoolSettings(num_blocks=blocks, block_size=4, max_model_len=32, max_num_seqs=8))
    frames = []
    for number in itertools.count():
        request = KVRequest(request_id=f"r{number}", num_tokens=6)
        request.admission_slots = allocator.admission_slots(6, 10) or 0
        if number == 4 or allocator.allocate_slots(request, 6) is None:
            return frames
        request.num_computed_tokens = 6
        frames.append(Frame(label=f"{number + 1} requests", snapshot=snapshot(allocator, 4)))
    return frames


def test_side_by_side_over_the_same_moments() -> None:
    panels = {"paged": small(), "contiguous": small("contiguous-max")}
    figure = memory_map(panels, tables=False)
    assert [note.text.partition("<br>")[0] for note in figure.layout.annotations] == list(panels)
    for drawn, paged, contiguous in zip(figure.frames, *panels.values(), strict=True):
        assert np.array_equal(shown(drawn.data[0]), cells_of(paged.snapshot))
        assert np.array_equal(shown(drawn.data[2]), cells_of(contiguous.snapshot))


def test_a_request_keeps_its_colour_and_nobody_has_the_colour_of_free_memory() -> None:
    frames = small()
    figure = memory_map({"paged": frames})
    colours: dict[str, set[float]] = {}
    for drawn, frame in zip(figure.frames, frames, strict=True):
        z = np.asarray(drawn.data[0].z).ravel()[: frame.snapshot.states.size]
        for unit, owner in enumerate(frame.snapshot.owners):
            name = "nobody" if owner == NOBODY else str(frame.snapshot.requests[owner])
            colours.setdefault(name, set()).add(float(z[unit]))
    assert all(len(colours[f"r{i}"]) == 1 for i in range(4))
    assert colours["nobody"].isdisjoint(set().union(*(colours[f"r{i}"] for i in range(4))))


def test_the_block_tables_stand_below() -> None:
    frames = small()
    table = memory_map({"paged": frames}).frames[-1].data[2]
    names, blocks = table.cells.values
    assert list(names) == ["r0", "r1", "r2", "r3"]
    assert list(blocks) == [" ".join(map(str, each[0].tolist())) for each in frames[-1].snapshot.tables]


def test_the_cells_of_a_small_map_have_their_numbers_and_how_many_share_them() -> None:
    allocator = ALLOCATORS.load("paged")(KVPoolSettings(num_blocks=6, block_size=4, max_model_len=32))
    parent, child = (KVRequest(request_id=name, num_tokens=6) for name in "ab")
    allocator.allocate_slots(parent, 6)
    parent.num_computed_tokens = child.num_computed_tokens = 6
    allocator.fork(parent, child)
    shown = memory_map({"paged": [Frame(label="forked", snapshot=snapshot(allocator))]}, columns=3).data[0].text
    assert [text.removesuffix("<br> ").strip() for text in np.asarray(shown).ravel()] == ["0", "1 ×2", "2 ×2", "3", "4", "5"]
    assert memory_map({"paged": small(blocks=MOST_NUMBERED)}).data[0].text is not None
    assert memory_map({"paged": small(blocks=MOST_NUMBERED + 1)}).data[0].text is None


def test_a_large_memory_is_thinned_out_and_says_so() -> None:
    frames = small(blocks=1000)
    figure = memory_map({"paged": frames}, most_cells=300)
    (title,) = figure.layout.annotations
    assert title.text == "paged<br>1,000 blocks of 4 tokens<br>every 4th shown"
    assert max(map(len, title.text.split("<br>"))) * title.font.size * 0.6 < 360, "a telephone's width"
    assert title.text.count("<br>") * title.font.size * 1.3 + title.font.size < figure.layout.margin.t
    cells = shown(figure.data[0])
    assert cells[:, 0].tolist() == list(range(0, 1000, 4))
    assert np.array_equal(cells[:, 1], frames[0].snapshot.states[::4])


def test_maps_of_different_lengths_are_refused() -> None:
    with pytest.raises(ConfigError, match="a: 4, b: 3: needs as many of each"):
        memory_map({"a": small(), "b": small()[:3]})
    with pytest.raises(ConfigError, match="no memory"):
        memory_map({})
    assert not memory_map({"one": small()[:1]}).layout.sliders
