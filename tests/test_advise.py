"""Advice is what was measured: every value that it names has a run behind it that gained."""

import json
import shlex
from typing import Any

import pytest

from pagedkv.sims.advise import GAIN, Advice, advise, serve_command
from pagedkv.sims.cli import main
from pagedkv.sims.command import changed
from pagedkv.sims.config import ATTAIN, LoadConfig, MeasurementConfig, ServingConfig, SimulationConfig
from pagedkv.sims.deployment import deploy
from pagedkv.sims.from_vllm import parse_vllm_command
from pagedkv.sims.probe import probe

TINY = SimulationConfig(
    load=LoadConfig(users=14, think_time="1s", random_input_len=400, random_output_len=60, random_range_ratio=0.5),
    serving=ServingConfig(hardware="rtx-4090", kv_cache_memory_bytes="400MiB", max_model_len=1024),
    measurement=MeasurementConfig(duration="10s", warmup="4s", goodput=("ttft:400", "tpot:40")),
)


@pytest.fixture(scope="module")
def advice() -> Advice:
    return advise(TINY, attain=ATTAIN)


def test_a_crowded_cache_is_made_narrower(advice: Advice) -> None:
    assert next((trial.setting, trial.value, trial.before) for trial in advice.kept) == ("kv_cache_dtype", "fp8", "auto")
    before, after = advice.attained
    assert before is not None
    assert after is not None
    assert after > before + GAIN


def test_every_figure_is_one_of_a_run(advice: Advice) -> None:
    config = TINY
    assert probe(config, "paged", attain=ATTAIN).attained == advice.attained[0]
    for trial in advice.trials:
        tried = probe(changed(config, **{trial.setting: trial.value}), "paged", attain=ATTAIN)
        assert (tried.attained, tried.figures["output_tokens_per_s"]) == (trial.attained, trial.output_tokens_per_s)
        assert f"{tried.attained:.1%}" in trial.reason
        if trial.kept:
            config = tried.config
    assert probe(config, "paged", attain=ATTAIN).attained == advice.attained[1]
    assert {trial.setting for trial in advice.trials} == {"kv_cache_dtype", "block_size", "max_num_seqs", "max_num_batched_tokens"}


def test_the_command_means_what_was_run(advice: Advice, capsys: pytest.CaptureFixture[str]) -> None:
    read = parse_vllm_command(advice.serve, base=ServingConfig(hardware="rtx-4090"))
    assert (read.without_effect, read.not_modelled) == ((), ())
    best = changed(TINY, **{trial.setting: trial.value for trial in advice.kept}).serving
    there, here = deploy(read.serving), deploy(best)
    assert (there.budget, there.scheduler, there.pool) == (here.budget, here.scheduler, here.pool)
    main([*shlex.split(advice.simulate)[1:], "--json", "-"])
    result = json.loads(capsys.readouterr().out)["results"][0]
    assert result["output_tokens_per_s"] == advice.output_tokens_per_s[1]
    assert result["verdict"]["text"] == advice.verdict


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gpu_memory_utilization": 0.7, "enforce_eager": True, "max_num_seqs": 9},
        {"kv_cache_memory_bytes": "8GiB", "enable_chunked_prefill": False, "block_size": 64},
        {"quantization": "fp8", "kv_cache_dtype": "fp8", "num_gpu_blocks_override": 4000, "long_prefill_token_threshold": 99},
    ],
)
def test_a_serve_command_is_read_back_as_it_was_meant(changes: dict[str, Any]) -> None:
    serving = ServingConfig(**changes)
    read = deploy(parse_vllm_command(serve_command(serving), base=ServingConfig()).serving)
    here = deploy(serving)
    assert (read.budget, read.scheduler, read.pool, read.weight_format) == (
        here.budget,
        here.scheduler,
        here.pool,
        here.weight_format,
    )


def test_without_need_the_defaults_stay() -> None:
    calm = changed(TINY, users=1, kv_cache_memory_bytes=None, think_time="3s", goodput=("ttft:900000",))
    found = advise(calm, attain=ATTAIN)
    assert found.meets
    rates = {trial.output_tokens_per_s for trial in found.kept}
    before = found.output_tokens_per_s[0]
    assert before is not None
    assert all(rate is not None and rate > before * (1 + GAIN) for rate in rates)
    assert "gpu_memory_utilization" not in {trial.setting for trial in found.kept}
    assert "--max-num-seqs" not in found.serve


def test_what_the_user_has_set_is_left_alone() -> None:
    given = changed(TINY, kv_cache_dtype="fp8", max_num_seqs=7, num_gpu_blocks_override=200, kv_cache_memory_bytes=None)
    found = advise(given, attain=ATTAIN)
    assert {trial.setting for trial in found.trials} == {"max_num_batched_tokens"}
    assert "--max-num-seqs 7" in found.serve


def test_a_machine_that_may_freeze_is_not_advised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pagedkv.sims.advise.UTILIZATION_STEPS", (0.14, 0.9))
    spark = changed(TINY, hardware="dgx-spark", kv_cache_memory_bytes=None, users=1, duration="2s")
    trials = [trial for trial in advise(spark, attain=ATTAIN).trials if trial.setting == "gpu_memory_utilization"]
    assert [(trial.value, trial.kept, trial.output_tokens_per_s) for trial in trials] == [(0.94, False, None), (1.7, False, None)]
    assert "may freeze" in trials[0].reason
    assert "1.7" in trials[1].reason


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("", "--users N"),
        ("--users 3 --allocator contiguous-max", "allocator is paged"),
        ("--users 3 --attain 7", "attain is 7"),
        ("--request-rate 3", "--users N"),
        ("--users 3 --model llama-3.1-70b --hardware rtx-4090", "GiB"),
    ],
)
def test_what_cannot_work_is_refused(flags: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(shlex.split(f"advise {flags}"))
    out, err = capsys.readouterr()
    assert (exit.value.code, out) == (2, "")
    assert message in err


def test_the_command_line(advice: Advice, capsys: pytest.CaptureFixture[str]) -> None:
    flags = (
        "advise --users 14 --think-time 1s --random-input-len 400 --random-output-len 60 --random-range-ratio 0.5 "
        "--hardware rtx-4090 --kv-cache-memory-bytes 400MiB --max-model-len 1024 "
        "--duration 10s --warmup 4s --goodput ttft:400 tpot:40"
    )
    main(shlex.split(f"{flags} --json -"))
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(advice.document()))
    main(shlex.split(flags))
    out = capsys.readouterr().out
    assert advice.serve in out
    assert "--kv-cache-dtype fp8 instead of auto: within the goals" in out
    assert "check its answers" in out
