"""A scheduler that forgets requests that are done decides as one that does not."""

from hypothesis import given
from hypothesis import strategies as st

from pagedkv.allocation import KVPoolSettings
from pagedkv.block_hash import BlockHashChain
from pagedkv.scheduling.scheduler import Scheduler
from pagedkv.scheduling.scheduler_settings import SchedulerSettings
from pagedkv.step_allocation import step_allocator

BLOCK = 4


def scheduler(policy: str, *, caches: bool) -> Scheduler:
    pool = KVPoolSettings(num_blocks=14, block_size=BLOCK, max_num_seqs=5, max_model_len=40, enable_prefix_caching=caches)
    return Scheduler(
        SchedulerSettings(max_num_seqs=5, max_num_batched_tokens=24, max_model_len=40, policy=policy), step_allocator("paged", pool)
    )


class Side:
    """One of the two, with its own numbers for requests that both know by when they came."""

    def __init__(self, policy: str, *, caches: bool) -> None:
        self.scheduler, self.came = scheduler(policy, caches=caches), dict[int, int]()
        self.chains = dict[int, BlockHashChain]()

    def add(self, number: int, text: int, prompt: int, output: int, priority: int, *, follow: bool) -> None:
        chain = BlockHashChain(block_size=BLOCK)
        chain.extend([text] * (prompt if follow else prompt + output - 1))
        keys = chain.keys if self.scheduler.caches_prefixes else None
        request = self.scheduler.add(
            prompt_tokens=prompt, output_tokens=output, priority=priority, keys=keys, keys_follow=follow and keys is not None
        )
        assert request is not None
        self.came[request] = number
        if follow and keys is not None:
            self.chains[request] = chain

    def step(self) -> tuple[object, ...]:
        one = self.scheduler
        step = one.schedule()
        batch = step.batch[: step.num_entries]
        tables = [one.allocator.tables.of(row).tolist() for row in batch["row"].tolist()]  # type: ignore[attr-defined]
        decided = (self.numbers(batch["request"]), batch["num_scheduled_tokens"].tolist(), tables, self.numbers(one.preempted))
        if not step.num_entries:
            return decided
        one.complete()
        for request in one.sampled.tolist():
            if (chain := self.chains.get(request)) is not None and request not in one.finished:
                before = len(chain.keys)
                chain.extend([9])
                one.add_keys(request, chain.keys[before:])
        one.check_integrity()
        cached = one.requests.arrays["num_cached_tokens"][one.finished].tolist()
        return (*decided, self.numbers(one.sampled), self.numbers(one.finished), cached, one.allocator.free_slots)

    def numbers(self, requests: object) -> list[int]:
        return [self.came[request] for request in requests.tolist()]  # type: ignore[attr-defined]

    def abort(self, number: int) -> bool:
        request = next((request for request, came in self.came.items() if came == number), None)
        if request is None:
            return False
        self.chains.pop(request, None)
        return self.scheduler.abort(request)

    def forget(self) -> None:
        kept = self.scheduler.forget_done().tolist()
        assert self.scheduler.requests.size == len(kept) == self.scheduler.num_running + self.scheduler.num_waiting
        self.came = {i: self.came[old] for i, old in enumerate(kept)}
        self.chains = {i: self.chains[old] for i, old in enumerate(kept) if old in self.chains}


ADD = st.tuples(st.just("add"), st.integers(0, 2), st.integers(1, 25), st.integers(1, 14), st.integers(0, 2), st.booleans())
OPERATION = st.one_of(ADD, st.just(("step",)), st.just(("forget",)), st.tuples(st.just("abort"), st.integers(0, 20)))


@given(st.lists(OPERATION, max_size=60), st.sampled_from(["fcfs", "priority"]), st.booleans())
def test_forgetting_changes_no_decision(operations: list[tuple[object, ...]], policy: str, caches: bool) -> None:
    keeps, forgets = Side(policy, caches=caches), Side(policy, caches=caches)
    added = 0
    for name, *values in (*operations, *[("step",), ("step",), ("forget",)] * 20):
        if name == "add":
            *lengths, follow = values
            for side in (keeps, forgets):
                side.add(added, *lengths, follow=bool(follow))  # type: ignore[arg-type]
            added += 1
        elif name == "step":
            assert forgets.step() == keeps.step()
        elif name == "abort":
            assert forgets.abort(*values) == keeps.abort(*values)  # type: ignore[arg-type]
        else:
            forgets.forget()
