"""Advice is what was measured: every value that it names has a run behind it that gained."""

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pagedkv.catalogue import load_hardware
from pagedkv.errors import ConfigError
from pagedkv.sims.advise import REPEATS, Advice, advise
from pagedkv.sims.block_sizes import kernel_words, measured
from pagedkv.sims.cli import main
from pagedkv.sims.command import changed
from pagedkv.sims.config import ATTAIN, LoadConfig, MeasurementConfig, ServingConfig, SimulationConfig
from pagedkv.sims.deployment import deploy
from pagedkv.sims.from_vllm import parse_vllm_command
from pagedkv.sims.gain import GAIN, gain
from pagedkv.sims.probe import probe
from pagedkv.sims.serve_command import CHECKPOINTS, checkpoint_note, serve_command

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
    config = changed(TINY, repeats=REPEATS)
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


SETTINGS: dict[str, st.SearchStrategy[Any]] = {
    "engine": st.sampled_from(["vllm", "vllm@0.33", "vllm@0.19"]),
    "model": st.sampled_from(["qwen3-8b", "qwen2.5-7b", "opt-13b", "gpt-oss-20b"]),
    "kv_cache_dtype": st.sampled_from(["auto", "fp8", "bf16", "fp8_e5m2"]),
    "max_model_len": st.none() | st.integers(512, 2048),
    "block_size": st.sampled_from([16, 32, 64]),
    "gpu_memory_utilization": st.none() | st.sampled_from([0.85, 0.88]),
    "kv_cache_memory_bytes": st.none() | st.sampled_from(["8GiB", "3000MB"]),
    "num_gpu_blocks_override": st.none() | st.integers(2000, 3000),
    "max_num_seqs": st.none() | st.integers(1, 300),
    "max_num_batched_tokens": st.none() | st.integers(2048, 4096),
    "enable_prefix_caching": st.none() | st.booleans(),
    "enable_chunked_prefill": st.booleans(),
    "long_prefill_token_threshold": st.sampled_from([0, 99]),
    "scheduler_reserve_full_isl": st.none() | st.booleans(),
    "enforce_eager": st.booleans(),
    "watermark": st.sampled_from([0.0, 0.01, 0.05]),
    "quantization": st.none() | st.sampled_from(["fp8", "nvfp4", "awq", "bf16", "fp16", "float32"]),
    "disable_hybrid_kv_cache_manager": st.booleans(),
}


@given(changes=st.fixed_dictionaries({"hardware": st.just("h100")}, optional=SETTINGS))
@settings(max_examples=100, deadline=None)
def test_from_vllm_reads_a_serve_command_as_it_was_meant(changes: dict[str, Any]) -> None:
    serving = ServingConfig(**changes)
    try:
        command = serve_command(serving)
    except ConfigError:
        assume(False)
    base = ServingConfig(hardware="h100", engine=serving.engine)
    read, here = deploy(parse_vllm_command(command, base=base).serving), deploy(serving)
    assert read.budget == here.budget
    assert read.scheduler == here.scheduler
    assert read.config.disable_hybrid_kv_cache_manager == here.config.disable_hybrid_kv_cache_manager
    assert replace(read.pool, kv_cache_dtype="") == replace(here.pool, kv_cache_dtype="")  # bfloat16 for bf16
    assert read.weight_format.bits_per_weight == here.weight_format.bits_per_weight


FLAGS = {
    "vllm": "quantization kv-cache-dtype dtype max-model-len block-size gpu-memory-utilization kv-cache-memory-bytes watermark "
    "num-gpu-blocks-override max-num-seqs max-num-batched-tokens no-enable-chunked-prefill no-enable-prefix-caching "
    "long-prefill-token-threshold no-scheduler-reserve-full-isl scheduler-reserve-full-isl enforce-eager "
    "disable-hybrid-kv-cache-manager",
}
FLAGS["vllm@0.19"] = FLAGS["vllm"].replace("watermark ", "")


@given(changes=st.fixed_dictionaries({"hardware": st.just("h100")}, optional=SETTINGS))
@settings(max_examples=60, deadline=None)
def test_a_serve_command_has_what_its_version_takes(changes: dict[str, Any]) -> None:
    """Quantization is a method that vLLM applies to weights as they are; formats that it only reads are a repository's name."""
    try:
        words = shlex.split(serve_command(ServingConfig(**changes)))
    except ConfigError:
        assume(False)
    engine = "vllm@0.19" if changes.get("engine") == "vllm@0.19" else "vllm"
    assert {word.removeprefix("--") for word in words if word.startswith("--")} <= set(FLAGS[engine].split())
    after = dict(zip(words, words[1:], strict=False))
    assert after.get("--quantization", "fp8") in ("fp8", "mxfp8")
    assert after.get("--dtype", "float16") in ("bfloat16", "float16", "float32")
    assert after["--kv-cache-dtype"] in ("auto", "bfloat16", "float16", "fp8", "fp8_e4m3", "fp8_e5m2")


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"watermark": 0.02}, "--watermark 0.02"),
        ({"scheduler_reserve_full_isl": False}, "--no-scheduler-reserve-full-isl"),
        ({"engine": "vllm@0.19"}, "--no-scheduler-reserve-full-isl"),
        ({"engine": "vllm@0.19", "scheduler_reserve_full_isl": True}, "--scheduler-reserve-full-isl"),
        ({"quantization": "nvfp4"}, "vllm serve '<nvfp4 checkpoint of meta-llama/Llama-3.1-8B>' "),
        ({"quantization": "int4"}, "vllm serve '<int4 checkpoint of meta-llama/Llama-3.1-8B>' "),
        ({"quantization": "fp8"}, "vllm serve meta-llama/Llama-3.1-8B --quantization fp8 "),
        ({"quantization": "fp16"}, "--dtype float16"),
        ({"model": "gpt-oss-20b", "disable_hybrid_kv_cache_manager": True}, "--disable-hybrid-kv-cache-manager"),
    ],
)
def test_what_was_asked_for_is_in_the_command(changes: dict[str, Any], part: str) -> None:
    assert part in serve_command(ServingConfig(**changes))
    note = checkpoint_note(ServingConfig(**changes))
    assert (note is not None) == (changes.get("quantization") in CHECKPOINTS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization": "q4_k_m"}, "vllm does not read it, a format of GGUF files"),
        ({"model": "gpt-oss-20b", "quantization": "bf16"}, "cannot serve"),
        ({"kv_cache_dtype": "fp8/bf16"}, "stores keys and values alike"),
    ],
)
def test_what_vllm_cannot_serve_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        serve_command(ServingConfig(**changes))


# --- reasons --------------------------------------------------------------------------------------------------------


def test_every_value_has_a_reason(advice: Advice) -> None:
    values = {value.setting: value for value in advice.values}
    assert list(values) == ["kv_cache_memory_bytes", "kv_cache_dtype", "block_size", "max_num_seqs", "max_num_batched_tokens"]
    assert values["kv_cache_memory_bytes"].reason == "as you set it"
    words = shlex.split(advice.serve)
    for name, value in values.items():
        shown = str(400 << 20) if name == "kv_cache_memory_bytes" else str(value.value)
        assert words[words.index(f"--{name.replace('_', '-')}") + 1] == shown
    kept = {trial.setting: trial for trial in advice.kept}
    for name, trial in kept.items():
        assert values[name].reason.startswith(f"instead of {trial.before}: {trial.reason}")
    assert any(value.reason.startswith("the default for this machine; of ") for value in advice.values)


def test_the_block_size_has_its_waste_here_and_the_kernel_where_it_was_measured(advice: Advice) -> None:
    reason = next(value.reason for value in advice.values if value.setting == "block_size")
    kv = probe(changed(TINY, repeats=REPEATS), "paged", attain=ATTAIN).figures["kv"]
    unfilled = (kv["reserved"] + kv["internal"]) / (kv["tokens"] + kv["reserved"] + kv["internal"])
    assert f"16: {unfilled:.1%}, 32: " in reason
    assert "not measured on a GPU with discrete memory" in reason
    (times,) = measured()
    assert "16: 5.48" in reason
    assert times.command in reason
    on_gpu = replace(times, kind="discrete", machine="some card")
    with mock.patch("pagedkv.sims.block_sizes.measured", return_value=(times, on_gpu)):
        words = kernel_words(load_hardware("rtx-4090"))
        assert "some card" in words
        assert "Zen" not in words
        assert "not measured" in kernel_words(load_hardware("dgx-spark"))


def test_measured_times_are_of_the_sizes_of_the_study_and_as_the_docs_report_them() -> None:
    text = (Path(__file__).parents[1] / "docs" / "benchmarks.md").read_text()
    for times in measured():
        assert tuple(times.kernel_ms) == (8, 16, 32, 64, 128)
        assert times.kind in ("cpu", "discrete", "unified")
        assert ", ".join(f"{ms:.2f}" for ms in times.kernel_ms.values()) in text


def test_chance_is_no_reason() -> None:
    """A throughput 3 % higher on average gains if it is higher with every seed, and not if some seeds say otherwise."""
    best = replace(probe(changed(TINY, goodput=(), repeats=REPEATS), "paged", attain=ATTAIN), by_repeat=((None, 100.0),) * REPEATS)
    rate = best.figures["output_tokens_per_s"]
    for rates, gains in (((103.0, 102.0, 104.0, 103.0, 103.0), True), ((120.0, 90.0, 115.0, 85.0, 105.0), False)):
        tried = replace(
            best, figures=best.figures | {"output_tokens_per_s": 1.03 * rate}, by_repeat=tuple((None, each) for each in rates)
        )
        found, reason = gain(best, tried, ATTAIN)
        assert found is gains
        assert ("within chance" in reason) is not gains


def test_throughput_that_brings_nobody_within_the_goals_is_no_gain() -> None:
    """Neither where the goals are missed; where they are met, or nobody asked, it is."""
    found = probe(changed(TINY, repeats=REPEATS), "paged", attain=ATTAIN)
    for share, gains in ((0.0, False), (0.9, False), (1.0, True)):
        best = replace(found, attained=share, by_repeat=((share, 100.0),) * REPEATS)
        rates = tuple((share, 150.0 + k) for k in range(REPEATS))
        faster = replace(best, figures=best.figures | {"output_tokens_per_s": 1e6}, by_repeat=rates)
        told, reason = gain(best, faster, ATTAIN)
        assert told is gains
        assert ("nothing gained in the goals" in reason) is not gains


@pytest.mark.parametrize(("goals", "format_"), [("tpot:9", "fp8"), ("tpot:5", "nvfp4"), ("tpot:1", None)])
def test_fewer_bits_of_weights_are_shown_apart_where_goals_are_missed(
    goals: str, format_: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a 5090 needs to read 8 B weights in 16 bits is more than 9 ms; the widest format that meets the goals is the last."""
    load = "--users 1 --think-time 1s --random-input-len 40 --random-output-len 30 --duration 20s --warmup 2s"
    machine = "--hardware rtx-5090 --max-model-len 1024 --max-num-seqs 8 --max-num-batched-tokens 1024 --block-size 32"
    words = f"advise {load} {machine} --kv-cache-dtype fp8 --gpu-memory-utilization 0.8"
    main(shlex.split(f"{words} --goodput {goals} --json -"))
    found = json.loads(capsys.readouterr().out)
    tried = found["narrower_weights"]
    assert not found["meets"]
    assert "quantization" not in {trial["setting"] for trial in found["kept"]}
    assert "--quantization" not in found["serve"]
    assert [each["meets"] for each in tried[:-1]] == [False] * (len(tried) - 1)
    assert next((each["quantization"] for each in tried if each["meets"]), None) == format_
    main(shlex.split(f"{words} --goodput {goals}"))
    out = capsys.readouterr().out
    assert "Not advised, since the answers change: fewer bits of weights" in out
    assert (tried[-1]["serve"] in out) is (format_ is not None)
    main(shlex.split(f"{words} --goodput {goals} --quantization fp8 --json -"))
    assert json.loads(capsys.readouterr().out)["narrower_weights"] == []  # the user's own wish


def test_without_need_the_defaults_stay() -> None:
    calm = changed(TINY, users=1, kv_cache_memory_bytes=None, think_time="3s", goodput=("ttft:900000",))
    found = advise(calm, attain=ATTAIN)
    assert found.meets
    rates = {trial.output_tokens_per_s for trial in found.kept}
    before = found.output_tokens_per_s[0]
    assert before is not None
    assert all(rate is not None and rate > before * (1 + GAIN) for rate in rates)
    assert "gpu_memory_utilization" not in {trial.setting for trial in found.kept}
    assert f"--max-num-seqs {deploy(calm.serving).scheduler.max_num_seqs}" in found.serve


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
    assert "--kv-cache-dtype fp8  instead of auto: within the goals" in out
    assert "check its answers" in out
