"""Whole runs: a machine that is known is benchmarked as `vllm bench serve` would, and calibration finds it again."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pagedkv.sims.calibrate.study import calibrate
from pagedkv.sims.config import LoadConfig, MeasurementConfig, ServingConfig, SimulationConfig
from pagedkv.sims.deployment import deploy
from pagedkv.sims.results import simulate
from pagedkv.sims.scenario import resolve
from pagedkv.step_batch import empty_batch

TRUTH = """\
like = "dgx-spark"
[[step_constants]]
machine = "truth"
engine = "vllm"
kv_cache_dtypes = ["auto"]
source = "made up"
date = "2026-01-01"
num_figures = 9
num_models = 2
num_constants = 2
[step_constants.constants]
kv_read_bytes_per_s = 170e9
attention_flops = 35e12
step_overhead_s = 0.003
layer_overhead_s = 0.0
batched_layer_overhead_s = 0.0
sequence_overhead_s = 0.0003
state_bytes_per_s = 190e9
further_state_bytes_per_s = 190e9
state_scan_bytes_per_s = inf
overlap = 8.6
routing_exponent = 1.0
[step_constants.spread]
decode = 0.2
prefill = 0.2
state_decode = 0.2
state_prefill = 0.2
[step_constants.weights.fp8]
weight_read_bytes_per_s = 190e9
linear_flops = 70e12
num_models = 2
num_figures = 9
"""
SHOWN = ("output_throughput", "mean_ttft_ms", "mean_tpot_ms")


def bench(hardware: str, *, places: int, prompt: int, output: int, requests: int) -> dict[str, Any]:
    """The result that `vllm bench serve --max-concurrency` would save of this machine."""
    serving = ServingConfig(hardware=hardware, quantization="fp8", enable_prefix_caching=False)
    load = LoadConfig(users=places, think_time="0s", random_input_len=prompt, random_output_len=output, num_prompts=requests)
    measurement = MeasurementConfig(allocator=("paged",), warmup="0s", duration="100000s")
    (result,) = simulate(resolve(SimulationConfig(load=load, serving=serving, measurement=measurement))).by_allocator.values()
    log = result.runs[0].log
    seconds, made = float(np.nanmax(log.last_token_s)), int(log.output_tokens.sum())
    first_s, token_s = log.first_token_s - log.arrival_s, (log.last_token_s - log.first_token_s) / (log.output_tokens - 1)
    entries = empty_batch(places)
    context = prompt + output // 2
    entries["num_scheduled_tokens"], entries["num_slots_needed"], entries["num_known_tokens"] = 1, context, context
    return {
        "model_id": "meta-llama/Llama-3.1-8B",
        "request_rate": "inf",
        "max_concurrency": places,
        "completed": len(log.arrival_s),
        "duration": seconds,
        "total_input_tokens": int(log.prompt_tokens.sum()),
        "total_output_tokens": made,
        "request_throughput": len(log.arrival_s) / seconds,
        "output_throughput": made / seconds,
        "mean_ttft_ms": 1e3 * float(first_s.mean()),
        "median_ttft_ms": 1e3 * float(np.median(first_s)),
        "mean_tpot_ms": 1e3 * float(token_s.mean()),
        "median_itl_ms": 1e3 * deploy(serving).step_time.cost(entries, places).total_s,
    }


ONE = {"places": 1, "prompt": 1024, "output": 128, "requests": 8}
SOME = {"places": 8, "prompt": 1024, "output": 256, "requests": 64}
MANY = {"places": 32, "prompt": 1024, "output": 256, "requests": 256}


@pytest.mark.parametrize(("shapes", "bar"), [((ONE,), 0.005), ((ONE, SOME, MANY), 0.02)], ids=["alone", "three loads"])
def test_a_calibrated_machine_runs_as_the_one_that_was_benchmarked(
    tmp_path: Path, shapes: tuple[Mapping[str, int], ...], bar: float
) -> None:
    truth, result, mine = tmp_path / "truth.toml", tmp_path / "result.json", tmp_path / "mine.toml"
    truth.write_text(TRUTH)
    measured = [bench(str(truth), **shape) for shape in shapes]
    result.write_text("\n".join(map(json.dumps, measured)))
    study = calibrate(ServingConfig(quantization="fp8"), [result], date="2026-11-29", name=mine.name)
    mine.write_text(study.toml())
    assert study.speed is not None
    assert set(study.speed.found.fitted) >= {"weight_read_bytes_per_s", "linear_flops"}
    for shape, theirs in zip(shapes, measured, strict=True):
        ours, before = bench(str(mine), **shape), bench("dgx-spark", **shape)
        assert {name: ours[name] for name in SHOWN} == pytest.approx({name: theirs[name] for name in SHOWN}, rel=bar)
        assert before["output_throughput"] != pytest.approx(theirs["output_throughput"], rel=0.1)
