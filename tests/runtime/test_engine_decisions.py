"""A running engine decides as the simulator's scheduler does, which knows lengths only: batches, block tables, the free queue."""

import sys

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the runtime needs torch")
pytest.importorskip("pagedkv.runtime")
pytest.importorskip("transformers", reason="the runtime's models are transformers'")

from shadow import Ask, Shadow, ragged_asks, serve
from tiny_models import VOCAB, build

from pagedkv.allocation import KVPoolSettings
from pagedkv.runtime.engine import LLMEngine
from pagedkv.scheduling.content import shared_segments

WINDOWED = ("gemma3", "gpt_oss")
"""Families whose layers have block tables of their own."""
LIMITS = {"max_num_seqs": 12, "max_num_batched_tokens": 48, "max_model_len": 120}


def engine_and_shadow(
    *, family: str = "llama", caching: bool, policy: str = "fcfs", num_blocks: int = 60
) -> tuple[LLMEngine, Shadow]:
    model = build(family)
    engine = LLMEngine(model, num_blocks=num_blocks, block_size=4, enable_prefix_caching=caching, policy=policy, **LIMITS)
    for tensor in engine.storage._tensors:
        tensor.fill_(torch.nan)
    assert engine.allocator.name == ("hybrid" if family in WINDOWED else "paged")
    pool = KVPoolSettings(
        num_blocks=num_blocks,
        block_size=4,
        enable_prefix_caching=caching,
        layer_groups=engine.models.layers if family in WINDOWED else (),
        **LIMITS,
    )
    return engine, Shadow(engine, pool)


@pytest.mark.parametrize(
    ("family", "policy", "num_blocks", "least_preempted", "least_found"),
    [
        ("llama", "fcfs", 60, 6, 200),
        ("llama", "priority", 60, 6, 200),
        ("gemma3", "fcfs", 80, 3, 20),
        ("gpt_oss", "priority", 44, 5, 150),
    ],
)
@pytest.mark.parametrize("caching", [False, True])
def test_64_ragged_requests_are_scheduled_as_the_simulator_schedules_them(
    *, family: str, caching: bool, policy: str, num_blocks: int, least_preempted: int, least_found: int
) -> None:
    engine, shadow = engine_and_shadow(family=family, caching=caching, policy=policy, num_blocks=num_blocks)
    asks = ragged_asks(64)
    texts = serve(engine, shadow, asks)
    assert [len(text) for text in texts] == [ask.max_tokens for ask in asks]
    known = engine.scheduler.requests.arrays[:64]
    sys.stdout.write(
        f"caching {caching}, {policy}: {shadow.steps} steps, {shadow.preemptions} preemptions, {shadow.chunks} chunks, "
        f"{known['num_hit_tokens'].sum()} tokens found\n"
    )
    assert shadow.preemptions >= least_preempted
    assert shadow.chunks > 5
    assert bool(known["num_cached_tokens"].sum() >= least_found) is caching


def test_what_one_turn_generates_is_found_by_the_next() -> None:
    """The simulator knows a conversation as a stream; the engine knows what its outputs hash to."""
    engine, shadow = engine_and_shadow(caching=True, num_blocks=100)
    rng = np.random.default_rng(3)
    turns = [Ask([2 + i, *rng.integers(2, VOCAB, 14 + i).tolist()], 9 + i, 0) for i in range(6)]
    for turn in range(3):
        conversation = [
            ask._replace(content=shared_segments(np.array([i]), np.array([len(ask.prompt) + ask.max_tokens])))
            for i, ask in enumerate(turns)
        ]
        first, texts = engine.scheduler.requests.size, {}
        for ask in conversation:
            engine.add_request(ask.prompt, max_tokens=ask.max_tokens)
            shadow.add(ask, ask.max_tokens)
        while engine.num_unfinished:
            for new in engine.step():
                texts.setdefault(new.request - first, []).append(new.token)
        found = engine.scheduler.requests.arrays["num_cached_tokens"][first : first + 6].tolist()
        if turn:  # all blocks that were full at the end of the turn before: its last token was never computed
            assert found == [(len(ask.prompt) - 6) // 4 * 4 for ask in turns]
        turns = [Ask(ask.prompt + texts[i] + rng.integers(2, VOCAB, 5).tolist(), ask.max_tokens, 0) for i, ask in enumerate(turns)]


def test_texts_that_end_early_are_scheduled_as_if_their_length_had_been_known() -> None:
    asks = ragged_asks(40)
    engine, shadow = engine_and_shadow(caching=True)
    whole = serve(engine, shadow, asks)
    eos = int(np.bincount([token for text in whole for token in text]).argmax())
    cut = [text[: text.index(eos) + 1] if eos in text else text for text in whole]
    engine, shadow = engine_and_shadow(caching=True)
    assert serve(engine, shadow, asks, eos=eos, lengths=[len(text) for text in cut]) == cut
    assert sum(len(text) for text in whole) > sum(len(text) for text in cut)
