"""Settings that a refusal proposes would fit: each of them runs."""

import json
import re
import shlex

import pytest
from refused_commands import SHORT, refusal

from pagedkv.sims.cli import main


def proposals(message: str) -> list[str]:
    listed = message.partition("What fits: ")[2].strip()
    return re.sub(r" \(at its start: [^)]*\)", "", listed).split("; or ")


def with_changes(arguments: str, changes: str) -> list[str]:
    """Return `arguments` with the flags in `changes`, which replace those that are there."""

    def flags(text: str) -> dict[str, list[str]]:
        groups: dict[str, list[str]] = {}
        for word in shlex.split(text):
            if word.startswith("--"):
                groups[word] = [word]
            else:
                groups[next(reversed(groups))].append(word)
        return groups

    return [word for group in (flags(arguments) | flags(changes)).values() for word in group]


NEGATIVE_BUDGETS: dict[str, tuple[int, tuple[str, ...]]] = {
    # how many proposals at least, and what the message says
    "--users 5 --model llama-3.1-70b --quantization bf16": (3, ("Llama 3.1 70B needs", "GiB of weights in bf16", "32768")),
    "--users 5 --model opt-175b": (3, ("OPT 175B needs", "GiB of weights in fp16")),
    "--users 5 --model llama-3.1-70b --quantization fp8 --hardware h100-80gb": (3, ("H100", "is the longest that fits")),
    "--users 5 --hardware rtx-4090 --max-model-len 131072": (
        3,
        ("for one request of --max-model-len 131072", "is the longest that fits"),
    ),
    "--users 5 --num-gpu-blocks-override 999999": (1, ("by --num-gpu-blocks-override 999999", "are free")),
    "--users 5 --kv-cache-memory-bytes 1GiB": (2, ("--kv-cache-memory-bytes 1073741824 holds 8176 tokens", "needs 4.00 GiB")),
    "--users 5 --free-memory 102.2GiB --gpu-memory-utilization 0.92": (
        1,
        ("asks for 111.95 GiB", "only 102.20 GiB of NVIDIA DGX Spark (GB10) are free", "0.83 is the highest that starts"),
    ),
}


def test_a_negative_budget_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    message = refusal("--users 5 --model llama-3.1-70b --quantization bf16", capsys)
    needed, available, *parts = map(float, re.findall(r"([0-9.]+) GiB", message.partition("What fits")[0]))
    assert needed > available > 0
    assert needed == pytest.approx(sum(parts), abs=0.02)  # weights, engine and activations, KV cache
    assert len(parts) == 3
    assert available == pytest.approx(0.80 * 121.69, abs=0.01)


@pytest.mark.parametrize("arguments", NEGATIVE_BUDGETS)
def test_every_proposal_runs(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    number, parts = NEGATIVE_BUDGETS[arguments]
    message = refusal(arguments, capsys)
    for part in parts:
        assert part in message
    proposed = proposals(message)
    assert len(set(proposed)) == len(proposed) >= number
    for changes in proposed:
        main([*with_changes(arguments, changes), *shlex.split(SHORT), "--json", "-"])
        out, err = capsys.readouterr()
        assert json.loads(out)["budget"]["unassigned"] >= 0
        assert "error" not in err


def test_the_gate_opens_just_at_its_proposal(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--users 5 --free-memory 102.2GiB"
    refusal(f"{arguments} --gpu-memory-utilization 0.84", capsys)
    main(shlex.split(f"{arguments} --gpu-memory-utilization 0.83 {SHORT}"))
