"""What a user asks of several Ollama models, what the catalogue makes of it, and what comes out."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pagedkv.catalogue import load_model
from pagedkv.errors import ConfigError
from pagedkv.sims.config import LoadConfig, MeasurementConfig, ServingConfig, SimulationConfig
from pagedkv.sims.engine_comparison import scenarios
from pagedkv.sims.export import to_json, write
from pagedkv.sims.model_serving import DEFAULT_KEEP_ALIVE_S, ModelServing, estimate_bytes
from pagedkv.sims.results import simulate
from pagedkv.sims.scenario import resolve
from pagedkv.sims.simulation import run
from pagedkv.units import GIB
from pagedkv.weight_format import load_weight_format

BRIEF = LoadConfig(users=4, think_time="30s", random_input_len=200, random_output_len=20, num_prompts=24)


def config(model: str, load: LoadConfig = BRIEF, **serving: Any) -> SimulationConfig:
    settings = {"engine": "ollama", "quantization": "q4_k_m", "ctx_size": 8192} | serving
    return SimulationConfig(load=load, serving=ServingConfig(model=model, **settings), measurement=MeasurementConfig())


def server(model: str, **serving: Any) -> ModelServing:
    served = resolve(config(model, **serving)).model_serving
    assert served is not None
    return served


def test_loading_takes_the_file_at_the_rate_of_the_disk() -> None:
    spec, weights = load_model("llama-3.1-8b"), load_weight_format("q4_k_m")
    on_spark, slower = server("llama-3.1-8b,qwen3-8b"), server("llama-3.1-8b,qwen3-8b", disk_bandwidth="500 MB/s")
    assert on_spark.models[0].load_s == spec.weight_bytes(weights) / 5.1e9
    assert slower.models[0].load_s == spec.weight_bytes(weights) / 5e8
    done = run(resolve(config("llama-3.1-8b,qwen3-8b")), "ollama", seed=0)
    assert done.server is not None
    for load in done.server.loads:
        first = done.log.where(done.log.model == load.model)
        assert load.ready_s is not None
        assert load.ready_s - load.start_s == pytest.approx(on_spark.models[load.model].load_s)
        assert first.scheduled_s[0] == load.ready_s


def test_the_expectation_is_ollamas_formula() -> None:
    llama = load_model("llama-3.1-8b")  # 32 layers, 8 heads of 128
    assert estimate_bytes(llama, 10**9, 4096) == 10**9 + 2 * 32 * 8 * 128 * 4096 * 2
    model = server("llama-3.1-8b,qwen3-8b", parallel=3).models[0]
    assert model.variants[0].estimate_bytes == model.file_bytes + 2 * 32 * 8 * 128 * (8192 * 3) * 2


def test_defaults_and_what_changes_them() -> None:
    usual = server("llama-3.1-8b,qwen3-8b")
    assert (usual.max_loaded_models, usual.max_queue, usual.recovery_s) == (3, 512, 0.0)
    assert [model.keep_alive_s for model in usual.models] == [DEFAULT_KEEP_ALIVE_S] * 2 == [300.0, 300.0]
    other = server("llama-3.1-8b,qwen3-8b", keep_alive="10s,-1", max_loaded_models=1, max_queue=7)
    assert [model.keep_alive_s for model in other.models] == [10.0, np.inf]
    assert (other.max_loaded_models, other.max_queue) == (1, 7)
    assert server("llama-3.1-8b,qwen3-8b", hardware="rtx-4090", disk_bandwidth="5GB/s").recovery_s > 0


def test_an_automatic_context_has_a_lower_one_behind_it_and_one_that_is_asked_for_has_none() -> None:
    automatic = server("llama-3.1-70b,qwen3-8b", ctx_size=None, parallel=4).models[0]
    assert [variant.context for variant in automatic.variants] == [131_072, 32_768]
    assert [variant.deployment is None for variant in automatic.variants] == [True, False]
    assert automatic.variants[0].held_bytes > 117 * GIB
    assert len(server("llama-3.1-8b,qwen3-8b").models[0].variants) == 1


def test_one_model_is_loaded_on_demand_if_it_is_said_how() -> None:
    assert resolve(config("llama-3.1-8b")).model_serving is None
    document = simulate(resolve(config("llama-3.1-8b", keep_alive="1s"))).document()["results"][0]
    assert document["models"][0]["num_loads"] > 1


WORKLOAD = """
[[class]]
name = "chatters"
share = 0.5
think_time = "10s"
prompt = 200
output = 20
model = "qwen3-8b"

[[class]]
name = "sorter"
request_rate = 0.1
prompt = 100
output = 10
model = "llama-3.1-8b"

[[class]]
name = "others"
share = 0.5
think_time = "10s"
prompt = 200
output = 20
"""


def workload(folder: Path, text: str = WORKLOAD) -> LoadConfig:
    (folder / "team.toml").write_text(text)
    return LoadConfig(workload=str(folder / "team.toml"), users=4, num_prompts=40)


def test_classes_of_a_workload_name_their_models_and_the_rest_has_any(tmp_path: Path) -> None:
    scenario = resolve(config("llama-3.1-8b", workload(tmp_path)))
    assert scenario.model_serving is not None
    assert [model.name for model in scenario.model_serving.models] == ["llama-3.1-8b", "qwen3-8b"]
    log = run(scenario, "ollama", seed=1).log
    assert {*log.model[log.user_class == 0].tolist()} == {1}
    assert {*log.model[log.user_class == 1].tolist()} == {0}
    alone = WORKLOAD.replace('model = "qwen3-8b"\n', "").replace('model = "llama-3.1-8b"\n', "")
    assert resolve(config("llama-3.1-8b", workload(tmp_path, alone))).model_serving is None


def test_one_model_in_all_classes_is_the_model_of_any_engine(tmp_path: Path) -> None:
    text = WORKLOAD[: WORKLOAD.index('[[class]]\nname = "sorter"')].replace("share = 0.5", "share = 1")
    load = workload(tmp_path, text)
    scenario = resolve(SimulationConfig(load=load, serving=ServingConfig(), measurement=MeasurementConfig()))
    assert (scenario.model_serving, scenario.deployment.model.name) == (None, "qwen3-8b")


@pytest.mark.parametrize("seed", [0, 5])
def test_the_same_seed_gives_the_same_bytes_and_the_sums_are_whole(seed: int) -> None:
    asked = config("llama-3.1-8b,qwen3-8b,qwen3-32b", max_loaded_models=2)
    asked = SimulationConfig(load=asked.load, serving=asked.serving, measurement=MeasurementConfig(seed=seed, repeats=2))
    first, second = (to_json(simulate(resolve(asked)).document()) for _ in range(2))
    assert first == second
    result = json.loads(first)["results"][0]
    for name in ("num_injected", "num_finished", "num_rejected", "num_failed", "num_unfinished"):
        assert result[name] == sum(row[name] for row in result["models"])
    assert result["num_finished"] == 48
    assert sum(result["kv"].values()) == pytest.approx(1.0)
    assert 0 < result["memory_bandwidth_share"] < result["busy_share"] < 1  # models share one machine


@pytest.mark.parametrize(
    "load",
    [
        LoadConfig(users=9, think_time="5s", random_input_len=200, random_output_len=20),
        LoadConfig(request_rate=0.5, random_input_len=200, random_output_len=20),
    ],
)
def test_who_arrives_asks_the_same_whatever_the_number_of_models(load: LoadConfig) -> None:
    def sent(model: str) -> tuple[list[float], list[int]]:
        asked = SimulationConfig(
            load=load,
            serving=config(model, disk_bandwidth="1000 GB/s").serving,
            measurement=MeasurementConfig(warmup="0s", duration="4s"),
        )
        log = run(resolve(asked), "ollama", seed=3).log
        first = log.arrival_s <= 2.0
        return log.arrival_s[first].tolist(), log.model[first].tolist()

    (one_s, one), (two_s, two) = sent("llama-3.1-8b"), sent("llama-3.1-8b,qwen3-8b")
    assert one_s == two_s
    assert {*one} <= {0} and {*two} <= {0, 1}  # noqa: PT018


def test_a_run_that_ends_before_the_first_load_has_figures(tmp_path: Path) -> None:
    asked = config("llama-3.1-8b,qwen3-8b", LoadConfig(users=3, think_time="0s"), disk_bandwidth="1 MB/s")
    results = simulate(
        resolve(SimulationConfig(load=asked.load, serving=asked.serving, measurement=MeasurementConfig(warmup="0s", duration="9s")))
    )
    result = results.document()["results"][0]
    assert (result["num_unfinished"], result["kv"], result["waiting_time_share"]) == (3, None, pytest.approx(1.0))
    assert result["verdict"]["fits"] is False
    write(results, tmp_path)


def test_files_say_what_each_load_took_and_which_model_a_request_named(tmp_path: Path) -> None:
    results = simulate(resolve(config("llama-3.1-8b,qwen3-8b", max_loaded_models=1)))
    write(results, tmp_path)
    loads = list(csv.DictReader((tmp_path / "loads.csv").open()))
    assert len(loads) == sum(row["num_loads"] for row in results.document()["results"][0]["models"]) > 2
    assert {load["why_ended"] for load in loads[:-1]} == {"room"}
    starts, ends = ([float(load[name]) for load in loads if load[name]] for name in ("start_s", "end_s"))
    assert all(start >= end for start, end in zip(starts[1:], ends, strict=False))
    requests = list(csv.DictReader((tmp_path / "requests.csv").open()))
    assert {request["model"] for request in requests} == {"llama-3.1-8b", "qwen3-8b"}


@pytest.mark.parametrize(
    ("model", "serving", "says"),
    [
        ("llama-3.1-8b,qwen3-8b", {"engine": "vllm", "ctx_size": None}, "are for --engine ollama.*--engine vllm serves one"),
        ("llama-3.1-8b,qwen3-8c", {}, "'qwen3-8c': did you mean qwen3-8b"),
        (",", {}, "names no model"),
        ("llama-3.1-8b,llama-3.1-405b", {}, "Llama 3.1 405B needs .*What fits"),
        ("llama-3.1-8b,qwen3-8b", {"hardware": "h100"}, "nobody knows the disk of NVIDIA H100.*--disk-bandwidth 5GB/s"),
        ("llama-3.1-8b,qwen3-8b", {"disk_bandwidth": "5GB"}, "--disk-bandwidth"),
        ("llama-3.1-8b,qwen3-8b", {"disk_bandwidth": "0 GB/s"}, "needs more than 0"),
        ("llama-3.1-8b,qwen3-8b", {"keep_alive": "1m,2m,3m"}, "3 times for 2 models"),
        ("llama-3.1-8b,qwen3-8b", {"keep_alive": "soon"}, "'soon' is not a time"),
        ("llama-3.1-8b,qwen3-8b", {"max_loaded_models": 0}, "--max-loaded-models is 0: needs 1 or more"),
        ("llama-3.1-8b,qwen3-8b", {"max_queue": -1}, "max_queue is -1: needs 0 or more"),
        ("llama-3.1-8b,qwen3-8b", {"replicas": 2}, "leave out --replicas"),
        ("llama-3.1-8b", {"engine": "vllm", "ctx_size": None, "keep_alive": "5m"}, "it is for --engine ollama"),
    ],
)
def test_what_cannot_be_is_refused_with_what_can(model: str, serving: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        resolve(config(model, **serving))


def test_a_class_with_an_unknown_model_says_which(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"team.toml, class chatters, model: .*qwen3-8z"):
        resolve(config("llama-3.1-8b", workload(tmp_path, WORKLOAD.replace("qwen3-8b", "qwen3-8z"))))
    with pytest.raises(ConfigError, match=r"class sorter, model: 8 is no model"):
        resolve(config("llama-3.1-8b", workload(tmp_path, WORKLOAD.replace('"llama-3.1-8b"', "8"))))


def test_in_a_comparison_engines_of_one_model_say_why_they_are_left_out() -> None:
    ready, refused = scenarios(config("llama-3.1-8b,qwen3-8b", engine="ollama,vllm"))
    assert list(ready) == ["ollama"]
    assert "serves one" in refused["vllm"]
