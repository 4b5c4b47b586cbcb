"""Law 14 for engines that decide in Python: steps run together, or one by one, leave the same slots, records and figures."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from cases import DECIDED_IN_PYTHON, Case, cases, served
from chats import Question, records_agree
from hypothesis import event, given, settings
from hypothesis import strategies as st

from pagedkv.decode_run import growth
from pagedkv.kv_request import KVRequest
from pagedkv.scheduling.kv_rows import KVRows
from pagedkv.scheduling.radix_rows import RadixRows
from pagedkv.sims import engine as engine_module
from pagedkv.sims.config import ServingConfig
from pagedkv.sims.decode_steps import run_decode
from pagedkv.sims.engines import load_engine
from pagedkv.sims.simulation import Run
from pagedkv.step_allocation import RequestByRequest
from pagedkv.step_batch import empty_batch


def holdings(run: Run) -> Iterator[object]:
    """Yield all that memory is at the end, down to the order in which free slots will be handed out."""
    memory = run.allocator
    yield memory.units_held.tolist()
    if isinstance(memory, RadixRows):
        yield memory.cache.slots.free_list().tolist()
        yield [(node.slots.tolist(), node.lock_ref) for node in memory.cache.tree.root.below()]
        return
    assert isinstance(memory, KVRows | RequestByRequest)
    allocator = memory.allocator
    yield sorted(allocator.cached_slots().tolist()), allocator.free_slots
    probe = KVRequest(request_id="next", num_tokens=20)
    probe.admission_slots = allocator.admission_slots(19, 2) or 0
    if allocator.allocate_slots(probe, 20) is not None:
        yield allocator.slots_held(probe).tolist()


@pytest.mark.parametrize(("engine", "allocator"), DECIDED_IN_PYTHON)
@given(data=st.data())
@settings(max_examples=20)
def test_steps_that_run_together_are_steps_one_by_one(engine: str, allocator: str, data: st.DataObject) -> None:
    case = data.draw(cases(engine, allocator))
    together, one_by_one = served(case, step_by_step=False), served(case, step_by_step=True)
    records_agree(together, one_by_one)
    assert list(holdings(together)) == list(holdings(one_by_one))
    preempted, failed = (
        one_by_one.log.num_preemptions.sum(),
        (one_by_one.log.num_output_tokens < one_by_one.log.output_tokens).sum(),
    )
    event(f"preempted: {preempted > 0}, failed: {failed > 0}")


@pytest.mark.parametrize(("engine", "allocator"), DECIDED_IN_PYTHON)
def test_most_steps_do_run_together(engine: str, allocator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The law would prove little if they did not; in tight memory, and where requests share a prefix."""
    completed = []

    def counted(*given: Any, **named: Any) -> Any:
        done = run_decode(*given, **named)
        completed.append(done.num_completed)
        return done

    monkeypatch.setattr(engine_module, "run_decode", counted)
    case = Case(
        engine=engine,
        allocator=allocator,
        variant={},
        users=((Question(0.0, 0, 33, 5, 28), Question(0.5, 0, 33, 9, 28)),) * 4,
        num_blocks=60,
        block_size=1 if engine == "sglang" else 8,
        max_num_seqs=4,
        max_num_batched_tokens=96,
    )
    together = served(case, step_by_step=False)
    steps = int(together.recorder.arrays.counters[0])
    grouped = allocator == "hybrid"  # it gives back what leaves a window, step by step
    assert sum(completed) == 0 if grouped else sum(completed) > steps / 3
    records_agree(together, served(case, step_by_step=True))


@pytest.mark.parametrize(
    ("engine", "block_size", "variant"),
    [
        ("sglang", 1, {"schedule_conservativeness": 0.1}),
        ("sglang", 4, {"schedule_conservativeness": 0.1}),
    ],
)
def test_the_law_holds_where_memory_runs_out(engine: str, block_size: int, variant: dict[str, Any]) -> None:
    case = Case(
        engine=engine,
        allocator=load_engine(engine).allocators(ServingConfig(engine=engine))[0],
        variant=variant,
        users=tuple((Question(0.01 * i, i % 3, 16, 3 + i, 60),) * 3 for i in range(8)),
        num_blocks=34,
        block_size=block_size,
        max_num_seqs=8,
        max_num_batched_tokens=96,
    )
    together, one_by_one = served(case, step_by_step=False), served(case, step_by_step=True)
    assert one_by_one.log.num_preemptions.sum() > 3
    records_agree(together, one_by_one)
    assert list(holdings(together)) == list(holdings(one_by_one))


@given(
    held=st.lists(st.integers(1, 4), min_size=1, max_size=5),
    grain=st.sampled_from([1, 4, 16]),
    num_steps=st.integers(1, 40),
    data=st.data(),
)
def test_growth_is_in_the_order_of_asking(held: list[int], grain: int, num_steps: int, data: st.DataObject) -> None:
    slots_held = np.array(held) * grain
    batch = empty_batch(len(held))
    batch["num_slots_needed"] = [data.draw(st.integers(max(slots - grain, 0) + 1, slots)) for slots in slots_held.tolist()]
    expected, has = [], slots_held.tolist()
    for step in range(1, num_steps + 1):
        for i, needed in enumerate((batch["num_slots_needed"] + step).tolist()):
            if needed > has[i]:
                has[i] += grain
                expected.append((step, i))
    steps, entries = growth(batch, slots_held, grain, num_steps)
    assert list(zip(steps.tolist(), entries.tolist(), strict=True)) == expected
