"""What serves: equal deployments have equal settings, and machines and models can be brought along as files."""

import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from pagedkv.catalogue import hardware_names, load_hardware
from pagedkv.errors import ConfigError
from pagedkv.sims.cli import main
from pagedkv.sims.config import LoadConfig, ServingConfig, SimulationConfig
from pagedkv.sims.deployment import Deployment, deploy
from pagedkv.sims.scenario import resolve
from pagedkv.sims.step_time import StepCost
from pagedkv.step_batch import empty_batch

EXAMPLE = Path(__file__).resolve().parents[1] / "docs" / "examples" / "my-machine.toml"
SHORT = "--users 2 --think-time 1s --random-input-len 900 --random-output-len 20 --duration 20s --warmup 0s --allocator paged"


def in_force(deployment: Deployment) -> dict[str, Any]:
    """Return the settings of `deployment` that the model, the machine and the engine decide if the user does not."""
    scheduler = deployment.scheduler
    return {
        "max_model_len": scheduler.max_model_len,
        "max_num_seqs": scheduler.max_num_seqs,
        "max_num_batched_tokens": scheduler.max_num_batched_tokens,
        "gpu_memory_utilization": deployment.budget.utilization,
        "clock_derate": 1.0,
    }


ONES = st.builds(
    ServingConfig,
    hardware=st.sampled_from(hardware_names()),
    model=st.sampled_from(["qwen2.5-0.5b", "opt-13b", "qwen3-8b"]),
    quantization=st.sampled_from([None, "fp8"]),
    enable_chunked_prefill=st.booleans(),
)


@given(
    one=ONES,
    names=st.sets(
        st.sampled_from(["max_model_len", "max_num_seqs", "max_num_batched_tokens", "gpu_memory_utilization", "clock_derate"])
    ),
)
@settings(max_examples=60)
def test_a_setting_that_says_what_would_be_so_anyway_changes_nothing(one: ServingConfig, names: set[str]) -> None:
    try:
        plain = deploy(one)
    except ConfigError:  # the model is larger than the machine
        reject()
    assert plain.config == one
    said = deploy(replace(one, **{name: in_force(plain)[name] for name in names}))
    assert said.config == one
    assert (said.scheduler, said.pool, said.budget, said.hardware) == (plain.scheduler, plain.pool, plain.budget, plain.hardware)


OTHER: dict[str, Any] = {
    "max_model_len": 1000,
    "max_num_seqs": 7,
    "max_num_batched_tokens": 999,
    "gpu_memory_utilization": 0.7,
    "clock_derate": 0.5,
}


@pytest.mark.parametrize("name", OTHER)
def test_a_setting_that_changes_something_is_kept(name: str) -> None:
    changed = deploy(ServingConfig(**{name: OTHER[name]}))
    assert changed.config == ServingConfig(**{name: OTHER[name]})
    if name != "clock_derate":
        assert in_force(changed)[name] == OTHER[name]


def test_equal_scenarios_have_equal_settings() -> None:
    load = LoadConfig(users=5, think_time="20s", lengths="azure-conv")
    said = ServingConfig(max_model_len=32_768, max_num_seqs=256, gpu_memory_utilization=0.8, clock_derate=1.0)
    spelt, short = (SimulationConfig(load=load, serving=said), SimulationConfig(load=LoadConfig(users=5)))
    assert resolve(spelt).config == resolve(short).config
    assert resolve(resolve(spelt).config).config == resolve(spelt).config


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8"])
@pytest.mark.parametrize("model", ["llama-3.1-8b", "qwen2.5-0.5b", "gemma-3-1b", "glm-4.7-flash", "qwen3-next-80b-a3b"])
def test_a_page_of_vattention_is_full_with_the_keys_of_the_widest_layer(model: str, kv_cache_dtype: str) -> None:
    given = ServingConfig(hardware="gb200", model=model, quantization="nvfp4", kv_cache_dtype=kv_cache_dtype)
    deployment = deploy(given)
    pool, element_bytes = deployment.pool, {"auto": 2, "fp8": 1}[kv_cache_dtype]
    widest = max(group.num_kv_heads * group.key_dim for group in deployment.model.layer_groups)
    assert pool.page_tokens * widest * element_bytes <= 2 * 2**20 < (pool.page_tokens + 1) * widest * element_bytes
    assert (pool.kv_cache_dtype, pool.max_num_batched_tokens) == (kv_cache_dtype, deployment.scheduler.max_num_batched_tokens)


def test_pages_of_vattention_are_as_large_as_its_authors_say() -> None:
    assert deploy(ServingConfig(model="llama-3-8b")).pool.page_tokens == 1024


# --- a slower clock -------------------------------------------------------------------------------------------------


def cost(deployment: Deployment, *, new: int, context: int, requests: int = 1) -> StepCost:
    batch = empty_batch(requests)
    batch["num_scheduled_tokens"][:], batch["num_slots_needed"][:] = new, context
    return deployment.step_time.cost(batch, requests)


@pytest.mark.parametrize("hardware", hardware_names())
@pytest.mark.parametrize("share", [0.25, 0.5])
def test_a_slower_clock_slows_prefill_and_not_a_small_decode(hardware: str, share: float) -> None:
    usual, slow = (deploy(ServingConfig(hardware=hardware, model="qwen3-8b", clock_derate=clock)) for clock in (None, share))
    before, after = (cost(one, new=2048, context=2048) for one in (usual, slow))
    assert before.compute_s > 0.9 * before.total_s
    assert after.compute_s == pytest.approx(before.compute_s / share, rel=0.02)
    assert cost(slow, new=1, context=4000) == pytest.approx(cost(usual, new=1, context=4000), rel=1e-6)
    assert slow.budget == usual.budget
    assert f"{share:.0%} of its clock" in slow.hardware.title


def test_a_slower_clock_lengthens_the_wait_for_the_first_token(capsys: pytest.CaptureFixture[str]) -> None:
    def p50(flags: str) -> tuple[float, float]:
        result = document(f"{SHORT} {flags}", capsys)["results"][0]
        return result["ttft_s"]["p50"], result["itl_s"]["p50"]

    (ttft, itl), (slow_ttft, slow_itl) = p50(""), p50("--clock-derate 0.4")
    assert slow_ttft > 2 * ttft
    assert slow_itl == pytest.approx(itl, rel=0.05)  # some steps hold the other user's prompt
    assert p50("--clock-derate 1") == (ttft, itl)


# --- machines and models of one's own -------------------------------------------------------------------------------


def document(arguments: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    main(shlex.split(f"{arguments} --json -"))
    read: dict[str, Any] = json.loads(capsys.readouterr().out)
    return read


def test_a_machine_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(EXAMPLE, "mine.toml")
    mine = document(f"{SHORT} --hardware mine.toml", capsys)
    assert mine["results"][0]["hardware"] == "mine.toml"
    assert mine["config"]["hardware"] == "mine.toml"
    assert mine["budget"]["visible"] == round(47.40 * 2**30)
    assert mine["budget"]["gpu_memory_utilization"] == 0.90
    main(shlex.split(f"{SHORT} --hardware mine.toml --out kept"))
    assert "2 users on A workstation with a 48 GB card" in capsys.readouterr().out
    again = document("--config kept/config.toml", capsys)
    assert again["results"] == mine["results"]
    fitted = document("fit --hardware mine.toml", capsys)
    assert fitted["kv_tokens"] == (mine["budget"]["num_blocks"] - 1) * mine["budget"]["block_size"]
    ours, sparks = load_hardware("mine.toml"), load_hardware("dgx-spark")
    ratio = ours.read_bandwidth_bytes_per_s / sparks.read_bandwidth_bytes_per_s
    pauses_s = [
        document(f"{SHORT} --quantization int8 --hardware {machine}", capsys)["results"][0]["itl_s"]["p50"]
        for machine in ("mine.toml", "dgx-spark")  # weights of which no rows tell: both have their own figures
    ]
    assert pauses_s[1] / pauses_s[0] == pytest.approx(ratio, rel=0.1)


CONFIGS = {
    "Qwen--Qwen3-8B": "qwen3-8b",
    "Qwen--Qwen3.5-27B": "qwen3.5-27b",
    "openai--gpt-oss-20b": "gpt-oss-20b",
    "nvidia--NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": "nemotron-3-nano-30b-a3b",
}


@pytest.mark.parametrize("source", CONFIGS)
def test_a_model_from_its_folder(source: str, shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "my model"
    folder.mkdir()
    shutil.copy(shared_data / "hf_configs" / f"{source}_config.json", folder / "config.json")
    known = document(f"fit --model {CONFIGS[source]}", capsys)
    assert known["kv_tokens"] > 0
    for path in (folder, folder / "config.json"):
        own = document(f"fit --model {shlex.quote(str(path))}", capsys)
        assert own["rows"] == known["rows"]
        assert own["kv_tokens"] == known["kv_tokens"]
    main(shlex.split(f"{SHORT} --max-model-len 2048 --model {shlex.quote(str(folder))}"))
    out = capsys.readouterr().out
    assert "my model" in out.splitlines()[0]
    main(shlex.split(out.rpartition("This run:  simulate ")[2]))
    assert capsys.readouterr().out == out


REFUSALS = {
    "--tensor-parallel-size 2": ("--tensor-parallel-size 2", "one device", "use 1"),
    "--tensor-parallel-size 0": ("--tensor-parallel-size 0", "use 1"),
    "--clock-derate 0": ("--clock-derate 0", "at most 1", "0.5"),
    "--clock-derate 1.5": ("--clock-derate 1.5",),
    "--clock-derate nan": ("--clock-derate nan",),
    "--clock-derate -0.5": ("--clock-derate -0.5",),
    "--hardware absent.toml": ("absent.toml", "No such file"),
    "--hardware broken.toml": ("broken.toml", "not TOML"),
    "--hardware small.toml": ("small.toml", "memory_bandwidth"),
    "--model empty": ("'empty' has no config.json",),
    "--model absent.json": ("absent.json",),
    "--model list.json": ("list.json", "needs an object"),
    "--model other.json": ("other.json",),
}


@pytest.mark.parametrize("command", ["fit", "--users 2 --duration 1s --warmup 0"])
@pytest.mark.parametrize("arguments", REFUSALS)
def test_what_cannot_serve_is_refused(
    arguments: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    files = {
        "broken.toml": "= 3",
        "small.toml": 'memory_kind = "discrete"\nvisible = "9 GiB"\n',
        "list.json": "[]",
        "other.json": "{}",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit) as exit:
        main(shlex.split(f"{command} {arguments}"))
    out, err = capsys.readouterr()
    assert (exit.value.code, out) == (2, "")
    assert err.startswith("error: ")
    assert all(part in err for part in REFUSALS[arguments])
