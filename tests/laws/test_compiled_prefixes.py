"""Law 14 where prefixes are shared and layers have states: compiled or step by step, bit for bit."""

from dataclasses import dataclass, replace

import pytest
from chats import MAX_MODEL_LEN, QUESTIONS, Question, step_time, user
from compiled_cases import STEPS_AT_ONCE, agree
from hypothesis import event, given, settings
from hypothesis import strategies as st

from pagedkv.allocation import KVPoolSettings
from pagedkv.paged_steps import PagedStepAllocator
from pagedkv.scheduling.scheduler import Scheduler
from pagedkv.scheduling.scheduler_settings import SchedulerSettings
from pagedkv.scheduling.step import Step
from pagedkv.sims.clock import Clock
from pagedkv.sims.compiled_engine import CompiledEngine
from pagedkv.sims.engine import Engine
from pagedkv.sims.recorder import Recorder
from pagedkv.sims.recording import CACHED
from pagedkv.sims.simulation import Run
from pagedkv.sims.step_time import StepCost

BLOCK_SIZE = 4


@dataclass(frozen=True, kw_only=True)
class Chats:
    """Who asks what, and who answers."""

    users: tuple[tuple[Question, ...], ...]
    num_blocks: int = 50
    state_slots: int = 0
    freed_to_front: bool = True
    watermark: float = 0.0
    reserve_full_isl: bool = True
    max_num_seqs: int = 4
    max_num_batched_tokens: int = 64
    steps_at_once: int = CompiledEngine.steps_at_once


class Witness(Recorder):
    """Remembers what is no figure."""

    most_shared = 0

    def step(self, step: Step, start_s: float, cost: StepCost) -> None:
        super().step(step, start_s, cost)
        self.most_shared = max(self.most_shared, self._scheduler.shared_slots)


def answered(chats: Chats, kind: type[Engine | CompiledEngine]) -> Run:
    """Let `chats` come to an end."""
    pool = KVPoolSettings(
        num_blocks=chats.num_blocks,
        block_size=BLOCK_SIZE,
        max_num_seqs=chats.max_num_seqs,
        max_model_len=MAX_MODEL_LEN,
        watermark=chats.watermark,
        reserve_full_isl=chats.reserve_full_isl,
        freed_to_front=chats.freed_to_front,
        state_slots=chats.state_slots,
        enable_prefix_caching=True,
    )
    limits = SchedulerSettings(
        max_num_seqs=chats.max_num_seqs, max_num_batched_tokens=chats.max_num_batched_tokens, max_model_len=MAX_MODEL_LEN
    )
    env, allocator = Clock(initial_time=0.0), PagedStepAllocator(pool)
    recorder = Witness(Scheduler(limits, allocator), warmup_s=0.1, end_s=float("inf"))
    engine = kind(env, recorder._scheduler, step_time(), recorder)
    if isinstance(engine, CompiledEngine):
        engine.steps_at_once = chats.steps_at_once
    for asker, questions in enumerate(chats.users):
        env.process(user(env, engine, asker, questions))
    env.run()
    engine.close()
    recorder.close(env.now)
    return Run(allocator=allocator, recorder=recorder, log=recorder.log(), end_s=env.now, warmup_s=0.1, drained=True)


def seen(slow: Run) -> dict[str, int]:
    """Return how much of what this is about there was."""
    assert isinstance(slow.recorder, Witness)
    requests, sums = slow.recorder._scheduler.requests, slow.recorder.integrals
    return {
        "hits": int(requests.arrays["num_hit_tokens"].sum()),
        "cached": int(sums.gauges[CACHED] > 0),
        "cached while somebody waited": int(sums.gauges_when_waiting[CACHED] > 0),
        "shared": slow.recorder.most_shared,
        "preempted": int(requests.arrays["num_preemptions"].sum()),
    }


@given(
    st.builds(
        Chats,
        users=st.lists(QUESTIONS.map(tuple), min_size=1, max_size=6).map(tuple),
        num_blocks=st.sampled_from([26, 40, 90]),
        state_slots=st.sampled_from([0, 9]),
        freed_to_front=st.booleans(),
        watermark=st.sampled_from([0.0, 0.1]),
        reserve_full_isl=st.booleans(),
        max_num_seqs=st.sampled_from([2, 6]),
        max_num_batched_tokens=st.sampled_from([16, 64]),
        steps_at_once=STEPS_AT_ONCE,
    )
)
@settings(max_examples=60)
def test_law_14_with_shared_prefixes_and_state_layers(chats: Chats) -> None:
    compiled, slow = answered(chats, CompiledEngine), answered(chats, Engine)
    agree(compiled, slow)
    for what, number in seen(slow).items():
        event(f"{what}: {number > 0}")


@pytest.mark.parametrize("freed_to_front", [True, False])
@pytest.mark.parametrize("state_slots", [0, 9])
def test_prefixes_are_found_kept_and_shared_there(freed_to_front: bool, state_slots: int) -> None:
    """The law would prove little if they were not."""
    text = (Question(0.0, 0, 33, 5, 20), Question(0.5, 0, 33, 9, 28))
    chats = Chats(users=(text,) * 5, num_blocks=45, freed_to_front=freed_to_front, state_slots=state_slots, max_num_seqs=5)
    slow = answered(chats, Engine)
    assert all(seen(slow).values())
    for steps_at_once in (1, 3, CompiledEngine.steps_at_once):
        agree(answered(replace(chats, steps_at_once=steps_at_once), CompiledEngine), slow)
