"""A scheduler that knows lengths only, as the simulator's, beside the one that a running engine has: both must decide alike."""

from typing import Any, NamedTuple

import numpy as np

from pagedkv.runtime.engine import LLMEngine
from pagedkv.scheduling.content import NO_SEGMENTS, Segments, shared_segments
from pagedkv.scheduling.scheduler import Scheduler
from pagedkv.scheduling.step import Step
from pagedkv.step_allocation import step_allocator
from pagedkv.step_batch import STEP_ENTRY


class Ask(NamedTuple):
    """A request, as a simulator and as an engine see it."""

    prompt: list[int]
    max_tokens: int
    arrival_step: int
    content: Segments = NO_SEGMENTS
    """What the simulator knows of the prompt: which streams it goes through."""
    priority: int = 0


def ragged_asks(count: int, *, system_tokens: tuple[int, ...] = (21, 13, 0), seed: int = 0, vocabulary: int = 97) -> list[Ask]:
    """Return requests of 1 to 40 tokens and more behind one of a few system prompts, which come in bursts."""
    rng = np.random.default_rng(seed)
    systems = [rng.integers(2, vocabulary, length).tolist() for length in system_tokens]
    asks, step = [], 0
    for i in range(count):
        group = i % len(systems)
        own = [2 + i, *rng.integers(2, vocabulary, int(rng.integers(0, 40))).tolist()]  # no two begin alike behind a system prompt
        content = shared_segments(np.array([group]), np.array([len(systems[group])])) if systems[group] else NO_SEGMENTS
        asks.append(Ask(systems[group] + own, int(rng.integers(1, 30)), step, content, int(rng.integers(0, 3))))
        step += int(rng.integers(0, 3)) if i % 8 else 0
    return asks


class Shadow:
    """Watches an engine's steps and does each, without tokens, a second time."""

    def __init__(self, engine: LLMEngine, pool: Any) -> None:
        self.engine, self.steps, self.chunks, self.preemptions, self.forks, self.copies = engine, 0, 0, 0, 0, 0
        self.contents: dict[int, Segments] = {}
        self.allocator = step_allocator("hybrid" if pool.layer_groups else "paged", pool)
        self.scheduler = Scheduler(engine.scheduler.settings, self.allocator)
        engine.observer = self

    def add(self, ask: Ask, output_tokens: int) -> None:
        request = self.scheduler.add(
            prompt_tokens=len(ask.prompt), output_tokens=output_tokens, content=ask.content, priority=ask.priority
        )
        assert request is not None
        self.contents[request] = ask.content

    def launched(self, step: Step) -> None:
        own = self.scheduler.schedule()
        for name in ("num_entries", "num_running_before", "num_preempted", "blocker"):
            assert getattr(own, name) == getattr(step, name), (self.steps, name)
        for name in STEP_ENTRY.names:
            np.testing.assert_array_equal(own.batch[name][: own.num_entries], step.batch[name][: own.num_entries])
        np.testing.assert_array_equal(self.scheduler.preempted, self.engine.scheduler.preempted)
        np.testing.assert_array_equal(self.allocator.copies, self.engine.allocator.copies)
        self.copies += len(self.allocator.copies)
        self.compare()
        self.steps += 1
        self.preemptions += step.num_preempted
        batch = step.batch[: step.num_entries]
        self.chunks += int((batch["num_slots_needed"] < batch["num_known_tokens"]).sum())

    def computed(self, step: Step) -> None:
        """Take over which drafts were accepted: all that the model decides."""
        name = "num_accepted_tokens"
        self.scheduler.step_arrays.batch[name][: step.num_entries] = step.batch[name][: step.num_entries]

    def completed(self) -> None:
        self.scheduler.complete()
        for name in ("sampled", "finished"):
            np.testing.assert_array_equal(getattr(self.scheduler, name), getattr(self.engine.scheduler, name))
        self.compare()

    def forked(self, parent: int, child: int) -> None:
        """Fork likewise; its own keys are not known here, but what both share is."""
        if child < self.scheduler.requests.size:
            self.scheduler.take_over(child, parent)
        else:
            assert self.scheduler.fork(parent, content=self.contents.get(parent)) == child
            self.contents[child] = self.contents.get(parent, NO_SEGMENTS)
        self.compare()
        self.forks += 1

    def compare(self) -> None:
        """Hold block tables, free queue and reference counts together."""
        mine, its = self.allocator, self.engine.allocator
        np.testing.assert_array_equal(mine.group_lengths, its.group_lengths)
        for group, row in np.argwhere(mine.group_lengths).tolist():
            np.testing.assert_array_equal(mine.block_table(row, group), its.block_table(row, group))
        np.testing.assert_array_equal(mine.pool.queue, its.pool.queue)
        np.testing.assert_array_equal(mine.pool.ref_cnt, its.pool.ref_cnt)
        np.testing.assert_array_equal(self.scheduler.waiting(), self.engine.scheduler.waiting())


def serve(
    engine: LLMEngine, shadow: Shadow, asks: list[Ask], *, eos: int | None = None, lengths: list[int] | None = None
) -> list[list[int]]:
    """Serve requests that arrive by step; tell the shadow their lengths, `lengths` where an end token cuts them."""
    texts: list[list[int]] = [[] for _ in asks]
    arrived, step = 0, 0
    while arrived < len(asks) or engine.num_unfinished:
        while arrived < len(asks) and asks[arrived].arrival_step <= step:
            ask = asks[arrived]
            assert engine.add_request(ask.prompt, max_tokens=ask.max_tokens, eos_token_id=eos, priority=ask.priority) == arrived
            shadow.add(ask, ask.max_tokens if lengths is None else lengths[arrived])
            arrived += 1
        for new in engine.step():
            texts[new.request].append(new.token)
        step += 1
    engine.scheduler.check_integrity()
    assert engine.allocator.free_slots == engine.allocator.usable_slots
    return texts
