"""Random workloads: over the paged allocator the scheduler does what a plain-Python one does, over any it serves all in turn."""

from dataclasses import dataclass, field, replace
from random import Random
from typing import NamedTuple

import pytest
from hypothesis import event, given, reject, settings
from hypothesis import strategies as st

from pagedkv.allocation import KVPoolSettings
from pagedkv.allocators import ALLOCATORS
from pagedkv.allocators.paged import PagedAllocator
from pagedkv.errors import ConfigError
from pagedkv.fuzzing import hybrid_layers
from pagedkv.heaps import HEAPS
from pagedkv.paged_steps import PagedStepAllocator
from pagedkv.scheduling.scheduler import Scheduler
from pagedkv.scheduling.scheduler_settings import SchedulerSettings
from pagedkv.scheduling.step import Blocker
from pagedkv.step_allocation import RequestByRequest, StepAllocator, step_allocator


class Arrival(NamedTuple):
    step: int
    prompt: int
    output: int


@dataclass(frozen=True)
class Workload:
    limits: SchedulerSettings
    pool: KVPoolSettings
    arrivals: list[Arrival]

    def most_steps(self) -> int:
        """The first running request computes a token or more in every step and is never preempted; idle is who awaits arrivals."""
        return sum(a.prompt + a.output - 1 for a in self.arrivals) + self.arrivals[-1].step


@st.composite
def workloads(draw: st.DrawFn) -> Workload:
    max_model_len = draw(st.integers(24, 40))
    chunked = draw(st.booleans())
    num_seqs = draw(st.integers(1, 8) | st.just(8))
    limits = SchedulerSettings(
        max_num_seqs=num_seqs,
        max_num_batched_tokens=draw(st.integers(1 if chunked else max_model_len, 60) | st.just(50)),
        max_model_len=max_model_len,
        enable_chunked_prefill=chunked,
        long_prefill_token_threshold=draw(st.sampled_from([0, 0, 1, 3, 7])),
    )
    block_size = draw(st.sampled_from([1, 2, 3, 4, 8]))
    pool = KVPoolSettings(
        num_blocks=2 + draw(st.integers(8, 60) | st.just(40)) // block_size,
        block_size=block_size,
        max_num_seqs=num_seqs,
        max_model_len=max_model_len,
        contiguous_heap=draw(st.sampled_from(HEAPS.names())),
        watermark=draw(st.sampled_from([0.0, 0.0, 0.1, 0.4])),
        reserve_full_isl=draw(st.booleans()),
        freed_to_front=draw(st.booleans()),
        page_tokens=block_size,
        layer_groups=hybrid_layers(block_size),
    )
    arrival = st.builds(Arrival, st.integers(0, 8), st.integers(1, 24), st.integers(1, 16))
    return Workload(limits, pool, sorted(draw(st.lists(arrival, min_size=draw(st.sampled_from([1, 6, 12])), max_size=16))))


@dataclass(eq=False)
class Request:
    id: int
    prompt: int
    output: int
    known: int
    computed: int = 0
    table: list[int] = field(default_factory=list)


class OracleScheduler:
    """vLLM v1's scheduling of one step, policy fcfs, no prefix caching, over a block pool that is a list."""

    def __init__(self, limits: SchedulerSettings, pool: KVPoolSettings) -> None:
        self.limits, self.pool = limits, pool
        self.queue = list(range(1, pool.num_blocks))
        self.watermark = int(pool.watermark * pool.num_blocks)
        self.running: list[Request] = []
        self.waiting: list[Request] = []

    def blocks(self, tokens: int) -> int:
        return (tokens + self.pool.block_size - 1) // self.pool.block_size

    def cut(self, tokens: int, budget: int) -> int:
        return min(tokens, self.threshold or tokens, budget)

    def allocate(self, request: Request, tokens: int, kept_free: int, *, whole: bool) -> bool:
        if whole and self.blocks(request.known) + kept_free > len(self.queue):
            return False
        need = self.blocks(request.computed + tokens) - len(request.table)
        if need + kept_free > len(self.queue):
            return False
        request.table += self.queue[:need]
        del self.queue[:need]
        return True

    def free(self, request: Request) -> None:
        freed = request.table[::-1]
        self.queue = freed + self.queue if self.pool.freed_to_front else self.queue + freed
        request.table = []

    def schedule(self) -> tuple[list[tuple[Request, int]], list[Request], int]:
        """Return (request, tokens) in order, those preempted, and how many entries ran before."""
        scheduled: list[tuple[Request, int]] = []
        preempted: list[Request] = []
        budget = self.limits.max_num_batched_tokens
        alone = len(self.running) + len(self.waiting) == 1
        self.threshold = 0 if alone else self.limits.long_prefill_token_threshold
        i = 0
        while i < len(self.running) and budget > 0:
            request = self.running[i]
            tokens = request.known - request.computed
            if tokens == 1 and request.known > request.prompt:
                tokens += min(self.limits.num_speculative_tokens, self.limits.max_model_len - request.known)
            tokens = self.cut(tokens, budget)
            while not self.allocate(request, tokens, 0, whole=False):
                victim = self.running.pop()
                self.free(victim)
                victim.computed = 0
                self.waiting.insert(0, victim)
                preempted.append(victim)
                if victim is request:
                    break
            if request.table:
                scheduled.append((request, tokens))
                budget -= tokens
            i += 1
        num_running = len(scheduled)
        while self.waiting and not preempted and budget > 0 and len(self.running) < self.limits.max_num_seqs:
            request = self.waiting[0]
            tokens = self.cut(request.known, request.known)
            if tokens > budget and not self.limits.enable_chunked_prefill:
                break
            tokens = min(tokens, budget)
            kept_free = self.watermark if self.running else 0
            if not self.allocate(request, tokens, kept_free, whole=self.pool.reserve_full_isl):
                break
            self.running.append(self.waiting.pop(0))
            scheduled.append((request, tokens))
            budget -= tokens
        return scheduled, preempted, num_running

    def complete(self, scheduled: list[tuple[Request, int]], accepted: list[int]) -> tuple[list[int], list[int], int]:
        """Return who got tokens, who is done, and how many tokens there were."""
        sampled, finished, num_tokens = [], [], 0
        for (request, tokens), good in zip(scheduled, accepted, strict=True):
            request.computed += tokens
            if request.computed >= request.known:
                outputs = [*range(min(good, request.computed - request.known)), "one more"]
                outputs = outputs[: request.prompt + request.output - request.known]
                request.known += len(outputs)
                request.computed = request.known - 1
                num_tokens += len(outputs)
                sampled.append(request.id)
                if request.known == request.prompt + request.output:
                    finished.append(request.id)
                    self.free(request)
                    self.running.remove(request)
        return sampled, finished, num_tokens


@given(workloads(), st.sampled_from([0, 0, 1, 2, 5]), st.randoms(use_true_random=False))
@settings(max_examples=400)
def test_paged_scheduling_is_what_the_oracle_does(workload: Workload, drafts: int, chance: Random) -> None:
    limits = replace(workload.limits, num_speculative_tokens=drafts)
    pool = replace(workload.pool, lookahead_slots=drafts)
    allocator = PagedStepAllocator(pool)
    scheduler, oracle = Scheduler(limits, allocator), OracleScheduler(limits, pool)
    pending = list(workload.arrivals)
    num_preempted = steps = 0
    while pending or oracle.running or oracle.waiting:
        while pending and pending[0].step <= steps:
            _, prompt, output = pending.pop(0)
            most = min(prompt + output - 1 + drafts, limits.max_model_len)
            fits = prompt + output <= limits.max_model_len and oracle.blocks(most) < pool.num_blocks
            index = scheduler.add(prompt_tokens=prompt, output_tokens=output)
            assert (index is not None) == fits
            if index is not None:
                oracle.waiting.append(Request(index, prompt, output, known=prompt))
        scheduled, preempted, num_running = oracle.schedule()
        step = scheduler.schedule()
        entries = range(step.num_entries)
        batch = [(int(step.batch["request"][e]), int(step.batch["num_scheduled_tokens"][e])) for e in entries]
        assert batch == [(request.id, tokens) for request, tokens in scheduled]
        assert step.num_running_before == num_running
        assert step.num_preempted == len(preempted)
        assert scheduler.waiting().tolist() == [request.id for request in oracle.waiting]
        for e, (request, _) in zip(entries, scheduled, strict=True):
            assert allocator.tables.of(int(step.batch["row"][e])).tolist() == request.table
        assert allocator.pool.free_queue().tolist() == oracle.queue
        scheduler.check_integrity()
        accepted = [chance.randint(0, drafts) for _ in scheduled]
        sampled, finished, num_tokens = oracle.complete(scheduled, accepted)
        step.batch["num_accepted_tokens"][: step.num_entries] = accepted
        scheduler.complete()
        assert scheduler.num_output_tokens == num_tokens
        assert (scheduler.sampled.tolist(), scheduler.finished.tolist()) == (sampled, finished)
        assert scheduler.num_running == len(oracle.running)
        assert allocator.pool.free_queue().tolist() == oracle.queue
        scheduler.check_integrity()
        num_preempted += len(preempted)
        steps += 1
    event(f"preempts: {num_preempted > 0}")


@given(workloads())
@settings(max_examples=150)
def test_law_14_compiled_or_request_by_request_paged_memory_is_the_same(workload: Workload) -> None:
    manager = PagedAllocator(workload.pool)
    compiled, plain = PagedStepAllocator(workload.pool), RequestByRequest(manager)
    schedulers = Scheduler(workload.limits, compiled), Scheduler(workload.limits, plain)
    pending, steps = list(workload.arrivals), 0
    while pending or schedulers[0].num_running or schedulers[0].num_waiting:
        while pending and pending[0].step <= steps:
            _, prompt, output = pending.pop(0)
            one, other = (scheduler.add(prompt_tokens=prompt, output_tokens=output) for scheduler in schedulers)
            assert one == other
        one_step, other_step = (scheduler.schedule() for scheduler in schedulers)
        for name in ("num_entries", "num_running_before", "num_preempted", "blocker"):
            assert getattr(one_step, name) == getattr(other_step, name)
        entries = slice(one_step.num_entries)
        assert one_step.batch[entries].tolist() == other_step.batch[entries].tolist()
        assert schedulers[0].preempted.tolist() == schedulers[1].preempted.tolist()
        tables = {request.request_id: manager.manager.block_table(request).tolist() for request in manager.live_requests()}
        running = schedulers[0].arrays.running[: schedulers[0].num_running].tolist()
        rows = schedulers[0].requests.arrays["row"]
        assert {request: compiled.tables.of(rows[request]).tolist() for request in running} == tables
        assert compiled.pool.free_queue().tolist() == manager.manager.free_queue().tolist()
        for scheduler in schedulers:
            scheduler.complete()
            scheduler.check_integrity()
        assert schedulers[0].sampled.tolist() == schedulers[1].sampled.tolist()
        assert schedulers[0].finished.tolist() == schedulers[1].finished.tolist()
        assert compiled.pool.free_queue().tolist() == manager.manager.free_queue().tolist()
        steps += 1


GROWS = {"contiguous-growing", "hybrid", "llama-cpp-unified", "paged", "paged-offload", "radix", "tensorrt-llm", "vattention"}
"""Here requests take slots as their tokens come. The others reserve what a request may ever hold, and never have to make room."""


@pytest.mark.parametrize("name", ALLOCATORS.names())
@given(workload=workloads())
@settings(max_examples=60)
def test_over_any_allocator_everyone_is_served_in_turn(name: str, workload: Workload) -> None:
    limits = workload.limits
    try:
        allocator: StepAllocator = step_allocator(name, workload.pool)
    except ConfigError as refusal:
        if name == "tensorrt-llm" and "tensorrt-llm needs a power of two, 2 or more" in str(refusal):
            reject()
        raise
    scheduler = Scheduler(limits, allocator)
    pending = list(workload.arrivals)
    asked: dict[int, Arrival] = {}
    got: dict[int, int] = {}
    order_of_start: list[int] = []
    order_of_end: list[int] = []
    num_preemptions = steps = 0
    while pending or scheduler.num_running or scheduler.num_waiting:
        while pending and pending[0].step <= steps:
            arrival = pending.pop(0)
            request = scheduler.add(prompt_tokens=arrival.prompt, output_tokens=arrival.output)
            if request is not None:
                asked[request] = arrival
        anyone = scheduler.num_running + scheduler.num_waiting > 0
        step = scheduler.schedule()
        scheduler.check_integrity()
        tokens = step.batch["num_scheduled_tokens"][: step.num_entries]
        assert (tokens > 0).all()
        assert tokens.sum() <= limits.max_num_batched_tokens
        assert scheduler.num_running <= limits.max_num_seqs
        assert (step.num_entries > 0) == anyone  # somebody always gets on: no request that was accepted waits for ever
        assert (step.blocker is Blocker.NONE) == (scheduler.num_waiting == 0)
        order_of_start += [r for r in step.batch["request"][: step.num_entries].tolist() if r not in order_of_start]
        num_preemptions += step.num_preempted
        scheduler.complete()
        scheduler.check_integrity()
        for request in scheduler.sampled.tolist():
            got[request] = got.get(request, 0) + 1
        order_of_end += scheduler.finished.tolist()
        assert len(asked) == len(order_of_end) + scheduler.num_running + scheduler.num_waiting
        steps += 1
        assert steps <= workload.most_steps()
    assert order_of_start == sorted(asked)  # first come, first served
    assert got == {request: arrival.output for request, arrival in asked.items()}
    assert sorted(order_of_end) == sorted(asked)
    assert allocator.free_slots == allocator.usable_slots
    for arrival in asked.values():
        assert (allocator.admission_slots(arrival.prompt, arrival.output) == 0) == (name in GROWS)
    assert num_preemptions == 0 or name in GROWS
    event(f"preempts: {num_preemptions > 0}")
