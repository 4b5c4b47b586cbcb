"""Users held in the same memory: what each way comes to is what its shapes say, and all ways answer alike."""

import json

import pytest

from pagedkv.errors import ConfigError

torch = pytest.importorskip("torch", reason="the runtime needs torch")
pytest.importorskip("pagedkv.runtime")
pytest.importorskip("transformers", reason="the runtime's models are transformers'")

from tiny_models import build

from pagedkv.runtime.users_held import main, study_users

TOKEN_BYTES = 4 * 2 * 2 * 16 * 4
"""Keys and values of a token in all layers of the tiny models."""
BUDGET, NEW, LONGEST = 260_000, 6, 100
LENGTHS = (9, 30, 17, 5, 22, 11, 40, 8, 13, 19, 26, 7, 33, 10, 15, 21)


@pytest.mark.parametrize("block_size", [4, 16])
def test_each_way_holds_what_its_shapes_say(block_size: int) -> None:
    study = study_users(build("llama"), LENGTHS, new_tokens=NEW, budget_bytes=BUDGET, max_model_len=LONGEST, block_size=block_size)
    blocks, dynamic, static = study.holdings
    tokens = [length + NEW - 1 for length in LENGTHS]  # the last token is never cached
    pool = BUDGET // (block_size * TOKEN_BYTES) - 1  # and the null block
    needed = [-(-each // block_size) for each in tokens]
    assert sum(needed[: blocks.max_users]) <= pool < sum(needed[: blocks.max_users + 1])
    assert blocks.peak_bytes == (sum(needed[: blocks.max_users]) + 1) * block_size * TOKEN_BYTES
    assert static.max_users == BUDGET // (LONGEST * TOKEN_BYTES)
    assert static.failed_peak_bytes > BUDGET
    assert sum(tokens[: dynamic.max_users]) * TOKEN_BYTES <= dynamic.peak_bytes <= BUDGET
    # While a layer's keys grow, both are there: one of the 8 tensors of the longest.
    assert sum(tokens[: dynamic.max_users + 1]) * TOKEN_BYTES + max(tokens) * TOKEN_BYTES // 8 + 64 > BUDGET
    assert static.max_users < blocks.max_users
    assert study.num_texts_alike == static.max_users


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"budget_bytes": 10**8}, "all 16 users are held; give more of them, or less memory"),
        ({"budget_bytes": 40_000}, "not even one user is held; give more memory"),
        ({"max_model_len": 40}, "prompts of up to 40 tokens, 6 new ones: max_model_len is 40"),
    ],
)
def test_what_cannot_be_studied(asked: dict[str, int], why: str) -> None:
    given = {"budget_bytes": BUDGET, "max_model_len": LONGEST} | asked
    with pytest.raises(ConfigError, match=why):
        study_users(build("llama"), LENGTHS, new_tokens=NEW, **given)


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--num-users", "14", "--new-tokens", "3", "--budget", "1MiB", "--max-model-len", "300", "--json"]) == 0
    study = json.loads(capsys.readouterr().out)
    assert [each["max_users"] for each in study["holdings"]][2] == 2**20 // (300 * 4 * 2 * 2 * 32 * 4)
    assert main(["--budget", "1 pie"]) == 2
    assert "--budget" in capsys.readouterr().err
