"""What a request gets of a pool of reusable blocks, compiled: its tokens are known by the streams that it goes through."""

from pagedkv.arrays import Int32Array
from pagedkv.jit import lean_jit
from pagedkv.priority_queue import NUM_QUEUED
from pagedkv.reuse_moves import NUM_HOLDERS, num_free_blocks
from pagedkv.reuse_rows import (
    ReuseArrays,
    ReuseRules,
    admit_row,
    find_nothing,
    find_prefix,
    grow_row,
    note_row,
    release_row,
    store_row,
)
from pagedkv.scheduling.content import Segments
from pagedkv.scheduling.requests import RequestArrays
from pagedkv.scheduling.stream_tokens import StreamTokens, stream_tokens_of
from pagedkv.step_memory import (
    admit,
    begin_step,
    covers,
    find_cached,
    free_row,
    grant,
    keep_content,
    moved_blocks,
    note_computed,
    nothing_moved,
    rows_of,
    slots_of,
)


@lean_jit
def _root(memory: ReuseArrays) -> int:
    """Return where the sequences of no namespace begin: requests that are known by streams have none."""
    return memory.pool.blank.size


@begin_step.register(ReuseArrays)
@lean_jit
def _begin_step(memory: ReuseArrays, rules: ReuseRules) -> None:
    pass


@covers.register(ReuseArrays)
@lean_jit
def _covers(memory: ReuseArrays, rules: ReuseRules, row: int, num_slots: int, num_computed: int) -> bool:
    return num_slots <= int(memory.num_blocks[row]) * rules.block_size


@grant.register(ReuseArrays)
@lean_jit
def _grant(
    memory: ReuseArrays, rules: ReuseRules, requests: RequestArrays, segments: Segments, request: int, row: int, num_tokens: int
) -> bool:
    return grow_row(memory, rules, row, requests["num_computed_tokens"][request] + num_tokens)


@find_cached.register(ReuseArrays)
@lean_jit
def _find_cached(memory: ReuseArrays, rules: ReuseRules, requests: RequestArrays, segments: Segments, request: int) -> int:
    """Find the longest stored prefix, matched to the token."""
    if not rules.caches:
        return find_nothing(memory)
    source = stream_tokens_of(requests, segments, request)
    return find_prefix(memory, rules, _root(memory), source, requests["num_known_tokens"][request])


@admit.register(ReuseArrays)
@lean_jit
def _admit(
    memory: ReuseArrays,
    rules: ReuseRules,
    requests: RequestArrays,
    segments: Segments,
    request: int,
    row: int,
    num_cached: int,
    num_tokens: int,
    something_runs: bool,  # noqa: FBT001
) -> bool:
    kept_free = rules.watermark_blocks if something_runs else 0
    return admit_row(memory, rules, row, num_tokens, requests["num_known_tokens"][request], kept_free)


@note_computed.register(ReuseArrays)
@lean_jit
def _note_computed(
    memory: ReuseArrays, rules: ReuseRules, requests: RequestArrays, segments: Segments, request: int, row: int
) -> None:
    """Store the blocks that have become full."""
    num_computed = requests["num_computed_tokens"][request]
    if rules.caches and num_computed >= memory.rows["next_full"][row]:
        source: StreamTokens = stream_tokens_of(requests, segments, request)
        note_row(memory, rules, _root(memory), source, row, num_computed, requests["num_known_tokens"][request])


@keep_content.register(ReuseArrays)
@lean_jit
def _keep_content(
    memory: ReuseArrays, rules: ReuseRules, requests: RequestArrays, segments: Segments, request: int, row: int
) -> None:
    """Store all that is computed, the last block too as far as it is filled; never the last known token."""
    if rules.caches:
        num_tokens = min(requests["num_computed_tokens"][request], requests["num_known_tokens"][request] - 1)
        store_row(memory, rules, _root(memory), stream_tokens_of(requests, segments, request), row, num_tokens)


@free_row.register(ReuseArrays)
@lean_jit
def _free_row(memory: ReuseArrays, rules: ReuseRules, row: int) -> None:
    release_row(memory, row)


moved_blocks.register(ReuseArrays)(nothing_moved)


@slots_of.register(ReuseArrays)
@lean_jit
def _slots_of(memory: ReuseArrays, rules: ReuseRules) -> tuple[int, int, int, int]:
    pool, size, num_free = memory.pool, rules.block_size, num_free_blocks(memory.pool)
    num_shares = pool.counts[NUM_HOLDERS] - (pool.ref_cnt.size - num_free)
    return num_free * size, pool.gpu.counts[NUM_QUEUED] * size, num_shares * size, 0


@rows_of.register(ReuseArrays)
@lean_jit
def _rows_of(memory: ReuseArrays, rules: ReuseRules) -> tuple[Int32Array, int, int]:
    return memory.num_blocks, rules.block_size, memory.states.shape[1]
