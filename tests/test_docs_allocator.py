"""The guide to the allocator is true: its examples run, and its tables say what the registered allocators do."""

import doctest
import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pagedkv.allocation import Allocator, Forkable, KVPoolSettings
from pagedkv.allocators import ALLOCATORS
from pagedkv.block_hash import BlockHashChain
from pagedkv.eviction import EVICTION_POLICIES
from pagedkv.eviction_order import EvictionOrder
from pagedkv.fuzzing import hybrid_layers
from pagedkv.heaps import HEAPS
from pagedkv.kv_request import KVRequest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGE = DOCS / "allocator.md"
TEXT = PAGE.read_text(encoding="utf-8")
BLOCK_SIZE, PROMPT = 4, 14


def code_blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)


def tables(first_header: str) -> list[list[dict[str, str]]]:
    """The tables of the page whose first column has that header, a dict per row."""
    found = []
    for table in re.findall(r"(?:^\|.*\n)+", TEXT, re.MULTILINE):
        header, _, *rows = ([cell.strip() for cell in line.strip("|\n").split("|")] for line in table.splitlines())
        if header[0] == first_header:
            found.append([dict(zip(header, row, strict=True)) for row in rows])
    return found


def named(cell: str, names: tuple[str, ...]) -> list[str]:
    """The choices that a cell names; `x-*` stands for all that begin so."""
    found = []
    for name in re.findall(r"`([^`]+)`", cell):
        found += [each for each in names if each.startswith(name[:-1])] if name.endswith("*") else [name]
    return found


def column(table: list[dict[str, str]], header: str) -> dict[str, str]:
    """What a table says of each allocator."""
    return {name: row[header] for row in table for name in named(row["allocator"], ALLOCATORS.names())}


ROOM, SHARING, FUZZED = tables("allocator")


def allocator(name: str) -> Allocator:
    return ALLOCATORS.load(name)(
        KVPoolSettings(
            num_blocks=40,
            block_size=BLOCK_SIZE,
            max_model_len=32,
            max_num_seqs=3,
            page_tokens=8,
            enable_prefix_caching=True,
            offload_blocks=20,
            layer_groups=hybrid_layers(BLOCK_SIZE),
        )
    )


def request(name: str, tokens: list[int]) -> KVRequest:
    chain = BlockHashChain(block_size=BLOCK_SIZE)
    chain.extend(tokens)
    return KVRequest(request_id=name, num_tokens=len(tokens), block_keys=chain.keys, token_ids=chain.token_ids)


def serve(one: Allocator, guest: KVRequest, output_tokens: int = 2) -> int:
    """Compute all tokens of `guest`; return how many were cached."""
    slots = one.admission_slots(guest.num_tokens, output_tokens)
    assert slots is not None
    guest.admission_slots = slots
    cached = one.get_computed_tokens(guest)
    grant = one.allocate_slots(guest, guest.num_tokens - cached)
    assert grant is not None
    assert grant.num_cached_tokens == cached
    guest.num_computed_tokens = guest.num_tokens
    one.note_computed(guest)
    return cached


def test_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the page; code without a prompt is executed too, and names go from one block to the next."""
    for name in ("toy-allocator", "slip"):  # the page registers them: nobody else shall see them
        monkeypatch.setitem(ALLOCATORS._registered, name, None)
    names: dict[str, Any] = {"__name__": "allocator.md"}
    runner, parser, report = doctest.DocTestRunner(optionflags=doctest.REPORT_NDIFF), doctest.DocTestParser(), list[str]()
    for block in code_blocks():
        if ">>>" in block:
            test = parser.get_doctest(block, names, "allocator.md", str(PAGE), TEXT[: TEXT.index(block)].count("\n"))
            runner.run(test, out=report.append, clear_globs=False)
            names.update(test.globs)
        else:
            exec(compile(block, str(PAGE), "exec", dont_inherit=True), names)
    assert runner.summarize(verbose=False).failed == 0, "".join(report)
    assert runner.tries > 40


def test_the_toy_allocator_is_shown_in_full() -> None:
    assert (DOCS / "examples" / "toy_allocator.py").read_text(encoding="utf-8") in code_blocks()


def test_every_allocator_is_in_every_table() -> None:
    for table in (ROOM, SHARING, FUZZED):
        assert sorted(column(table, "allocator")) == list(ALLOCATORS.names())


def test_another_policy_costs_the_bytes_that_the_page_says() -> None:
    (said,) = re.findall(r"(\d+) bytes per block", TEXT)
    records = EvictionOrder(num_blocks=1, block_size=1).records
    assert sum(column.itemsize for column in records) == int(said)


def test_every_eviction_policy_is_in_the_table() -> None:
    (table,) = tables("policy")
    listed = [name for row in table for name in named(row["policy"], EVICTION_POLICIES.names())]
    assert sorted(listed) == list(EVICTION_POLICIES.names())


@pytest.mark.parametrize("name", ALLOCATORS.names())
def test_placement_and_forks_are_as_the_tables_say(name: str) -> None:
    placement = allocator(name).placement
    assert column(ROOM, "placement")[name] == ("heap" if placement in HEAPS.names() else placement)
    assert (column(SHARING, "fork")[name] != "no") == isinstance(allocator(name), Forkable)


@pytest.mark.parametrize("name", ALLOCATORS.names())
def test_what_is_reserved_is_as_the_table_says(name: str) -> None:
    """A prompt of 9 tokens and up to 5 outputs, of which 5 prompt tokens are computed first."""
    one, guest = allocator(name), request("a", [*range(9)])
    guest.admission_slots = one.admission_slots(9, 5) or 0
    assert one.allocate_slots(guest, 5) is not None
    unit = 8 if name == "vattention" else 1 if name == "llama-cpp-unified" else BLOCK_SIZE

    def whole(tokens: int) -> int:
        return -(-tokens // unit) * unit

    groups = one.num_groups
    expected = {
        "max_model_len": 32,
        "num_slots / max_num_seqs − state": 160 // 3,
        "prompt + output": 14,
        "prompt + 2^⌈log2 output⌉, up to max_model_len": 17,
        "all known tokens": whole(9),
    }
    said = column(ROOM, "reserved at admission")
    text = said[name].replace("`", "")
    assert one.num_slots_held(guest) == expected.get(text, whole(5) * groups)
    grows = {"paged", "paged-offload", "hybrid", "radix", "tensorrt-llm", "llama-cpp-unified", "vattention", "contiguous-growing"}
    assert (text not in expected or text == "all known tokens") == (name in grows) == (guest.admission_slots == 0)


@pytest.mark.parametrize("name", ALLOCATORS.names())
def test_hits_end_where_the_table_says(name: str) -> None:
    """Of a prompt of 14 tokens, all known before: all but one, or whole blocks of 4, or none."""
    one, tokens = allocator(name), [*range(PROMPT)]
    first = request("first", tokens)
    assert serve(one, first) == 0
    one.free(first)
    ends = column(SHARING, "a hit ends")[name]
    expected = {"with a token": PROMPT - 1, "": 0}.get(ends.partition(";")[0], PROMPT // BLOCK_SIZE * BLOCK_SIZE)
    assert serve(one, request("again", tokens)) == expected
    assert (expected > 0) == (column(SHARING, "shared")[name] != "nothing")


@pytest.mark.parametrize("name", ALLOCATORS.names())
def test_duplicates_are_as_the_table_says(name: str) -> None:
    """Two requests compute the same prompt side by side: neither is far enough for the other to find anything."""
    one, tokens = allocator(name), [*range(PROMPT)]
    first, second = request("first", tokens), request("second", tokens)
    for num_new_tokens in (1, PROMPT - 1):
        for guest in (first, second):
            guest.admission_slots = one.admission_slots(PROMPT, 2) or 0
            assert one.allocate_slots(guest, num_new_tokens) is not None
            guest.num_computed_tokens += num_new_tokens
        for guest in (first, second):
            one.note_computed(guest)
    said = column(SHARING, "duplicates")[name].partition(":")[0]
    common = np.intersect1d(one.slots_held(first)[:PROMPT], one.slots_held(second)[:PROMPT])
    assert (common.size > 0) == (said == "merged")


def test_the_drawing_is_there_and_says_what_it_shows() -> None:
    drawing = ET.parse(DOCS / "allocator.svg").getroot()
    texts = {child.tag.rpartition("}")[2]: "".join(child.itertext()) for child in drawing}
    assert texts["title"]
    assert "ring" in texts["desc"]
    assert "prefers-color-scheme: dark" in texts["style"]
    assert "](allocator.svg)" in TEXT


@pytest.mark.parametrize("page", ["allocator.md", "invariants.md"])
def test_every_file_that_a_page_names_is_there(page: str) -> None:
    text = (DOCS / page).read_text(encoding="utf-8")
    links = [DOCS / link for link in re.findall(r"\]\((?!http)([^)#]+)", text)]
    names = [ROOT / name for name in re.findall(r"`((?:tests|pagedkv|docs)/[\w/.]+)`", text)]
    assert len(links) + len(names) > 5
    assert not [str(path) for path in (*links, *names) if not path.exists()]
