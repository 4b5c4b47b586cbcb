"""`pagedkv reality`: really serves loads, and predicts all but one of them. A part of the composition root: it runs a model."""

import sys
import time
from datetime import date
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import numpy as np
from cyclopts import Parameter

from pagedkv.sims.cli_output import BAR_MISSED, OUTPUT, check_json, print_view, write_json
from pagedkv.sims.reality.asked import RealityConfig

if TYPE_CHECKING:
    from pagedkv.hardware_spec import HardwareSpec
    from pagedkv.model_spec import ModelSpec
    from pagedkv.sims.reality.real_run import StepLog
    from pagedkv.sims.reality.timed_load import TimedLoad
    from pagedkv.sims.simulation import Run


def reality(
    *,
    asked: Annotated[RealityConfig | None, Parameter(name="*")] = None,
    json: Annotated[str | None, Parameter(group=OUTPUT, allow_leading_hyphen=True)] = None,
) -> None:
    """Serve four loads with a real model on this machine, fit its steps to the first, and predict the other three.

    It measures the machine (as calibrate --measure does), serves each load several times on the real clock, simulates it, and says
    how far the prediction is off. Exit status 3 if a bar is missed. Leave the machine alone meanwhile. Needs torch: pip install
    'pagedkv[runtime]'.

    Args:
        json: Write the result document to this file; - prints it, and nothing else, to stdout.
    """
    from pagedkv.sims.cli_generate import check_libraries
    from pagedkv.sims.console_validate import show_sections

    check_json(json)
    check_libraries("reality")
    study = _study(asked or RealityConfig())
    if json is not None:
        write_json(study.document, json)
    if json != "-":
        print_view(lambda console: show_sections(study.sections, console, rows=False))
    if not all(section.holds for section in study.sections):
        sys.stdout.flush()
        sys.exit(BAR_MISSED)


class _Machine(NamedTuple):
    """What serves."""

    model: Any
    """Of transformers."""
    spec: "ModelSpec"
    hardware: "HardwareSpec"
    weights: str
    """Type that it multiplies in, a name of `WEIGHT_FORMATS`."""


class _Study(NamedTuple):
    sections: tuple[Any, ...]
    document: dict[str, Any]


def _study(asked: RealityConfig) -> _Study:
    from dataclasses import asdict

    from pagedkv.sims.progress import ProgressOnStderr
    from pagedkv.sims.reality.step_fit import FREE, fit_steps, simulated, step_time
    from pagedkv.sims.reality.study import Served, sections
    from pagedkv.sims.reality.timed_load import all_at_once, timed_loads
    from pagedkv.sims.step_constants import catalogue_constants
    from pagedkv.weight_format import load_weight_format

    if asked.processor_clock:
        import numba
        import torch

        torch.set_num_threads(1)
        numba.set_num_threads(1)
    machine = _machine(asked)
    fmt, kv_dtype = load_weight_format(machine.weights), "auto"
    with ProgressOnStderr(["reality"], repeats=1) as progress:
        probe = all_at_once(num_requests=16, seed=asked.seed)
        _serve(machine, asked, probe, seed=1)  # it compiles
        begun, _ = _serve(machine, asked, probe, seed=2)
        loads = timed_loads(num_requests=asked.num_requests, capacity_per_s=probe.size / begun.end_s, seed=asked.seed)
        real: list[list[Run]] = [[] for _ in loads]
        logs: list[StepLog] = []
        for repeat in range(asked.repeats):  # in turns: a machine that gets slower does so for all
            for i, load in enumerate(loads):
                run, log = _serve(machine, asked, load, seed=100 * repeat + i + 3)
                real[i].append(run)
                if i == 0:
                    logs.append(log)
                progress("reality", 0, (repeat * len(loads) + i + 1) / (asked.repeats * len(loads)))
    prior = catalogue_constants(machine.hardware, fmt)
    constants = fit_steps(logs, machine.spec, weight_format=fmt, kv_cache_dtype=kv_dtype, prior=prior)
    steps = step_time(machine.spec, machine.hardware, constants, weight_format=fmt, kv_cache_dtype=kv_dtype)
    served = []
    for load, runs in zip(loads, real, strict=True):
        limits, pool = _limits(asked, load, machine.model)
        num_slots = pool.num_blocks * pool.block_size
        served.append(Served(load=load, real=tuple(runs), predicted=simulated(load, limits, pool, steps), num_slots=num_slots))
    compared = sections(served)
    document = {
        "schema_version": 1,
        "date": date.today().isoformat(),
        "config": {name: str(value) if name in ("model", "random_weights") else value for name, value in asdict(asked).items()},
        "hardware": {
            "name": machine.hardware.title,
            "read_bytes_per_s": machine.hardware.read_bandwidth_bytes_per_s,
            "linear_by_rows": {name: asdict(table) for name, table in machine.hardware.linear_by_rows.items()},
        },
        "num_steps_fitted": sum(len(log.batches) for log in logs),
        "constants": {name: getattr(constants, name) for name in FREE},
        "sections": [section.document() for section in compared],
    }
    return _Study(compared, document)


def _machine(asked: RealityConfig) -> _Machine:
    from pagedkv.catalogue import load_model as load_spec
    from pagedkv.runtime.load_model import load_model, random_model
    from pagedkv.sims.cli_calibrate import measured_hardware

    if asked.model is not None:
        source, model = asked.model, load_model(asked.model, dtype=asked.dtype, device=asked.device)
    else:
        assert asked.random_weights is not None
        source = asked.random_weights
        model = random_model(source, dtype=asked.dtype, device=asked.device, seed=asked.seed)
    weights = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[str(model.dtype).removeprefix("torch.")]
    clock = time.process_time if asked.processor_clock else time.perf_counter
    return _Machine(model, load_spec(str(source)), measured_hardware(model.device.type, weights=weights, clock=clock), weights)


def _limits(asked: RealityConfig, load: "TimedLoad", model: Any) -> tuple[Any, Any]:
    """Return what bounds a step, and the pool: of the real engine and of the simulated one."""
    from pagedkv.allocation import KVPoolSettings
    from pagedkv.layer_groups import groups_differ
    from pagedkv.runtime.model_layers import model_layers
    from pagedkv.scheduling.scheduler_settings import SchedulerSettings

    layers = model_layers(model.config)
    longest = min(int(model.config.max_position_embeddings), (asked.num_gpu_blocks_override - 1) * asked.block_size)
    limits = SchedulerSettings(
        max_num_seqs=load.max_num_seqs, max_num_batched_tokens=asked.max_num_batched_tokens, max_model_len=longest
    )
    pool = KVPoolSettings(
        num_blocks=asked.num_gpu_blocks_override,
        block_size=asked.block_size,
        max_num_seqs=load.max_num_seqs,
        max_model_len=longest,
        enable_prefix_caching=True,
        layer_groups=layers if groups_differ(layers) else (),
        max_num_batched_tokens=asked.max_num_batched_tokens,
    )
    return limits, pool


def _serve(machine: _Machine, asked: RealityConfig, load: "TimedLoad", *, seed: int) -> "tuple[Run, StepLog]":
    from pagedkv.runtime.engine import LLMEngine
    from pagedkv.sims.reality.processor_clock import ProcessorClock
    from pagedkv.sims.reality.real_run import serve_timed

    limits, pool = _limits(asked, load, machine.model)
    engine = LLMEngine(
        machine.model,
        num_blocks=pool.num_blocks,
        block_size=pool.block_size,
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        max_model_len=limits.max_model_len,
        enable_prefix_caching=pool.enable_prefix_caching,
    )
    rng = np.random.default_rng(seed)  # other prompts in every run: only lengths and times are the same
    vocabulary = int(machine.model.config.vocab_size)
    prompts = [rng.integers(0, vocabulary, size) for size in load.prompt_tokens.tolist()]

    def submit(number: int) -> int | None:
        return engine.add_request(prompts[number], max_tokens=int(load.output_tokens[number]))

    clock = ProcessorClock() if asked.processor_clock else None
    now, sleep = (time.perf_counter, time.sleep) if clock is None else (clock.now, clock.sleep)
    return serve_timed(engine, load, submit, now=now, sleep=sleep, told=lambda _: None)
