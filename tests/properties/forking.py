"""A scheduler whose requests fork, and a memory that holds their tokens slot by slot."""

from dataclasses import dataclass, field

import numpy as np

from pagedkv.allocation import KVPoolSettings
from pagedkv.block_hash import BlockHashChain
from pagedkv.free_queue import NULL_BLOCK
from pagedkv.group_rules import GroupRule
from pagedkv.hybrid_steps import HybridStepAllocator
from pagedkv.kv_spec import LayerGroup
from pagedkv.paged_steps import PagedStepAllocator
from pagedkv.pooled_memory import PooledMemory
from pagedkv.scheduling.scheduler import Scheduler
from pagedkv.scheduling.scheduler_settings import SchedulerSettings
from pagedkv.scheduling.waiting import NUM_RUNNING
from pagedkv.step_batch import HELD

BLOCK = 4


def layers(kind: str, num_heads: int = 1, window: int | None = None) -> LayerGroup:
    return LayerGroup(kind=kind, num_layers=2, num_kv_heads=num_heads, key_dim=16, value_dim=16, window=window)  # type: ignore[arg-type]


MODELS: dict[str, tuple[LayerGroup, ...]] = {
    "one table": (),
    "window": (layers("sliding_window", window=6), layers("full")),
    "longer blocks of a window": (layers("full", 2), layers("sliding_window", window=5)),
    "chunks, in a block of less": (layers("full"), layers("chunked", 2, window=10)),
    "windows alone": (layers("sliding_window", window=9),),
}
"""The layers of models whose memory is forked here."""


@dataclass
class Forking:
    """A scheduler whose requests have tokens, and a memory that holds them, slot by slot."""

    scheduler: Scheduler
    rng: np.random.Generator
    chains: dict[int, BlockHashChain] = field(default_factory=dict)
    copies: int = 0

    @classmethod
    def of(
        cls,
        *,
        num_blocks: int = 30,
        rows: int = 6,
        caches: bool = True,
        drafts: int = 0,
        policy: str = "fcfs",
        seed: int = 0,
        model: str = "one table",
    ) -> "Forking":
        pool = KVPoolSettings(
            num_blocks=num_blocks,
            block_size=BLOCK,
            max_num_seqs=rows,
            max_model_len=60,
            lookahead_slots=drafts,
            enable_prefix_caching=caches,
            layer_groups=MODELS[model],
            max_num_batched_tokens=24,
        )
        limits = SchedulerSettings(
            max_num_seqs=rows, max_num_batched_tokens=24, max_model_len=60, num_speculative_tokens=drafts, policy=policy
        )
        allocator = HybridStepAllocator(pool) if MODELS[model] else PagedStepAllocator(pool)
        return cls(Scheduler(limits, allocator), np.random.default_rng(seed))

    def __post_init__(self) -> None:
        self.memory = np.full((self.allocator.pool.num_blocks, self.allocator.unit_slots), -1)

    @property
    def allocator(self) -> PooledMemory:
        allocator = self.scheduler.allocator
        assert isinstance(allocator, PooledMemory)
        return allocator

    @property
    def rules(self) -> tuple[GroupRule, ...]:
        allocator = self.allocator
        return allocator.layout.rules if isinstance(allocator, HybridStepAllocator) else (GroupRule(kind="full", block_size=BLOCK),)

    def keys(self, request: int) -> dict[str, object]:
        return {"keys": self.chains[request].keys} if self.scheduler.caches_prefixes else {}

    def add(self, prompt: list[int], output_tokens: int, priority: int = 0) -> int | None:
        chain = BlockHashChain(block_size=BLOCK)
        chain.extend(prompt)
        keys = {"keys": chain.keys, "keys_follow": True} if self.scheduler.caches_prefixes else {}
        request = self.scheduler.add(prompt_tokens=len(prompt), output_tokens=output_tokens, priority=priority, **keys)  # type: ignore[arg-type]
        if request is not None:
            self.chains[request] = chain
        return request

    def decoding(self) -> list[int]:
        """Return who can be forked."""
        known = self.scheduler.requests.arrays
        running = self.scheduler.arrays.running[: self.scheduler.arrays.counts[NUM_RUNNING]].tolist()
        return [
            i
            for i in running
            if known["num_computed_tokens"][i] == known["num_known_tokens"][i] - 1
            and known["num_known_tokens"][i] > known["prompt_tokens"][i]
        ]

    def replaced(self, parent: int) -> BlockHashChain:
        """Return the parent's tokens with another last one."""
        chain = BlockHashChain(block_size=BLOCK)
        chain.extend([*self.chains[parent].token_ids[:-1].tolist(), int(self.rng.integers(5))])
        return chain

    def fork(self, parent: int) -> int:
        chain = self.replaced(parent)
        keys = chain.keys if self.scheduler.caches_prefixes else None
        child = self.scheduler.fork(parent, keys=keys)
        self.chains[child] = chain
        self.check()
        return child

    def take_over(self, request: int, parent: int) -> None:
        chain = self.replaced(parent)
        self.scheduler.take_over(request, parent, keys=chain.keys if self.scheduler.caches_prefixes else None)
        self.chains[request] = chain
        self.check()

    def step(self, *, held: float = 0.0) -> None:
        """Do a step: copy, write, look at what everybody reads, draw new tokens."""
        scheduler, memory = self.scheduler, self.memory
        step = scheduler.schedule()
        batch = step.batch[: step.num_entries]
        for source, destination in self.allocator.copies.tolist():
            memory[destination] = memory[source]
            self.copies += 1
        reads, drafted_tokens = [], {}
        for entry in batch:
            request, last, known = int(entry["request"]), int(entry["num_slots_needed"]), int(entry["num_known_tokens"])
            ids = self.chains[request].token_ids
            drafted = self.rng.integers(5, size=max(last - known, 0))
            tokens = np.concatenate((ids, drafted))[:last]
            first = last - int(entry["num_scheduled_tokens"])
            drafted_tokens[request] = tokens
            for group, rule in enumerate(self.rules):
                places = np.arange(rule.num_skipped_tokens(first), last)  # what the first query of the step reads, and all others
                table = self.allocator.block_table(int(entry["row"]), group)
                slots = table[places // rule.block_size], places % rule.block_size
                assert slots[0].all()
                memory[slots[0][places >= first], slots[1][places >= first]] = tokens[first:]
                reads.append((slots, tokens[places]))
        for slots, wanted in reads:
            np.testing.assert_array_equal(memory[slots], wanted)
        accepted = [int(self.rng.integers(max(0, d) + 1)) for d in batch["num_slots_needed"] - batch["num_known_tokens"]]
        accepted = [HELD if self.rng.random() < held else count for count in accepted]
        batch["num_accepted_tokens"] = accepted
        before = scheduler.requests.arrays["num_known_tokens"].copy()
        scheduler.complete()
        for request, tokens in drafted_tokens.items():
            chain, known = self.chains[request], int(scheduler.requests.arrays["num_known_tokens"][request])
            if (gained := known - int(before[request])) > 0:
                old = len(chain.keys)
                chain.extend([*tokens[before[request] :][: gained - 1].tolist(), int(self.rng.integers(5))])
                if request not in scheduler.finished and scheduler.caches_prefixes and len(chain.keys) > old:
                    scheduler.add_keys(request, chain.keys[old:])
        self.check()

    def check(self) -> None:
        """Hold what the memory says of itself against its tables, block by block."""
        self.scheduler.check_integrity()
        allocator, rows = self.allocator, np.arange(self.scheduler.settings.max_num_seqs, dtype=np.int32)
        padded, held = allocator.padded_tables(rows), []
        for group in range(len(self.rules)):
            for row, table in zip(rows.tolist(), padded[group], strict=True):
                blocks = allocator.block_table(row, group)
                assert table.tolist() == [*blocks.tolist(), *[-1] * (table.size - blocks.size)]
                held += blocks[blocks != NULL_BLOCK].tolist()
        keyed = np.count_nonzero(allocator.pool.blocks["next_same"][allocator.pool.free_queue()])
        assert allocator.shared_slots == (len(held) - len(set(held))) * allocator.unit_slots
        assert allocator.cached_slots == keyed * allocator.unit_slots

    def finish(self) -> None:
        for _ in range(2000):
            if not self.scheduler.num_running + self.scheduler.num_waiting:
                break
            self.step()
        assert self.allocator.free_slots == self.allocator.usable_slots


def decode(one: Forking, prompt_tokens: int, output_tokens: int = 20) -> int:
    request = one.add(list(range(prompt_tokens)), output_tokens)
    assert request is not None
    while not one.decoding():
        one.step()
    return request
