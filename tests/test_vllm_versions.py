"""`--engine vllm@0.19` differs from `vllm`, which is 0.33, in what sims/vllm_versions.py states, and in nothing else."""

import json
import shlex
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest

from pagedkv.errors import ConfigError
from pagedkv.paged_steps import PagedStepAllocator
from pagedkv.scheduling.scheduler import Scheduler
from pagedkv.sims.cli import main
from pagedkv.sims.config import LoadConfig, MeasurementConfig, ServingConfig, SimulationConfig
from pagedkv.sims.deployment import Deployment, deploy
from pagedkv.sims.from_vllm import parse_vllm_command, with_vllm_defaults
from pagedkv.sims.scenario import resolve
from pagedkv.sims.simulation import run
from pagedkv.step_allocation import step_allocator

OLD, NEW = "vllm@0.19", "vllm"


def served(engine: str, **settings: Any) -> Deployment:
    return deploy(ServingConfig(engine=engine, hardware="rtx-4090", **settings))


def started(engine: str, *, num_blocks: int = 9, **settings: Any) -> tuple[Scheduler, PagedStepAllocator]:
    """Return a scheduler of `engine`, over eight usable blocks of 16 unless told, and its allocator."""
    deployment = served(engine, num_gpu_blocks_override=num_blocks, max_model_len=128, max_num_seqs=4, **settings)
    allocator = step_allocator("paged", deployment.pool)
    assert isinstance(allocator, PagedStepAllocator)
    return Scheduler(deployment.scheduler, allocator), allocator


@pytest.mark.parametrize("engine", [OLD, NEW])
def test_fewer_tokens_in_a_step_than_requests_lower_the_default_of_those(engine: str) -> None:
    assert served(engine, max_num_batched_tokens=16).scheduler.max_num_seqs == 16
    assert served(engine, max_num_batched_tokens=300, max_num_seqs=300).scheduler.max_num_seqs == 300
    with pytest.raises(ConfigError, match=r"is 299, and max-num-seqs 300: .*--max-num-batched-tokens 300 or --max-num-seqs 299"):
        served(engine, max_num_batched_tokens=299, max_num_seqs=300)


def step(scheduler: Scheduler) -> int:
    """Do one step; return how many requests it computed."""
    num = scheduler.schedule().num_entries
    scheduler.complete()
    return num


def table(scheduler: Scheduler, allocator: PagedStepAllocator, entry: int = 0) -> list[int]:
    """Return the blocks of an entry of the next step."""
    row = scheduler.schedule().batch["row"][entry]
    blocks: list[int] = allocator.tables.of(row).tolist()
    scheduler.complete()
    return blocks


# --- order of allocation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("engine", [NEW, "vllm@0.33", OLD])
def test_blocks_that_were_freed_come_next_or_last(engine: str, caching: bool) -> None:
    """Three blocks are taken and freed from the last to the first: before the five never used, or behind if old or kept."""
    scheduler, allocator = started(engine, enable_prefix_caching=caching)
    blocks = [4, 5, 6] if engine == OLD else [3, 4, 5] if caching else [3, 2, 1]
    scheduler.add(prompt_tokens=40, output_tokens=1)
    assert table(scheduler, allocator) == [1, 2, 3]
    scheduler.add(prompt_tokens=40, output_tokens=1)
    assert table(scheduler, allocator) == blocks
    if engine == OLD:
        scheduler.add(prompt_tokens=70, output_tokens=1)
        assert table(scheduler, allocator) == [7, 8, 3, 2, 1]


# --- the gate -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("engine", "gate", "admitted"), [(NEW, None, 1), (NEW, False, 2), (OLD, None, 2), (OLD, True, 1), ("vllm@0.33", None, 1)]
)
def test_a_prompt_of_which_only_a_chunk_fits_waits_at_the_gate(engine: str, gate: bool | None, admitted: int) -> None:
    scheduler, _ = started(engine, max_num_batched_tokens=64, scheduler_reserve_full_isl=gate)
    scheduler.add(prompt_tokens=60, output_tokens=3)  # four blocks of eight, then six are wanted
    step(scheduler)
    scheduler.add(prompt_tokens=90, output_tokens=3)
    assert step(scheduler) == admitted


def test_the_simulator_runs_those_rules() -> None:
    """With prompts of many chunks and little memory, admission without the gate preempts what admission with it does not."""
    preemptions = {}
    for engine in (OLD, NEW):
        scenario = resolve(
            SimulationConfig(
                load=LoadConfig(users=8, think_time="0.1s", random_input_len=600, random_output_len=30),
                serving=ServingConfig(
                    engine=engine,
                    hardware="rtx-4090",
                    num_gpu_blocks_override=100,
                    max_model_len=1024,
                    max_num_batched_tokens=64,
                    max_num_seqs=8,
                ),
                measurement=MeasurementConfig(allocator=("paged",), duration="20s", warmup="0"),
            )
        )
        fast, slow = (run(scenario, "paged", seed=0, step_by_step=each) for each in (False, True))
        assert isinstance(fast.allocator, PagedStepAllocator)
        assert isinstance(slow.allocator, PagedStepAllocator)
        for mine, other in zip(fast.allocator.arrays, slow.allocator.arrays, strict=True):
            np.testing.assert_array_equal(mine, other)
        preemptions[engine] = fast.recorder.num_preemptions
    assert preemptions[NEW] == 0 < preemptions[OLD]


# --- memory and defaults --------------------------------------------------------------------------------------------


def test_memory_as_recorded_from_0_19() -> None:
    """Published: 2,588 blocks at 0.9, this version's default. The graphs come on top of that share."""
    old = served(OLD).budget
    assert old.utilization == 0.9
    assert old.num_blocks == pytest.approx(2588, abs=2)
    assert served(NEW).budget.utilization == 0.92
    new = served(NEW, gpu_memory_utilization=0.9).budget
    assert (old.num_blocks - new.num_blocks) * old.block_bytes == pytest.approx(old.cuda_graphs, abs=old.block_bytes)
    for budget in (old, new):
        parts = (budget.weights, budget.engine_overhead, budget.activations, budget.cuda_graphs, budget.kv_cache)
        assert sum(parts) + budget.os_reserve + budget.other_programs + budget.unassigned == budget.visible
    eager = [served(engine, gpu_memory_utilization=0.9, enforce_eager=True).budget.num_blocks for engine in (OLD, NEW)]
    assert eager[0] == eager[1]


def test_graphs_that_do_not_fit_on_top_are_told_before_they_are_captured() -> None:
    free = {"free_memory": "98GiB", "gpu_memory_utilization": 0.8}  # 97.4 GiB, and 1.7 of graphs
    deploy(ServingConfig(**free))
    with pytest.raises(ConfigError, match=r"0\.79 is the highest that starts"):
        deploy(ServingConfig(engine=OLD, **free))
    deploy(ServingConfig(engine=OLD, **(free | {"gpu_memory_utilization": 0.79})))


def test_default_limits_of_a_step() -> None:
    """0.19 goes by memory alone, but for the A100; 0.33 knows that a GB10 is slow."""
    limits = {
        (engine, hardware): (found.max_num_batched_tokens, found.max_num_seqs)
        for engine in (OLD, NEW)
        for hardware in ("dgx-spark", "a100-80gb", "h100", "rtx-4090")
        for found in [deploy(ServingConfig(engine=engine, hardware=hardware, model="qwen2.5-0.5b")).scheduler]
    }
    small, large = (2048, 256), (8192, 1024)
    assert (limits[OLD, "dgx-spark"], limits[NEW, "dgx-spark"]) == (large, small)
    for hardware, both in (("a100-80gb", small), ("h100", large), ("rtx-4090", small)):
        assert limits[OLD, hardware] == limits[NEW, hardware] == both


def test_nothing_else_differs() -> None:
    old, new = (served(engine, gpu_memory_utilization=0.9, enforce_eager=True) for engine in (OLD, NEW))
    pools = asdict(old.pool), asdict(new.pool)
    assert {name for name, value in pools[0].items() if value != pools[1][name]} == {"reserve_full_isl", "freed_to_front"}
    assert (old.scheduler, replace(old.budget, equation="")) == (new.scheduler, replace(new.budget, equation=""))


# --- what is asked for ----------------------------------------------------------------------------------------------


def test_the_current_version_by_number_is_the_same_deployment() -> None:
    one, other = (served(engine) for engine in (NEW, "vllm@0.33"))
    assert one.config == other.config
    assert (one.pool, one.scheduler, one.budget) == (other.pool, other.scheduler, other.budget)
    assert one.config.engine == "vllm"
    assert served(OLD, scheduler_reserve_full_isl=False).config == served(OLD).config


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--engine vllm@0.20", "unknown version '0.20' of engine vllm: the versions are 0.19, 0.33"),
        ("--engine vllm@", "unknown version '' of engine vllm"),
        ("--engine vlm@0.19", "unknown engine 'vlm': did you mean vllm?"),
        ("--engine vllm@0.19 --watermark 0.02", "--watermark 0.02: vLLM 0.19 has none. Leave it out, or use --engine vllm"),
    ],
)
def test_what_there_is_not(flags: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(shlex.split(f"--users 1 {flags}"))
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_the_answer_says_which_rules_it_took(capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--users 2 --duration 5s --warmup 0 --allocator paged --hardware rtx-4090 --json -"
    main(shlex.split(f"{flags} --engine vllm@0.19"))
    document = json.loads(capsys.readouterr().out)
    assert document["config"]["engine"] == document["results"][0]["engine"] == "vllm@0.19"
    assert document["config"]["scheduler_reserve_full_isl"] is False
    assert "--engine vllm@0.19" in document["results"][0]["verdict"]["next_command"]


def test_a_vllm_command_is_read_with_the_defaults_of_its_version() -> None:
    read = parse_vllm_command("vllm serve Qwen/Qwen2.5-0.5B", base=ServingConfig(engine=OLD, hardware="h100"))
    serving, flags = with_vllm_defaults(read.serving)
    assert serving.gpu_memory_utilization == 0.9
    assert "--gpu-memory-utilization 0.9" in flags
    serving, _ = with_vllm_defaults(replace(read.serving, engine=NEW))
    assert serving.gpu_memory_utilization == 0.92
