"""Which constants apply to what, how far they may be off, and what the answers say of it."""

import io
import json
import math
from typing import Any

import pytest
from rich.console import Console

from pagedkv.catalogue import load_hardware, load_model
from pagedkv.sims.calibration import Calibration, calibration_for, fitted_groups
from pagedkv.sims.cli import main
from pagedkv.sims.config import LoadConfig, MeasurementConfig, ServingConfig, SimulationConfig
from pagedkv.sims.console import show
from pagedkv.sims.deployment import deploy
from pagedkv.sims.error_interval import HEADLINES
from pagedkv.sims.results import Results, simulate
from pagedkv.sims.scenario import resolve
from pagedkv.sims.step_constants import catalogue_constants
from pagedkv.weight_format import load_weight_format

LLAMA, HYBRID = load_model("llama-3.1-8b"), load_model("qwen3.5-9b")


def known(engine: str, weights: str, *, kv: str = "auto", hardware: str = "dgx-spark", **more: Any) -> Calibration:
    machine, model = load_hardware(hardware), more.pop("model", LLAMA)
    return calibration_for(machine, engine, load_weight_format(weights), kv, model=model, **more)


def test_every_group_says_where_it_comes_from() -> None:
    groups = fitted_groups()
    assert {(group["machine"], group["engine"]) for group in groups} == {
        ("dgx-spark", "llama-cpp"),
        ("dgx-spark", "vllm"),
        ("dgx-spark", "sglang"),
        ("rtx-4090", "vllm@0.19"),
    }
    for group in groups:
        assert group["source"]
        assert group["date"]
        assert group["num_figures"] >= group["num_rows"] > group["num_constants"]
        assert all(its["num_models"] > 0 for its in group["weights"].values())


def test_constants_stay_within_what_the_machine_can_do() -> None:
    for group in fitted_groups():
        machine = load_hardware(group["machine"])
        reads = [its["weight_read_bytes_per_s"] for its in group["weights"].values()]
        assert max([*reads, group["constants"]["kv_read_bytes_per_s"]]) <= machine.memory_bandwidth.value
        assert max(its["linear_flops"] for its in group["weights"].values()) <= max(f.value for f in machine.spec_flops.values())


@pytest.mark.parametrize(("engine", "weights"), [("llama-cpp", "q8_0"), ("vllm", "bf16")])
def test_a_group_with_rows_of_several_models_is_validated(engine: str, weights: str) -> None:
    found = known(engine, weights)
    assert (found.status, found.why) == ("validated", "")
    assert found.num_models > 10
    assert found.constants != catalogue_constants(load_hardware("dgx-spark"), load_weight_format(weights))


@pytest.mark.parametrize(
    ("engine", "weights", "kv", "hardware", "why"),
    [
        ("llama-cpp", "q6_k", "auto", "dgx-spark", "the mean of mxfp4+q8_0, q4_0, q4_k_m, q8_0 stands in"),
        ("llama-cpp", "q8_0", "fp8", "dgx-spark", "a KV cache in auto, not fp8"),
        ("ollama", "q4_k_m", "auto", "dgx-spark", "no rows of ollama here: those of llama-cpp stand in"),
        ("vllm", "nvfp4", "fp8", "dgx-spark", "of a single model"),
        ("vllm", "bf16", "auto", "rtx-4090", "no rows of vllm here: those of vllm@0.19 stand in"),
        ("vllm", "int8", "auto", "dgx-spark", "no published rows of vllm with int8 weights on dgx-spark"),
        ("sglang", "bf16", "auto", "dgx-spark", "no published rows of sglang with bf16 weights"),
        ("llama-cpp", "q8_0", "auto", "h100", "no published rows of llama-cpp with q8_0 weights on h100"),
    ],
)
def test_the_nearest_stands_in_and_says_so(engine: str, weights: str, kv: str, hardware: str, why: str) -> None:
    found = known(engine, weights, kv=kv, hardware=hardware)
    assert found.status == "not validated"
    assert why in found.why
    if "no published rows" in why:
        assert found.constants == catalogue_constants(load_hardware(hardware), load_weight_format(weights))


def test_weights_that_are_not_quantized_are_multiplied_as_the_catalogue_says() -> None:
    wide, mean = known("llama-cpp", "bf16"), known("llama-cpp", "q6_k")
    assert wide.constants.linear_flops == load_hardware("dgx-spark").effective_flops(load_weight_format("bf16"))
    assert wide.constants.weight_read_bytes_per_s == mean.constants.weight_read_bytes_per_s
    assert "but for arithmetic" in wide.why
    derated = load_hardware("dgx-spark").derated(0.5)
    half = calibration_for(derated, "llama-cpp", load_weight_format("bf16"), "auto", model=LLAMA, clock=0.5)
    assert half.constants.linear_flops == pytest.approx(wide.constants.linear_flops / 2)


def test_what_is_less_known_has_a_wider_interval() -> None:
    exact, mean = known("llama-cpp", "q8_0"), known("llama-cpp", "q6_k")
    assert mean.decode_spread == pytest.approx(2 * exact.decode_spread)
    assert mean.prefill_spread == pytest.approx(2 * exact.prefill_spread)
    assert known("llama-cpp", "q8_0", model=HYBRID).prefill_spread > exact.prefill_spread
    assert 0 < exact.decode_spread < 0.5


def test_a_throttled_machine_computes_slower_and_reads_as_fast() -> None:
    whole, half = known("llama-cpp", "q8_0").constants, known("llama-cpp", "q8_0", clock=0.5).constants
    assert half.linear_flops == whole.linear_flops / 2
    assert half.attention_flops == whole.attention_flops / 2
    assert half.weight_read_bytes_per_s == whole.weight_read_bytes_per_s


def test_older_builds_have_factors_of_their_own() -> None:
    now, then = (known("llama-cpp", "q8_0", build=build).constants for build in ("", "2025"))
    assert then.linear_flops < now.linear_flops
    assert then.attention_flops < now.attention_flops
    assert then.kv_read_bytes_per_s == now.kv_read_bytes_per_s


def test_a_deployment_has_the_constants_of_its_engine() -> None:
    llama_cpp = deploy(ServingConfig(engine="llama-cpp", quantization="q8_0"))
    vllm = deploy(ServingConfig(quantization="int8"))
    costs = [each.step_time.prefill_cost(2048, max_num_batched_tokens=2048).total_s for each in (llama_cpp, vllm)]
    assert llama_cpp.calibration.status == "validated"
    assert costs[0] > 2 * costs[1]  # llama.cpp prefills at a third of what cuBLAS reaches


@pytest.fixture(scope="module")
def results() -> Results:
    serving = ServingConfig(engine="llama-cpp", quantization="q8_0", max_model_len=8192)
    load = LoadConfig(users=3, random_input_len=500, random_output_len=100, think_time="5s")
    measurement = MeasurementConfig(duration="120s", warmup="10s")
    return simulate(resolve(SimulationConfig(load=load, serving=serving, measurement=measurement)))


def test_headlines_carry_an_interval_that_holds_them(results: Results) -> None:
    document = json.loads(json.dumps(results.document()))
    calibration = document["calibration"]
    assert calibration["status"] == "validated"
    factors = sorted((calibration["decode_factor"], calibration["prefill_factor"]))
    for column in document["results"]:
        for name in HEADLINES:
            low, high = column["error_interval"][name]
            value = column[name] if name == "output_tokens_per_s" else column[name]["mean"]
            assert math.sqrt(low * high) == pytest.approx(value)
            assert factors[0] - 1e-9 <= high / value <= factors[1] + 1e-9
        ttft_factor = column["error_interval"]["ttft_s"][1] / column["ttft_s"]["mean"]
        assert ttft_factor >= calibration["prefill_factor"] - 1e-9


def test_the_terminal_says_how_well_step_times_are_known(results: Results) -> None:
    console = Console(file=io.StringIO(), width=200)
    show(results, console)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    assert "Step times validated: llama-cpp on dgx-spark: 289 published rows" in text
    assert "TPOT mean" in text


def test_not_validated_is_in_the_answer(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--users", "1", "--duration", "30s", "--warmup", "0s", "--allocator", "paged", "--quantization", "int8"])
    assert "Step times not validated: the catalogue's figures of dgx-spark; no published rows of vllm" in " ".join(
        capsys.readouterr().out.split()
    )


def test_nobody_served_has_no_interval() -> None:
    load = LoadConfig(users=1, random_input_len=5, random_output_len=5, think_time="3600s")
    config = SimulationConfig(load=load, measurement=MeasurementConfig(duration="1s", warmup="0s", allocator=("paged",)))
    (column,) = simulate(resolve(config)).document()["results"]
    assert column["tpot_s"] is None
    assert column["error_interval"]["tpot_s"] is None
