"""docs/sayings.md: its commands are run, and its tables are what comes out."""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PAGE = (Path(__file__).parents[1] / "docs" / "sayings.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r'^## "(.*?)"\n(.*?)(?=^## |\Z)', PAGE, re.S | re.M))


def commands(section: str) -> list[list[str]]:
    return [shlex.split(line)[1:] for line in re.findall(r"^simulate .*$", SECTIONS[section], re.M)]


def table(section: str) -> list[list[float | None]]:
    """The numbers of a section's table, row by row, without its first column of words."""
    rows = [line for line in SECTIONS[section].splitlines() if line.startswith("|")][2:]
    return [[_number(cell) for cell in row.strip("|").split("|")] for row in rows]


def _number(cell: str) -> float | None:
    found = re.search(r"\d[\d,]*\.?\d*", cell)
    return None if found is None else float(found[0].replace(",", ""))


Asked = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def asked(said: Callable[..., tuple[str, str]]) -> Asked:
    def ask(*words: str) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(said(*words, "--json", "-")[0])
        return document

    return ask


def test_paging_and_batching_against_one_at_a_time(asked: Asked) -> None:
    section = "PagedAttention serves 100 users where naive serving handles one or two"
    users = [asked(*words)["answers"][0]["value"] for words in commands(section)]
    assert users == [row[-1] for row in table(section)]
    assert users[0] > 100 > 2 >= users[1]


def test_prefix_caching(asked: Asked) -> None:
    section = "Prefix caching makes chat with a system prompt 29–45 % faster"
    for words, (number, prefix, sooner, more) in zip(commands(section), table(section), strict=True):
        cached, plain = (asked(*words, *flag)["results"][0] for flag in ([], ["--no-enable-prefix-caching"]))
        assert words[words.index("--users") + 1] == f"{number:.0f}"
        assert words[words.index("--prefix-len") + 1] == f"{prefix:.0f}"
        assert 100 * (1 - cached["e2e_s"]["mean"] / plain["e2e_s"]["mean"]) == pytest.approx(sooner, abs=0.5)
        assert 100 * (cached["output_tokens_per_s"] / plain["output_tokens_per_s"] - 1) == pytest.approx(more, abs=0.5)


def test_speculation_by_acceptance_and_batch(asked: Asked) -> None:
    section = "Speculative decoding is 2–3 × faster; below 30 % acceptance it is not faster"
    rows = table(section)
    expected = {(users, row[0]): row[1 + i] for row in rows for i, users in enumerate(("1", "64"))}
    for words in commands(section):
        users, rate = words[words.index("--users") + 1], float(words[-1])
        with_drafts, without = asked(*words), asked(*words[: words.index("--speculative-model")])
        gain = with_drafts["results"][0]["output_tokens_per_s"] / without["results"][0]["output_tokens_per_s"]
        assert gain == pytest.approx(expected.pop((users, rate)), abs=0.005)
    assert not expected


def test_prefill_against_decode(asked: Asked) -> None:
    section = "TensorRT-LLM prefills 10,000 tokens/s and decodes 38"
    one, many = (asked(*words)["results"][0] for words in commands(section))
    (_, prefill, decode, alone), (*_, together) = table(section)
    assert 2048 / one["ttft_s"]["p50"] == pytest.approx(prefill, rel=0.005)
    assert 1 / one["tpot_s"]["p50"] == pytest.approx(decode, abs=0.05)
    assert one["output_tokens_per_s"] == pytest.approx(alone, abs=0.5)
    assert many["output_tokens_per_s"] == pytest.approx(together, abs=0.5)
    published = (10256.9, 38.65)
    assert prefill == pytest.approx(published[0], rel=0.05)
    assert decode == pytest.approx(published[1], rel=0.05)


def test_unfilled_slots_by_block_size(asked: Asked) -> None:
    section = "No fragmentation with paging"
    for words, (size, *shares, external) in zip(commands(section), table(section), strict=True):
        assert words[-1] == f"{size:.0f}"
        kv = asked(*words)["results"][0]["kv"]
        held = kv["tokens"] + kv["reserved"] + kv["internal"]
        assert [100 * kv[kind] / held for kind in ("tokens", "reserved", "internal")] == pytest.approx(shares, abs=0.051)
        assert kv["external"] == external == 0


def test_every_saying_is_judged() -> None:
    assert len(SECTIONS) == 5
    assert all("**It holds" in text for text in SECTIONS.values())
