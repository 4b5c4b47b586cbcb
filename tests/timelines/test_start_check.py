"""What is proposed starts: a proposal that the timeline calls frozen or refused is none, or says what its start takes."""

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starts import request, timeline

from pagedkv.budget_advice import settings_that_fit
from pagedkv.errors import ConfigError
from pagedkv.memory_budget import MemoryBudget
from pagedkv.sims.advise import advise
from pagedkv.sims.cli import main
from pagedkv.sims.config import ATTAIN, LoadConfig, MeasurementConfig, ServingConfig, SimulationConfig
from pagedkv.sims.start_check import start_note, start_warnings, start_worsened
from pagedkv.start_up import StartOptions

SHORT = MeasurementConfig(duration="10s", warmup="2s")


def test_advice_does_not_try_what_would_freeze_the_host() -> None:
    """With 2 GiB of other programs, 0.9 leaves less than a Spark's floor; 0.85 does not."""
    serving = ServingConfig(other_programs="2GiB", max_model_len=8192)
    advice = advise(SimulationConfig(load=LoadConfig(users=2), serving=serving, measurement=SHORT), attain=ATTAIN)
    utilizations = {trial.value: trial for trial in advice.trials if trial.setting == "gpu_memory_utilization"}
    for value, trial in utilizations.items():
        danger = timeline(other_programs="2GiB", max_model_len=8192, gpu_memory_utilization=value).danger
        assert (danger is not None) == (trial.output_tokens_per_s is None)
        assert danger is None or danger in trial.reason
    assert {value for value, trial in utilizations.items() if trial.output_tokens_per_s is None} == {0.9}
    assert advice.start_note is None


def test_advice_says_what_the_start_of_its_command_takes() -> None:
    """gpt-oss-120b freezes a Spark on its first start, whatever advice changes; MAX_JOBS avoids it."""
    note = start_note(ServingConfig(model="gpt-oss-120b"))
    assert note is not None
    assert "the host freezes" in note
    assert "MAX_JOBS=5 avoids it" in note
    assert timeline(StartOptions(compile_jobs=5), model="gpt-oss-120b").danger is None
    assert timeline(StartOptions(compile_jobs=6), model="gpt-oss-120b").danger is not None
    assert start_note(ServingConfig(model="gpt-oss-120b", hardware="h200")) is None


@pytest.mark.parametrize(
    ("flags", "avoids", "mended"),
    [
        ("--model gpt-oss-120b", "MAX_JOBS=5", (StartOptions(compile_jobs=5), {})),
        (
            "--model qwen3-8b --other-programs 60GiB --gpu-memory-utilization 0.4",
            "--enforce-eager",
            (StartOptions(), {"enforce_eager": True}),
        ),
    ],
)
def test_what_runs_says_how_its_start_may_freeze_the_host(
    flags: str, avoids: str, mended: tuple[StartOptions, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    """One line in what fits and in a simulation, with what avoids it: what budget --timeline says at length."""
    words = flags.replace("--", "").replace("-", "_").split()
    serving = dict(zip(words[::2], words[1::2], strict=True))
    asked = {name: float(value) if "utilization" in name else value.replace("_", "-") for name, value in serving.items()}
    (warning,) = start_warnings(ServingConfig(**asked))  # type: ignore[arg-type]
    assert "with nothing compiled before" in warning
    assert f"{avoids} avoids it (simulate budget --timeline shows it)" in warning
    assert timeline(**asked).danger in warning
    assert timeline(mended[0], **asked | mended[1]).danger is None
    assert timeline(StartOptions(warm_compile_caches=True), **asked).danger is None  # no later start is in danger
    main(["fit", *flags.split()])
    assert warning in " ".join(capsys.readouterr().out.split())
    load = "--users 1 --duration 1s --warmup 0 --random-input-len 9 --random-output-len 2 --allocator paged"
    main([*flags.split(), *load.split()])
    assert warning in " ".join(capsys.readouterr().out.split())
    main([*flags.split(), *load.split(), "--json", "-"])
    assert f"warning: {warning}" in capsys.readouterr().err


def test_a_start_is_not_warned_of_where_it_is_safe_or_the_budget_warns_already() -> None:
    assert start_warnings(ServingConfig()) == ()
    assert start_warnings(ServingConfig(model="gpt-oss-120b", hardware="h200")) == ()
    assert start_warnings(ServingConfig(engine="ollama", model="llama-3.1-8b,qwen3-8b")) == ()
    serving = ServingConfig(engine="sglang")  # whose rule leaves less than a Spark's floor
    assert timeline(engine="sglang").danger is not None
    assert start_warnings(serving) == ()


@pytest.mark.parametrize(
    ("before", "after", "worse"),
    [
        ({}, {"gpu_memory_utilization": 0.9}, False),
        ({}, {"gpu_memory_utilization": 0.94}, True),
        ({"gpu_memory_utilization": 0.94}, {"gpu_memory_utilization": 0.92}, False),
        ({"gpu_memory_utilization": 0.92}, {"gpu_memory_utilization": 0.94}, True),
        ({"gpu_memory_utilization": 0.94}, {"gpu_memory_utilization": 0.94, "block_size": 32}, False),
        ({"model": "gpt-oss-120b"}, {"model": "gpt-oss-120b", "max_num_seqs": 512}, False),  # MAX_JOBS mends both
        ({"model": "llama-3.3-70b", "quantization": "int4"}, {"model": "gpt-oss-120b"}, True),  # which the first does not need
        ({"free_memory": "110GiB"}, {"free_memory": "110GiB", "gpu_memory_utilization": 0.92}, True),  # refused
    ],
)
def test_a_start_is_worse_if_its_host_is_in_more_danger(before: dict[str, Any], after: dict[str, Any], *, worse: bool) -> None:
    assert (start_worsened(ServingConfig(**before), ServingConfig(**after)) is not None) == worse


def test_what_to_try_next_does_not_freeze_the_host(capsys: pytest.CaptureFixture[str]) -> None:
    """A dense model of 32 B in bf16 needs no kernels built; its nvfp4 does, beside which 60 GiB of compilers find no room."""
    words = "--users 8 --model qwen3-32b --quantization fp8 --other-programs 38GiB --gpu-memory-utilization 0.5"
    words += " --random-input-len 50 --random-output-len 200 --think-time 1s --max-model-len 4096 --duration 30s"
    main([*words.split(), "--json", "-"])
    verdict = json.loads(capsys.readouterr().out)["results"][0]["verdict"]
    narrower = ServingConfig(model="qwen3-32b", quantization="nvfp4", other_programs="38GiB", gpu_memory_utilization=0.5)
    assert verdict["binding"] == "bandwidth"
    assert start_worsened(replace(narrower, quantization="fp8"), narrower) is not None
    assert "nvfp4" not in verdict["next_command"]


def test_a_suggestion_that_freezes_is_named_as_such() -> None:
    with pytest.raises(ConfigError, match=r"What fits: .*MAX_JOBS=5"):
        timeline(model="qwen3-30b-a3b", gpu_memory_utilization=0.15)
    needs = settings_that_fit(request(model="gpt-oss-120b", gpu_memory_utilization=0.5, other_programs="30GiB"))
    assert needs.dangerous is not None
    assert "--gpu-memory-utilization" in needs.dangerous
    assert not any(text.startswith("--gpu-memory-utilization") for text in needs.fit)


def test_two_settings_of_the_same_machine_come_before_another_machine() -> None:
    """Above a Spark's usual utilization no other setting starts by itself; at it, those do that do there."""
    asked = {"model": "llama-3.3-70b", "quantization": "fp8", "max_model_len": 131_072}
    at_usual, above = (settings_that_fit(request(**asked, gpu_memory_utilization=share)) for share in (0.8, 0.92))
    assert at_usual.fit == ("--max-model-len 73008", "--kv-cache-dtype fp8", "--quantization nvfp4")
    assert above.fit == tuple(f"{flags} --gpu-memory-utilization 0.8" for flags in at_usual.fit)
    assert above.dangerous is not None


@given(
    model=st.sampled_from(["llama-3.1-8b", "qwen3-30b-a3b", "gpt-oss-120b", "llama-3.3-70b", "glm-4.5-air"]),
    utilization=st.sampled_from([0.1, 0.3, 0.5, 0.7]),
    others=st.sampled_from(["0", "4GiB", "20GiB", "40GiB"]),
    engine=st.sampled_from(["vllm", "sglang", "llama-cpp", "tensorrt-llm"]),
)
@settings(max_examples=25, deadline=None)
def test_what_fits_starts(model: str, utilization: float, others: str, engine: str) -> None:
    """Of every suggestion, or a change that its own flags make, the start is safe as the suggestion says."""
    share = {"gpu_memory_utilization": utilization} if engine == "vllm" else {}
    serving: dict[str, Any] = {"model": model, "engine": engine, "other_programs": others, "max_model_len": 4096, **share}
    asked = request(**serving)
    if isinstance(asked.attempt(), MemoryBudget):
        return
    for text in settings_that_fit(asked).fit:
        flags, _, start = text.partition(" (at its start: ")
        then = timeline(**(serving | _read(flags)))
        assert (then.danger is None) == (not start), text


def _read(flags: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for part in flags.split("--")[1:]:
        name, _, value = part.strip().partition(" ")
        kind = float if name.endswith(("utilization", "fraction", "-static")) else int
        number = value.replace(".", "").isdigit()
        found[name.replace("-", "_")] = (kind(value) if number else value) if value else True
    return found
