"""A real vLLM run: read, replayed, fitted on its first minute and scored on the rest; and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pagedkv.errors import ConfigError
from pagedkv.sims.cli import main
from pagedkv.sims.validation.log_replay import machine_of, replay, scenario_of
from pagedkv.sims.validation.log_section import section
from pagedkv.sims.validation.vllm_log import FILES, is_log, read_log

META = {
    "model": "meta-llama/Llama-3.1-8B",
    "vllm_version": "0.19.0",
    "engine_kwargs": {"max_num_seqs": 8, "max_num_batched_tokens": 2048, "max_model_len": 4096, "kv_cache_dtype": "auto"},
    "kv_cache": {"num_gpu_blocks": 500, "block_size": 16, "enable_prefix_caching": True},
    "hardware": {"device_name": "NVIDIA GeForce RTX 4090"},
}
REQUEST = {
    "arrival_s": 0.0,
    "prompt_tokens": 40,
    "output_tokens": 5,
    "hash_ids": [0, 1],
    "scheduled_s": 0.0,
    "first_token_s": 0.1,
    "finish_s": 0.2,
}


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Path]:
    def write(meta: dict[str, Any] | None = None, requests: list[dict[str, Any]] | None = None, header: str | None = None) -> Path:
        (tmp_path / FILES[0]).write_text(json.dumps(META if meta is None else META | meta))
        lines = [json.dumps(request) for request in ([REQUEST, REQUEST | {"arrival_s": 0.5}] if requests is None else requests)]
        (tmp_path / FILES[1]).write_text("\n".join(lines))
        columns = "t,prompt_throughput,gen_throughput,running,waiting,kv_cache_pct" if header is None else header
        (tmp_path / FILES[2]).write_text(columns + "\n1.0,80,10,2,0,1.5\n")
        return tmp_path

    return write


def test_a_log_is_read_with_what_its_prompts_share(written: Callable[..., Path]) -> None:
    log = read_log(written())
    assert is_log(log.folder)
    assert (log.num_gpu_blocks, log.block_size, len(log.trace)) == (500, 16, 2)
    assert log.trace.content is not None
    first, second = (log.trace.content.of(i).tolist() for i in range(2))
    assert first[:2] == second[:2] == [0, 1]
    assert first[2] != second[2]  # what is no full block is a prompt's own
    scenario = scenario_of(log, machine_of(log).name)
    run = replay(scenario).run
    assert run.log.num_cached_tokens.tolist() == [0, 32]
    assert run.log.num_output_tokens.tolist() == [5, 5]


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(written: Callable[..., Path], name: str) -> None:
    folder = written()
    (folder / name).unlink()
    with pytest.raises(ConfigError, match=f"no {name}; a vLLM log is a folder with meta.json"):
        read_log(folder)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"requests": [{k: v for k, v in REQUEST.items() if k != "finish_s"}]}, "no finish_s; needs arrival_s"),
        ({"requests": []}, "is empty"),
        ({"header": "t,running"}, "no prompt_throughput and no gen_throughput"),
        ({"meta": {"kv_cache": {}}}, "num_gpu_blocks"),
        ({"requests": [REQUEST | {"prompt_tokens": "many"}]}, "needs numbers"),
    ],
)
def test_a_log_that_lacks_something_is_refused_with_what_it_needs(
    written: Callable[..., Path], change: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        read_log(written(**change))


def test_a_log_of_another_version_device_or_model_is_refused_with_those_that_are_known(written: Callable[..., Path]) -> None:
    log = read_log(written(meta={"vllm_version": "0.7.3"}))
    with pytest.raises(ConfigError, match=r"vLLM 0.7.3, whose rules are not modelled; the versions are 0.19, 0.33"):
        scenario_of(log, "rtx-4090")
    log = read_log(written(meta={"hardware": {"device_name": "Abacus"}}))
    with pytest.raises(ConfigError, match="unknown device 'Abacus'; name its machine with --hardware"):
        machine_of(log)
    log = read_log(written(meta={"model": "nobody/knows"}))
    with pytest.raises(ConfigError, match="unknown model 'nobody/knows'"):
        scenario_of(log, "rtx-4090")


def test_a_broken_json_is_refused(written: Callable[..., Path]) -> None:
    folder = written()
    (folder / FILES[0]).write_text("{")
    with pytest.raises(ConfigError, match="cannot be read as a vLLM log"):
        read_log(folder)


def test_the_run_of_an_rtx_4090_is_reproduced_from_its_first_minute(shared_data: Path) -> None:
    shown = section(shared_data / "vllm_rtx4090_llama31_8b")
    assert len(shown.checks) == 9
    assert {check.what: check.outcome for check in shown.checks if check.outcome != "holds"} == {}
    assert shown.details["engine"] == "vllm@0.19"


def test_nothing_after_the_first_minute_is_looked_at_by_the_fit(shared_data: Path, tmp_path: Path) -> None:
    """A log whose later times are nonsense gives the same constants."""
    source = shared_data / "vllm_rtx4090_llama31_8b"
    other = tmp_path / "log"
    shutil.copytree(source, other, copy_function=shutil.copyfile)
    other.chmod(0o755)
    lines = []
    for line in (source / FILES[1]).read_text().splitlines():
        request = json.loads(line)
        for key in ("first_token_s", "finish_s"):
            if request[key] > 60:
                request[key] += 1000
        lines.append(json.dumps(request))
    (other / FILES[1]).write_text("\n".join(lines))
    assert section(other).details["constants"] == section(source).details["constants"]


def test_a_folder_with_a_log_is_scored_by_the_command(shared_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["validate", "--data", str(shared_data / "vllm_rtx4090_llama31_8b"), "--json", "-"])
    document = json.loads(capsys.readouterr().out)
    assert [each["name"] for each in document["sections"]] == ["vllm_log"]
    assert document["holds"]


def test_a_log_is_replayed_on_a_file_s_machine_from_any_folder(
    written: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = tmp_path / "machines" / "mine.toml"
    machine.parent.mkdir()
    machine.write_text('like = "rtx-4090"')
    log = read_log(written())
    monkeypatch.chdir(machine.parent.parent)
    assert scenario_of(log, "machines/mine.toml").deployment.hardware.like == "rtx-4090"
    assert scenario_of(log, str(machine)).deployment.hardware.like == "rtx-4090"


def test_seconds_of_a_replay_are_means_of_each_second(written: Callable[..., Path]) -> None:
    log = read_log(written())
    running, used = replay(scenario_of(log, machine_of(log).name)).seconds(4)
    assert running.shape == used.shape == (4,)
    assert 0 < running[0] <= 2
    assert np.all((used >= 0) & (used <= 100))
