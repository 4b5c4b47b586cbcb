"""Prefix caches on traces: figures known from elsewhere, plain oracles, and what is refused."""

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from pagedkv.arrays import Int64Array
from pagedkv.errors import ConfigError, TraceFormatError
from pagedkv.sims.console_prefix import show_prefix_study
from pagedkv.sims.prefix_replay import REPLAYS, replay_block_pool, replay_ideal_lru, replay_radix
from pagedkv.sims.prefix_study import CACHES, capacity_reaching, study_prefixes
from pagedkv.sims.prompt_content import PromptContent
from pagedkv.sims.traces import read_trace

SIZE = 4


def line(length: int, ids: object, time: float = 0) -> str:
    return json.dumps({"timestamp": time, "input_length": length, "output_length": 1, "hash_ids": ids}) + "\n"


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], Path]:
    def write(content: str) -> Path:
        path = tmp_path / "trace.jsonl"
        path.write_text(content)
        return path

    return write


def test_known_hit_ratios_of_the_mooncake_trace(shared_data: Path) -> None:
    """Source: a plain LRU over the trace, computed independently."""
    path = shared_data / "mooncake_synthetic.jsonl.gz"
    study = study_prefixes(path, caches="ideal-lru,block-pool")
    rows = {(row.cache, row.blocks): (row.hit_ratio_blocks, row.hit_ratio_tokens) for row in study.rows}
    assert (study.requests, study.prompt_blocks, study.distinct_blocks, study.block_tokens) == (3_993, 121_877, 43_924, 512)
    assert [round(rows["ideal-lru", blocks][0], 4) for blocks in (None, 30_000, 10_000)] == [0.6396, 0.6242, 0.4235]
    assert round(rows["ideal-lru", None][1], 4) == 0.6512
    assert rows["block-pool", None][0] < rows["ideal-lru", None][0]  # partial blocks are never found
    for blocks in (30_000, 10_000):
        # The pool drops a prompt's tail before its head, and keeps no partial blocks, so it finds a little more than the ideal one.
        assert rows["ideal-lru", blocks][0] < rows["block-pool", blocks][0] < rows["ideal-lru", blocks][0] + 0.015
    assert [20_000 < answer.capacity_for_90_percent < 21_000 for answer in study.capacities] == [True, False]
    assert 19_000 < study.capacities[1].capacity_for_90_percent < 20_000
    trace = read_trace(path, with_content=True)
    assert trace.content is not None
    found = replay_radix(trace.content, trace.prompt_tokens, 10_000, "lru")[0].sum() / study.prompt_blocks
    assert found == pytest.approx(rows["ideal-lru", 10_000][0], abs=0.001)


def content_of(prompts: Sequence[Sequence[int]], lasts: Sequence[int]) -> tuple[PromptContent, Int64Array]:
    """Return prompts with one id per distinct prefix and content, and their lengths; the last block of each has `lasts` tokens."""
    ids = dict[tuple[int, ...], int]()
    rows = [
        [ids.setdefault((*prompt[: i + 1], last if i + 1 == len(prompt) else SIZE), 1000 - len(ids)) for i in range(len(prompt))]
        for prompt, last in zip(prompts, lasts, strict=True)
    ]
    offsets = np.cumsum([0, *map(len, rows)])
    lengths = [SIZE * (len(prompt) - 1) + last for prompt, last in zip(prompts, lasts, strict=True)]
    return PromptContent(ids=np.concatenate(rows), offsets=offsets, tokens_per_id=SIZE), np.array(lengths)


PROMPTS = st.lists(
    st.tuples(st.lists(st.integers(0, 1), min_size=1, max_size=5), st.integers(1, SIZE)), min_size=1, max_size=30
).map(lambda prompts: content_of(*zip(*prompts, strict=True)))


@given(PROMPTS)
def test_without_evictions_all_that_came_before_is_found(case: tuple[PromptContent, Int64Array]) -> None:
    prompts, lengths = case
    seen, full_seen = set[int](), set[int]()
    expected, expected_full = list[int](), list[int]()
    for i, length in enumerate(lengths.tolist()):
        ids = prompts.of(i).tolist()
        full = ids[: length // SIZE]
        expected.append(next((n for n, block in enumerate(ids) if block not in seen), len(ids)))
        may_hit = full[: (length - 1) // SIZE]
        expected_full.append(next((n for n, block in enumerate(may_hit) if block not in full_seen), len(may_hit)))
        seen.update(ids)
        full_seen.update(full)
    room = prompts.ids.size
    blocks, tokens = replay_ideal_lru(prompts, lengths, room)
    assert blocks.tolist() == expected
    assert tokens.tolist() == [min(SIZE * n, length) for n, length in zip(expected, lengths.tolist(), strict=True)]
    blocks, tokens = replay_radix(prompts, lengths, room, "lru")
    assert blocks.tolist() == expected
    assert tokens.tolist() == [min(SIZE * n, length - 1) for n, length in zip(expected, lengths.tolist(), strict=True)]
    blocks, tokens = replay_block_pool(prompts, lengths, room, "lru")
    assert blocks.tolist() == expected_full
    assert (tokens == SIZE * blocks).all()


@given(PROMPTS, st.integers(1, 12))
def test_a_full_cache_keeps_what_was_used_last(case: tuple[PromptContent, Int64Array], capacity: int) -> None:
    prompts, lengths = case
    recent = list[int]()  # the most recently used first
    expected = list[int]()
    for i in range(len(prompts)):
        ids = prompts.of(i).tolist()
        expected.append(next((n for n, block in enumerate(ids) if block not in recent), len(ids)))
        recent = [*reversed(ids), *(block for block in recent if block not in ids)][:capacity]
    assert replay_ideal_lru(prompts, lengths, capacity)[0].tolist() == expected


@pytest.mark.parametrize("eviction", ["lru", "cost-aware"])
@pytest.mark.parametrize("name", CACHES)
@given(case=PROMPTS, capacity=st.integers(1, 12))
def test_nobody_finds_more_than_without_evictions(
    name: str, eviction: str, case: tuple[PromptContent, Int64Array], capacity: int
) -> None:
    prompts, lengths = case
    blocks, tokens = REPLAYS[name](prompts, lengths, capacity, eviction)
    most_blocks, most_tokens = REPLAYS[name](prompts, lengths, prompts.ids.size, eviction)
    assert (blocks <= most_blocks).all()
    assert (tokens <= most_tokens).all()
    assert name == "ideal-lru" or (blocks <= capacity).all()


def test_a_prompt_that_is_longer_than_the_cache_leaves_nothing() -> None:
    prompts, lengths = content_of([[1, 2, 3], [1], [1, 2, 3], [1]], [SIZE, 2, SIZE, 2])
    for replay in (replay_block_pool, replay_radix):
        assert replay(prompts, lengths, 2, "lru")[0].tolist() == [0, 0, 0, 0 if replay is replay_block_pool else 1]


@given(st.integers(1, 10**6), st.integers(1, 10**6))
def test_the_search_finds_the_capacity(needed: int, more: int) -> None:
    asked = list[int]()

    def ratio_of(capacity: int) -> float:
        asked.append(capacity)
        return float(capacity >= needed)

    found = capacity_reaching(1, ratio_of, needed + more - 1)
    assert needed <= found <= max(needed, needed * 1.0102)
    assert len(asked) < 30
    assert capacity_reaching(0, ratio_of, needed) == 0


SMALL = line(1024, [7, 9], 10) + line(1030, [7, 9, 4], 20) + line(700, [7, 5], 0)


def test_a_study_and_its_document(write: Callable[[str], Path]) -> None:
    study = study_prefixes(write(SMALL), blocks="inf, 2,inf", caches="ideal-lru,block-pool", evictions="lru")
    document = json.loads(json.dumps(study.document()))
    rows = [tuple(row.values()) for row in document["rows"]]
    assert list(document["rows"][0]) == ["cache", "eviction", "blocks", "hit_ratio_blocks", "hit_ratio_tokens"]
    assert rows == [
        ("ideal-lru", "lru", "inf", 3 / 7, (512 + 1024) / 2754),  # in order of time: 7 5, 7 9, 7 9 4
        ("ideal-lru", "lru", 2, 3 / 7, (512 + 1024) / 2754),
        ("block-pool", "lru", "inf", 3 / 7, (512 + 1024) / 2754),
        ("block-pool", "lru", 2, 1 / 7, 512 / 2754),  # 7 9 4 does not fit
    ]
    assert document["capacities"][1] == {
        "cache": "block-pool",
        "eviction": "lru",
        "best_hit_ratio_blocks": 3 / 7,
        "capacity_for_90_percent": 3,
    }
    assert (document["requests"], document["prompt_tokens"], document["distinct_blocks"]) == (3, 2754, 4)
    text = io.StringIO()
    show_prefix_study(study, Console(file=text, width=80))
    assert "42.86%" in text.getvalue()
    assert "1,536" in text.getvalue()
    assert all(len(shown.rstrip()) <= 80 for shown in text.getvalue().split("\n"))


def test_a_trace_without_repetition_needs_no_cache(write: Callable[[str], Path]) -> None:
    study = study_prefixes(write(line(5, [1]) + line(6, [2])), caches="radix")
    assert [(row.blocks, row.hit_ratio_blocks) for row in study.rows] == [(None, 0), (30_000, 0), (10_000, 0)]
    assert study.capacities[0].capacity_for_90_percent == 0


def test_an_ideal_cache_knows_one_policy(write: Callable[[str], Path]) -> None:
    study = study_prefixes(write(SMALL), blocks="3", caches="radix,ideal-lru", evictions="mru,fifo")
    assert [(row.cache, row.eviction) for row in study.rows] == [("radix", "mru"), ("radix", "fifo"), ("ideal-lru", "lru")]


@pytest.mark.parametrize("word", ["0", "-3", "1.5", "many", "1_000", "9" * 12, "10,,20", ""])
def test_a_bad_capacity_is_refused(word: str, write: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match=r"blocks is '.*': needs (whole numbers from 1 .*or inf|one or more values)"):
        study_prefixes(write(SMALL), blocks=word)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"caches": "radixx"}, "unknown cache 'radixx': did you mean radix"),
        ({"caches": "vllm"}, "unknown cache 'vllm': known: block-pool, ideal-lru, radix"),
        ({"evictions": "lru,lfru"}, "unknown eviction policy 'lfru': did you mean lru or lfu or tlru"),
        ({"caches": "ideal-lru", "evictions": "lfu"}, "ideal-lru evicts by lru, not by lfu: for other policies choose block-pool"),
        ({"evictions": ""}, "eviction is '': needs one or more values separated by commas"),
    ],
)
def test_a_wrong_name_is_refused(flags: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):  # before the file is looked for
        study_prefixes(tmp_path / "absent", **flags)


BAD_CONTENT: dict[str, tuple[str, str]] = {
    "none": (SMALL.replace("hash_ids", "ids"), r"trace.jsonl: no hash_ids in it.*needs lines such as .*hash_ids"),
    "one missing": (SMALL + line(3, None), r"line 4, key hash_ids: None is not a list of whole numbers"),
    "float": (SMALL + line(3, [1.0]), r"line 4, key hash_ids: \[1.0\] is not a list of whole numbers"),
    "bool": (line(3, [True]), "line 1, key hash_ids"),
    "negative": (line(3, [-1]), "line 1, key hash_ids"),
    "too large": (line(3, [2**63]), "line 1, key hash_ids"),
    "too many": (SMALL + line(512, [7, 8]), "line 4, key hash_ids: 2 ids for 512 tokens; needed are 1, one per 512 tokens"),
    "too few": (line(513, [7]), "line 1, key hash_ids: 1 ids for 513 tokens; needed are 2"),
    "another prefix": (SMALL + line(600, [5, 9]), r"line 4, key hash_ids: 5 follows None, but 7 in line 3; an id stands for all"),
    "twice": (line(1200, [1, 2, 1]), "line 1, key hash_ids: 1 follows 2, but None in line 1"),
    "csv": ("arrival_s,prompt_tokens,output_tokens\n0,1,1\n", r"generic-csv does not say what prompts are made of; .*hash_ids"),
}


@pytest.mark.parametrize("case", BAD_CONTENT)
def test_content_that_cannot_be_is_refused_if_it_is_asked_for(case: str, write: Callable[[str], Path]) -> None:
    text, message = BAD_CONTENT[case]
    path = write(text)
    with pytest.raises(TraceFormatError, match=message):
        study_prefixes(path)
    assert read_trace(path).content is None


def test_content_stays_with_its_request(write: Callable[[str], Path]) -> None:
    trace = read_trace(write(SMALL), with_content=True)
    assert trace.content is not None
    assert (trace.prompt_tokens.tolist(), len(trace.content)) == ([700, 1024, 1030], 3)
    assert [trace.content.of(i).tolist() for i in range(3)] == [[7, 5], [7, 9], [7, 9, 4]]
    some = trace.where(np.array([True, False, True])).content
    assert some is not None
    assert [some.of(i).tolist() for i in range(len(some))] == [[7, 5], [7, 9, 4]]
    none = trace.where(np.zeros(3, bool)).content
    assert none is not None
    assert (len(none), none.ids.size) == (0, 0)
    assert trace.scaled(2).content is trace.content
