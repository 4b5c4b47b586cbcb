"""The meter counts what there is, and the study's figures are those that can be computed."""

import json

import pytest

from pagedkv.errors import ConfigError

torch = pytest.importorskip("torch", reason="the runtime needs torch")
pytest.importorskip("pagedkv.runtime")
pytest.importorskip("transformers", reason="the runtime's models are transformers'")

from tiny_models import build

from pagedkv.runtime import study_memory
from pagedkv.runtime.cache_meter import CacheMeter
from pagedkv.runtime.memory_study import main, ragged_lengths

TOKEN_BYTES = 4 * 2 * 2 * 16 * 4
"""Keys and values of a token in all layers of the tiny models."""


def test_the_meter_sees_tensors_come_and_go() -> None:
    given = torch.ones(256)
    with CacheMeter() as meter:
        view = given.view(16, 16)[2:]
        kept = view * 2
        part = kept[:1]
    assert meter.live_bytes == 14 * 16 * 4
    del kept
    assert meter.live_bytes == 14 * 16 * 4  # a view keeps all of it
    del part
    assert (meter.live_bytes, meter.peak_bytes) == (0, 14 * 16 * 4)


def test_contiguous_caches_take_what_their_shapes_say() -> None:
    lengths, new_tokens = ragged_lengths(12, median=12, longest=40), 6
    study = study_memory(build("llama"), lengths, new_tokens=new_tokens, budget_bytes=300_000, block_size=4)
    rows = {row.cache: row for row in study.rows}
    rectangle = len(lengths) * (max(lengths) + new_tokens - 1) * TOKEN_BYTES
    assert rows["DynamicCache"].held_bytes == rectangle
    # While a layer's keys grow, both are there: one of the 8 tensors.
    assert rows["DynamicCache"].peak_bytes == rectangle + len(lengths) * (max(lengths) + new_tokens - 2) * TOKEN_BYTES // 8
    assert rectangle <= rows["StaticCache"].held_bytes <= rows["StaticCache"].peak_bytes < rectangle + 4096
    blocks = sum(-(-(length + new_tokens - 1) // 4) for length in lengths) + 1
    assert rows["PagedCache"].held_bytes == blocks * 4 * TOKEN_BYTES
    assert study.token_bytes == sum(length + new_tokens - 1 for length in lengths) * TOKEN_BYTES
    # A budget of some ten sequences: in a much smaller one the padding of contiguous caches is not worth one more.
    assert rows["PagedCache"].max_seqs > max(rows["StaticCache"].max_seqs, rows["DynamicCache"].max_seqs)
    assert all(0 < row.max_seqs_bytes <= 300_000 < row.peak_bytes for row in study.rows)


def test_windows_give_back() -> None:
    lengths = ragged_lengths(8, median=30, longest=60)
    options = {"new_tokens": 8, "budget_bytes": 150_000, "block_size": 4}
    held = {name: study_memory(build(name), lengths, **options).rows[0].held_bytes for name in ("llama", "gemma3")}
    assert held["gemma3"] <= held["llama"]


def test_the_command_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--num-prompts", "5", "--new-tokens", "3", "--budget", "300KiB", "--json"]
    assert main(arguments) == 0
    studies = json.loads(capsys.readouterr().out)
    assert [study["model"] for study in studies] == ["llama", "gemma3_text"]
    assert main([*arguments[:-2], "9GiB"]) == 2
    assert "smaller budget" in capsys.readouterr().err


def test_what_cannot_be_studied_is_refused() -> None:
    with pytest.raises(ConfigError, match="not one sequence fits"):
        study_memory(build("llama"), [9, 9], budget_bytes=10)
    with pytest.raises(ConfigError, match="2 new ones"):
        study_memory(build("llama"), [9, 9], new_tokens=1, budget_bytes=10)
