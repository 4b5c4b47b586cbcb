"""llama.cpp's server: how a batch is cut into micro-batches."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from llama_cpp_scheduling import server
from steps import add, advance

from pagedkv.scheduling.llama_cpp_scheduler import LlamaCppScheduler
from pagedkv.scheduling.llama_cpp_step import most_passes
from pagedkv.scheduling.server_batch import ServerBatch
from pagedkv.scheduling.ubatches import equal_split, simple_split
from pagedkv.step_batch import empty_batch


def ubatches(one: LlamaCppScheduler) -> list[list[tuple[int, int, int]]]:
    """(request, tokens, slots needed) of each."""
    fields = ("request", "num_scheduled_tokens", "num_slots_needed")
    return [list(zip(*(batch[field].tolist() for field in fields), strict=True)) for batch in one.forward_passes()]


def parts(split: str, num_tokens: list[int], slots: list[int], n_ubatch: int) -> list[list[tuple[int, int]]]:
    """Cut a batch of so many tokens by entry, in these slots; return (entry, tokens) of each micro-batch."""
    size = len(num_tokens)
    server = ServerBatch.empty(
        n_batch=sum(num_tokens), n_ubatch=n_ubatch, cont_batching=True, equal_sequences=split == "equal", num_server_slots=size
    )
    batch, passes, ends = empty_batch(size), empty_batch(server.n_batch), np.zeros(most_passes(server), np.int64)
    batch["request"], batch["row"], batch["num_scheduled_tokens"] = np.arange(size), slots, num_tokens
    batch["num_slots_needed"] = batch["num_scheduled_tokens"] + 100
    order = np.arange(size)
    if split == "simple":
        number = simple_split(batch, order, n_ubatch, passes, ends)
    else:
        number = equal_split(batch, order, n_ubatch, np.zeros(size, np.int64), passes, ends)
    cut = np.split(passes[: ends[number - 1]], ends[: number - 1])
    computed = dict.fromkeys(range(size), 100)
    for entry, tokens, needed in ((*row,) for part in cut for row in part[["request", "num_scheduled_tokens", "num_slots_needed"]]):
        computed[entry] += tokens
        assert needed == computed[entry]
    return [list(zip(part["request"].tolist(), part["num_scheduled_tokens"].tolist(), strict=True)) for part in cut]


def test_one_stream_is_cut_every_n_ubatch_tokens() -> None:
    assert parts("simple", [1, 5], [0, 1], 4) == [[(0, 1), (1, 3)], [(1, 2)]]
    one = server(cells=100, n_ubatch=4)
    add(one, (2, 3))
    advance(one)
    add(one, (5, 1))
    one.schedule()
    assert ubatches(one) == [[(0, 1, 3), (1, 3, 3)], [(1, 2, 5)]]


def test_split_streams_are_as_long_as_each_other_in_a_micro_batch() -> None:
    one = server(cells=200, allocator="llama-cpp-split", n_ubatch=512)
    add(one, (2, 3))
    advance(one)
    add(one, (5, 1))
    one.schedule()
    # The first request got slot 1, the second slot 0: a gap in the order of the batch.
    assert ubatches(one) == [[(0, 1, 3)], [(1, 5, 5)]]
    assert parts("equal", [1, 1, 1], [0, 2, 3], 512) == [[(0, 1)], [(1, 1), (2, 1)]]
    assert parts("equal", [1, 1, 5], [0, 1, 2], 512) == [[(0, 1), (1, 1), (2, 1)], [(2, 4)]]
    one = server(cells=200, allocator="llama-cpp-split", n_ubatch=6)
    add(one, (9, 1), (4, 1))
    one.schedule()
    assert ubatches(one) == [[(1, 3, 3), (0, 3, 3)], [(1, 1, 4), (0, 1, 4)], [(0, 5, 9)]]


@given(sizes=st.lists(st.tuples(st.integers(1, 30), st.booleans()), min_size=1, max_size=8), n_ubatch=st.integers(1, 20))
def test_every_token_is_in_one_micro_batch(sizes: list[tuple[int, bool]], n_ubatch: int) -> None:
    tokens = [size for size, _ in sizes]
    slots = np.cumsum([1 + gap for _, gap in sizes]).tolist()
    for split in ("simple", "equal"):
        done = [0] * len(tokens)
        for part in parts(split, tokens, slots, n_ubatch):
            assert 0 < sum(size for _, size in part) <= n_ubatch
            for entry, size in part:
                done[entry] += size
        assert done == tokens
    for part in parts("equal", tokens, slots, n_ubatch):
        assert len({size for _, size in part}) == 1
