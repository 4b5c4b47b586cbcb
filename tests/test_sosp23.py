"""PagedAttention's figures 2 and 13a, reproduced by the committed configuration within the bars that docs/validation.md states."""

import json
from pathlib import Path
from typing import Any

import pytest

from pagedkv.sims.cli import main

CONFIG = Path(__file__).parents[1] / "docs" / "validation" / "sosp23.toml"

# Shares of KV memory in % (tokens, reserved, internal, external and others) and mean batch. Source: Kwon et al., SOSP 2023.
PAPER = {
    "contiguous-max": (20.4, 13.3, 57.3, 8.9, 7.00),
    "contiguous-pow2": (26.8, 17.9, 13.6, 41.6, 9.81),
    "contiguous-oracle": (38.2, 25.2, 0.0, 36.6, 13.62),
}


def simulate(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, dict[str, Any]]:
    main(["--config", str(CONFIG), "--json", "-", *arguments])
    return {result["allocator"]: result for result in json.loads(capsys.readouterr().out)["results"]}


@pytest.fixture(scope="module")
def lengths(shared_data: Path) -> list[str]:
    return ["--lengths", str(shared_data / "sharegpt_lengths.csv.gz"), "--lengths-in-order"]


def shares(kv: dict[str, float]) -> list[float]:
    """The columns of figure 2, in %: the paper's last one, "external and others", is all that no reservation covers."""
    return [100 * kv[kind] for kind in ("tokens", "reserved", "internal")] + [100 * (kv["external"] + kv["free"])]


def test_memory_shares_and_batch_of_the_paper(lengths: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    results = simulate(capsys, *lengths)
    maximum = results["contiguous-max"]
    assert f"{maximum['running_mean']:.2f}" == "7.00"
    assert f"{shares(maximum['kv_when_waiting'])[3]:.1f}" == "8.9"
    for name in ("contiguous-pow2", "contiguous-oracle"):
        *paper, batch = PAPER[name]
        assert shares(results[name]["kv_when_waiting"]) == pytest.approx(paper, abs=4.0)
        assert results[name]["running_mean"] == pytest.approx(batch, rel=0.10)
    kv = results["paged"]["kv"]
    taken = kv["tokens"] + kv["reserved"] + kv["internal"]
    assert kv["tokens"] / taken >= 0.96
    assert results["paged"]["running_mean"] > results["contiguous-oracle"]["running_mean"]


def test_waste_grows_with_the_block_size(lengths: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    unfilled = []
    for block_size in (1, 16, 64, 256):
        arguments = ["--allocator", "paged", "--duration", "600s", "--block-size", str(block_size)]
        kv = simulate(capsys, *lengths, *arguments)["paged"]["kv"]
        unfilled.append((kv["reserved"] + kv["internal"]) / (kv["tokens"] + kv["reserved"] + kv["internal"]))
    assert unfilled == sorted(unfilled)
    assert unfilled[0] == 0
    assert unfilled[3] > 0.15
