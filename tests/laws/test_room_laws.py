"""Laws of how much fits: one block more holds no less (13), blocks of one token waste nothing (15)."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tight_scenarios import GROWS, LENGTHS, LESS_THAN_THE_POOL, scenario, with_room

from pagedkv.allocation import KVPoolSettings
from pagedkv.allocators import ALLOCATORS
from pagedkv.errors import ConfigError
from pagedkv.fuzzing import hybrid_layers
from pagedkv.heaps import HEAPS
from pagedkv.sims.config import LoadConfig
from pagedkv.sims.metrics import measure
from pagedkv.sims.recording import INTERNAL, RUNNING
from pagedkv.sims.simulation import run
from pagedkv.step_allocation import StepAllocator, step_allocator
from pagedkv.step_batch import StepBatch, empty_batch

IN_A_HEAP = {"contiguous-max", "contiguous-oracle", "contiguous-pow2"}

ONE_PIECE = IN_A_HEAP | {"contiguous-growing"}
"""Here a request's slots lie side by side: free ones may not do."""

PAGE_GRANULAR = {"vattention"}
"""These round up to pages of the machine, whatever the block size."""


@pytest.mark.parametrize("name", ALLOCATORS.names())
def test_those_who_grow_reserve_nothing(name: str) -> None:
    allocator = step_allocator(
        name, KVPoolSettings(num_blocks=100, max_num_seqs=2, max_model_len=400, layer_groups=hybrid_layers(16))
    )
    assert allocator.admission_slots(300, 60) is not None
    assert (allocator.admission_slots(300, 60) == 0) == (name in GROWS)


def step_of(allocator: StepAllocator, asked: list[tuple[int, int]]) -> StepBatch:
    """A step for (tokens, known tokens) of each, in rows 0, 1, ..."""
    step = empty_batch(len(asked))
    step["row"] = np.arange(len(asked))
    for entry, (tokens, known) in enumerate(asked):
        step["num_slots_needed"][entry] = step["num_scheduled_tokens"][entry] = tokens
        step["num_known_tokens"][entry] = known
        step["admission_slots"][entry] = allocator.admission_slots(known, known + 1)
    return step


def served(allocator: StepAllocator, live: list[tuple[int, int]], batch: list[tuple[int, int]]) -> tuple[int, int]:
    """Admit `live`; let those who are served grow by half and then admit `batch`. Return how many each of the two steps served."""
    num_running = allocator.allocate_slots(step_of(allocator, live), 0, len(live), 0)
    step = step_of(allocator, live[:num_running] + batch)
    running = step[:num_running]
    running["num_scheduled_tokens"] = running["num_slots_needed"] // 2 + 1
    running["num_slots_needed"] += running["num_scheduled_tokens"]
    running["num_known_tokens"] = running["num_slots_needed"]
    return num_running, allocator.allocate_slots(step, 0, step.size, num_running)


PLACED = [(name, heap) for name in ALLOCATORS.names() for heap in (HEAPS.names() if name in IN_A_HEAP else ["buddy"])]


@pytest.mark.parametrize(("name", "heap"), PLACED)
def test_law_13_what_fits_in_n_blocks_fits_in_one_more(name: str, heap: str) -> None:
    """Requests are admitted, grow by half, and others are admitted, as far as there is room. Whoever can never fit stays out."""
    seen: Counter[str] = Counter()

    @given(
        live=st.lists(st.integers(1, 40).map(lambda tokens: (tokens, tokens)), max_size=4),
        batch=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)).map(lambda pair: (min(pair), max(pair))), max_size=5),
        num_blocks=st.integers(2, 60),
        watermark=st.sampled_from([0.0, 0.05, 0.3]),
        reserve_full_isl=st.booleans(),
    )
    @settings(max_examples=100)
    def law(
        live: list[tuple[int, int]], batch: list[tuple[int, int]], num_blocks: int, watermark: float, reserve_full_isl: bool
    ) -> None:
        smaller, larger = (
            step_allocator(
                name,
                KVPoolSettings(
                    num_blocks=n,
                    block_size=4,
                    max_num_seqs=max(len(live) + len(batch), 1),
                    max_model_len=80,
                    contiguous_heap=heap,
                    watermark=watermark,
                    reserve_full_isl=reserve_full_isl,
                    page_tokens=4,
                    layer_groups=hybrid_layers(4),
                ),
            )
            for n in (num_blocks, num_blocks + 1)
        )
        seen["at arrival"] += len(live) + len(batch)
        live, batch = (
            [each for each in asked if smaller.admission_slots(each[1], each[1] + 1) is not None] for asked in (live, batch)
        )
        seen["at arrival"] -= len(live) + len(batch)
        assert all(larger.admission_slots(known, known + 1) is not None for _, known in live + batch)
        num_running, num_served = served(smaller, live, batch)
        num_running_in_more, num_served_in_more = served(larger, live[:num_running], batch)
        assert num_running_in_more == num_running
        assert num_served_in_more >= num_served
        seen["while running"] += num_running > num_served
        seen["at admission"] += max(num_running, num_served) < num_running + len(batch)
        seen["served"] += num_running < num_served

    law()
    assert min(seen["served"], seen["at arrival"]) > 5
    assert (seen["at admission"] > 5) == (name not in LESS_THAN_THE_POOL)
    assert (seen["while running"] > 0) == (name in GROWS)


@pytest.mark.parametrize("name", ALLOCATORS.names())
def test_law_15_blocks_of_one_token_waste_nothing(name: str) -> None:
    """But for reservations of a whole life, which have an end that nobody fills, and pages; and heaps need one piece."""
    one = scenario(LoadConfig(request_rate=1.0, num_prompts=30, **LENGTHS), num_blocks=1600, block_size=1)
    if name == "tensorrt-llm":
        with pytest.raises(ConfigError, match="block size 1: tensorrt-llm needs a power of two, 2 or more"):
            step_allocator(name, one.deployment.pool_of(name))
        return
    shares = measure(run(with_room(one, name), name, seed=0), ())["kv"]
    assert (shares["internal"] == 0) == (name in GROWS - PAGE_GRANULAR)
    assert (shares["external"] > 0) == (name in ONE_PIECE)


def test_an_oracle_with_an_exact_heap_wastes_the_slot_of_the_last_token_alone() -> None:
    one = scenario(LoadConfig(request_rate=1.0, num_prompts=30, **LENGTHS), contiguous_heap="first-fit")
    gauges = run(one, "contiguous-oracle", seed=0).recorder.integrals.gauges
    np.testing.assert_allclose(gauges[INTERNAL], gauges[RUNNING])
