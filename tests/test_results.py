"""From runs to the result document: repeats combined, defaults filled in, the ledger, progress."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pagedkv.sims.command import flat
from pagedkv.sims.config import LoadConfig, MeasurementConfig, ServingConfig, SimulationConfig
from pagedkv.sims.metrics import measure
from pagedkv.sims.results import Results, combine, simulate
from pagedkv.sims.scenario import resolve
from pagedkv.sims.statistics import ci95


def figures(**changes: Any) -> dict[str, Any]:
    """Return the figures of one run, as `measure` gives them."""
    latencies = ("ttft_s", "tpot_s", "itl_s", "e2e_s")
    nothing: dict[str, Any] = dict.fromkeys(("kv", "kv_when_waiting", *latencies, "running_mean", "goodput_per_s"))
    counts = {"num_finished": 0, "iterations": 0, "request_steps": 0, "simulated_s": 0.0, "running_max": 0}
    return nothing | counts | changes


def latency(mean: float) -> dict[str, float]:
    return {"mean": mean, "p50": mean, "p90": 2 * mean, "p99": 3 * mean}


def test_one_run_has_no_intervals() -> None:
    combined = combine([figures(num_finished=3, ttft_s=latency(1.0), running_mean=2.5)])
    assert combined == figures(num_finished=3, running_mean=2.5) | {"ttft_s": {**latency(1.0), "ci95": None}, "ci95": None}


def test_counts_add_up_and_the_rest_is_a_mean() -> None:
    repeats = [
        figures(num_finished=3, iterations=10, simulated_s=1.5, running_mean=1.0, running_max=7, ttft_s=latency(1.0)),
        figures(num_finished=4, iterations=20, simulated_s=2.0, running_mean=2.0, running_max=9, ttft_s=latency(2.0)),
        figures(num_finished=5, iterations=30, simulated_s=2.5, running_mean=6.0, running_max=8, ttft_s=latency(6.0)),
    ]
    combined = combine(repeats)
    assert (combined["num_finished"], combined["iterations"], combined["simulated_s"]) == (12, 60, 6.0)
    assert (combined["running_mean"], combined["running_max"]) == (3.0, 9)
    interval = ci95([1.0, 2.0, 6.0])
    assert combined["ttft_s"] == latency(3.0) | {"ci95": pytest.approx(interval)}
    assert combined["ci95"]["running_mean"] == pytest.approx(interval)
    assert combined["ci95"]["ttft_s.p90"] == pytest.approx(ci95([2.0, 4.0, 12.0]))
    assert "ttft_s.mean" not in combined["ci95"]
    assert not {name for name in combined["ci95"] if name.startswith(("num_", "iterations", "simulated_s"))}


def test_repeats_without_a_figure_are_left_out() -> None:
    kv = {"tokens": 0.25, "free": 0.75}
    combined = combine([figures(kv_when_waiting=kv, ttft_s=latency(1.0)), figures(), figures(goodput_per_s=0.0)])
    assert combined["kv_when_waiting"] == kv
    assert combined["ttft_s"] == {**latency(1.0), "ci95": None}
    assert combined["goodput_per_s"] == 0.0
    assert combined["e2e_s"] is None
    assert combined["ci95"] is None  # one sample has no interval


def test_an_interval_is_around_its_figure() -> None:
    combined = combine([figures(running_max=7)] * 9 + [figures(running_max=20)])
    assert (combined["running_max"], combined["ci95"]) == (20, None)  # a maximum has no interval


# --- a whole document -----------------------------------------------------------------------------------------------

LOAD = LoadConfig(users=6, think_time="2s", random_input_len=300, random_output_len=40)
MEASUREMENT = MeasurementConfig(
    duration="20s", warmup="5s", repeats=3, goodput=("ttft:150",), allocator=("paged", "contiguous-max")
)


@pytest.fixture(scope="module")
def results() -> Results:
    return simulate(resolve(SimulationConfig(load=LOAD, serving=ServingConfig(hardware="h100-80gb"), measurement=MEASUREMENT)))


def test_repeats_are_runs_with_the_next_seeds(results: Results) -> None:
    for seed in range(3):
        alone = simulate(
            replace(
                results.scenario, config=replace(results.scenario.config, measurement=replace(MEASUREMENT, seed=seed, repeats=1))
            )
        )
        for name, result in results.by_allocator.items():
            goals = results.scenario.goals
            assert measure(result.runs[seed], goals) == measure(alone.by_allocator[name].runs[0], goals)


def test_every_allocator_gets_the_same_requests(results: Results) -> None:
    paged, contiguous = (result.runs for result in results.by_allocator.values())
    for a, b in zip(paged, contiguous, strict=True):
        assert a.log.arrival_s[:6].tolist() == b.log.arrival_s[:6].tolist()  # the first request of each user


def test_the_ledger_adds_up(results: Results) -> None:
    budget = results.document()["budget"]
    parts = ("weights", "engine_overhead", "activations", "cuda_graphs", "kv_cache", "os_reserve", "other_programs", "unassigned")
    assert sum(budget[part] for part in parts) == budget["visible"]
    assert budget["kv_cache"] == budget["num_blocks"] * budget["block_size"] * budget["kv_bytes_per_token"]
    assert budget["requested"] == math.ceil(budget["gpu_memory_utilization"] * budget["visible"])


def test_the_document_is_json_and_fresh(results: Results) -> None:
    document = results.document()
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    document["results"][0]["verdict"].clear()
    document["budget"].clear()
    assert results.document()["results"][0]["verdict"]
    assert results.document()["budget"]


def test_defaults_are_filled_in(results: Results) -> None:
    config = results.document()["config"]
    asked = flat(results.scenario.config)
    assert set(config) == set(asked)
    changed = {name: value for name, value in config.items() if value != asked[name] and not isinstance(value, list)}
    limits = {"max_model_len": 32768, "max_num_seqs": 1024, "max_num_batched_tokens": 8192}
    assert changed == limits | {"gpu_memory_utilization": 0.92, "scheduler_reserve_full_isl": True, "enable_prefix_caching": True}
    assert config["allocator"] == ["paged", "contiguous-max"]
    assert config["lengths"] is None  # the lengths are fixed ones


def documents_config(tmp_path: Path, **load: Any) -> dict[str, Any]:
    (tmp_path / "t.csv").write_text("arrival_s,input_tokens,output_tokens\n0,9,3\n1,9,3\n")
    measurement = MeasurementConfig(allocator=("paged, contiguous-max,paged",), duration=load.pop("duration", None))
    config = SimulationConfig(
        load=LoadConfig(**load), serving=ServingConfig(model="META-LLAMA/llama-3.1-8B"), measurement=measurement
    )
    resolved: dict[str, Any] = simulate(resolve(config)).document()["config"]
    return resolved


def test_each_load_has_its_defaults(tmp_path: Path) -> None:
    users = documents_config(tmp_path, users=2, duration="1s")
    assert (users["think_time"], users["warmup"], users["duration"], users["lengths"]) == ("20s", "60s", "1s", "azure-conv")
    assert (users["model"], users["allocator"]) == ("llama-3.1-8b", ["paged", "contiguous-max"])
    rate = documents_config(tmp_path, request_rate=1.0, duration="1s")
    assert (rate["burstiness"], rate["think_time"], rate["warmup"]) == (1.0, None, "60s")
    finite = documents_config(tmp_path, request_rate=1.0, num_prompts=2)
    assert (finite["warmup"], finite["duration"]) == ("0s", None)
    trace = documents_config(tmp_path, trace=str(tmp_path / "t.csv"))
    assert (trace["trace_format"], trace["warmup"], trace["duration"], trace["lengths"]) == ("generic-csv", "0s", None, None)


def told(scenario: Any) -> list[tuple[str, int, float]]:
    calls: list[tuple[str, int, float]] = []
    note: Callable[[str, int, float], None] = lambda name, repeat, share: calls.append((name, repeat, share))  # noqa: E731
    simulate(scenario, progress=note)
    return calls


def test_progress_is_told_in_order(results: Results) -> None:
    calls = told(results.scenario)
    order = [("paged", 0), ("paged", 1), ("paged", 2), ("contiguous-max", 0), ("contiguous-max", 1), ("contiguous-max", 2)]
    assert list(dict.fromkeys(call[:2] for call in calls)) == order
    for name, repeat in order:
        shares = [share for *who, share in calls if who == [name, repeat]]
        assert shares == sorted(set(shares))
        assert shares[-1] == 1.0


def test_progress_of_a_trace(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("arrival_s,input_tokens,output_tokens\n" + "".join(f"{t},900,30\n" for t in range(50)))
    scenario = resolve(
        SimulationConfig(load=LoadConfig(trace=str(tmp_path / "t.csv")), measurement=MeasurementConfig(allocator=("paged",)))
    )
    shares = [share for _, _, share in told(scenario)]
    assert shares
    assert shares == sorted(shares)
