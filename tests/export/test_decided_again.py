"""What an engine decides where nobody asks is written down so that it is decided again."""

from pathlib import Path
from unittest import mock

import pytest

from pagedkv.errors import ConfigError
from pagedkv.sims.cli import main
from pagedkv.sims.config_file import file_text
from pagedkv.sims.results import rerun_settings
from pagedkv.sims.scenario import Scenario, resolve


def resolved(argv: list[str]) -> Scenario:
    """Return the scenario that the command line `argv` runs."""
    with mock.patch("pagedkv.sims.scenario.resolve", side_effect=ConfigError("seen")) as asked, pytest.raises(SystemExit):
        main(argv)
    return resolve(asked.call_args[0][0])


@pytest.mark.parametrize(
    "flags",
    [
        "--engine vllm --max-model-len 2000 --no-enable-chunked-prefill",
        "--engine vllm --max-model-len 2000 --no-enable-chunked-prefill --max-num-batched-tokens 2100",
        "--engine naive --max-model-len 2000",
        "--engine naive --max-num-seqs 3",
        "--engine orca --max-model-len 50000 --max-num-seqs 7",
        "--engine vattention --no-enable-chunked-prefill",
        "--engine llama-cpp",
        "--engine llama-cpp --max-num-seqs 4",
        "--engine llama-cpp --max-num-seqs 4 --no-kv-unified",
        "--engine llama-cpp --max-num-seqs 6 --kv-unified",
        "--engine llama-cpp --max-num-seqs 3000 --kv-unified --max-num-batched-tokens 3000",
        "--engine llama-cpp --parallel 3",
        "--engine llama-cpp --parallel 3 --kv-unified",
        "--engine llama-cpp --kv-unified",
        "--engine llama-cpp --no-kv-unified",
        "--engine llama-cpp --parallel 4 --ctx-size 20000 --max-model-len 4000",
        "--engine ollama --parallel 2",
        "--engine ollama --max-num-seqs 2 --ctx-size 8192",
    ],
)
def test_what_an_engine_decides_is_written_down_so_that_it_is_decided_again(flags: str) -> None:
    """Filled-in limits may read as another wish: llama-server's slots share their cells only if nobody says how many there are."""
    first = resolved(["--users", "6", *flags.split()])
    Path("config.toml").write_text(file_text(rerun_settings(first), Path()), encoding="utf-8")
    second = resolved(["--config", "config.toml"])
    assert second.deployment.scheduler == first.deployment.scheduler
    assert second.deployment.budget == first.deployment.budget
    assert second.allocators == first.allocators
    assert second.config == first.config, "the proposals of both are worded alike"
    for allocator in first.allocators:
        first.deployment.scheduler_over(allocator)  # which an engine refuses on memory that is not its own
    assert rerun_settings(resolve(first.config)) == rerun_settings(first), "what is left out says nothing"
