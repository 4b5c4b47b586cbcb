"""Law 10: the same seed gives the same bytes, in any process and in any company. Law 14: compiled or interpreted."""

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pagedkv.allocators import ALLOCATORS
from pagedkv.heaps import HEAPS
from pagedkv.sims.config import LoadConfig, MeasurementConfig, ServingConfig, SimulationConfig
from pagedkv.sims.export import to_json
from pagedkv.sims.results import simulate
from pagedkv.sims.scenario import resolve

CONFIG = SimulationConfig(
    load=LoadConfig(users=10, think_time="1s", random_input_len=250, random_output_len=30, random_range_ratio=0.9),
    serving=ServingConfig(
        max_model_len=900, max_num_seqs=8, num_gpu_blocks_override=80, max_num_batched_tokens=512, offload_size="1GiB"
    ),
    measurement=MeasurementConfig(allocator=("paged", "contiguous-oracle"), duration="20s", warmup="3s", repeats=2),
)
OPEN = replace(CONFIG, load=LoadConfig(request_rate=2.0, burstiness=0.5, num_prompts=30))


def document(config: SimulationConfig, **measurement: Any) -> dict[str, Any]:
    return simulate(resolve(replace(config, measurement=replace(config.measurement, **measurement)))).document()


def figures(config: SimulationConfig, **measurement: Any) -> dict[str, dict[str, Any]]:
    """By allocator; without the verdict, whose next command repeats the configuration."""
    return {result["allocator"]: result | {"verdict": None} for result in document(config, **measurement)["results"]}


@pytest.mark.parametrize("config", [CONFIG, OPEN], ids=["closed loop", "open loop"])
def test_law_10_same_seed_same_bytes(config: SimulationConfig) -> None:
    first = to_json(document(config))
    assert to_json(document(config)) == first
    assert len({to_json(figures(config, seed=seed)) for seed in range(4)}) == 4


def test_law_10_results_do_not_depend_on_what_they_are_compared_with() -> None:
    together = figures(CONFIG, allocator=ALLOCATORS.names())
    assert figures(CONFIG, allocator=ALLOCATORS.names()[::-1]) == together
    for name in ("paged", "contiguous-oracle"):
        alone = figures(CONFIG, allocator=(name,))[name]
        assert alone["num_finished"] > 10
        assert together[name] == alone


def test_law_10_every_allocator_gets_the_same_requests() -> None:
    config = replace(CONFIG, load=LoadConfig(request_rate=2.0, num_prompts=40))
    results = simulate(resolve(replace(config, measurement=replace(config.measurement, allocator=ALLOCATORS.names()))))
    for repeat in range(2):
        logs = [result.runs[repeat].log for result in results.by_allocator.values()]
        for log in logs:
            assert log.arrival_s.tolist() == logs[0].arrival_s.tolist()
            assert log.prompt_tokens.tolist() == logs[0].prompt_tokens.tolist()
            assert log.output_tokens.tolist() == logs[0].output_tokens.tolist()


def digests(heap: str, allocators: tuple[str, ...]) -> dict[str, str]:
    config = replace(CONFIG, serving=replace(CONFIG.serving, contiguous_heap=heap))
    return {name: hashlib.sha256(to_json(document(config, allocator=(name,))).encode()).hexdigest() for name in allocators}


@pytest.mark.parametrize(("heap", "allocators"), [("buddy", ALLOCATORS.names()), ("first-fit", ("contiguous-oracle",))])
def test_law_14_another_process_without_a_compiler_gives_the_same_bytes(heap: str, allocators: tuple[str, ...]) -> None:
    assert heap in HEAPS.names()
    code = f"import json; from test_determinism import digests; print(json.dumps(digests({heap!r}, {allocators!r})))"
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])])
    environment = os.environ | {"NUMBA_DISABLE_JIT": "1", "PYTHONHASHSEED": "5", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == digests(heap, allocators)
