"""How fast the simulator is: `python -m pagedkv.sims.bench_simulator AZURE_CSV`. Prints CPU and wall seconds, and a ratio.

One core, full KV metrics, real block tables: Llama-3.1-8B on an H100 with 25,000 blocks of 16 tokens. The baseline is the same run
step by step, with Python between the compiled parts of a step, in the same process.
"""

import argparse
import resource
import time
from dataclasses import dataclass
from typing import Any

from pagedkv.sims.config import LoadConfig, MeasurementConfig, ServingConfig, SimulationConfig
from pagedkv.sims.engines import ENGINES
from pagedkv.sims.recording import ITERATIONS
from pagedkv.sims.scenario import Scenario, resolve
from pagedkv.sims.simulation import Run, run

NUM_BLOCKS = 25_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """One run, the fastest of several."""

    run: Run
    cpu_s: float
    wall_s: float


def scenario(load: LoadConfig, *, duration: str | None = None, **serving: Any) -> Scenario:
    """Return the committed configuration under `load`."""
    return resolve(
        SimulationConfig(
            load=load,
            serving=ServingConfig(hardware="h100-80gb", model="llama-3.1-8b", num_gpu_blocks_override=NUM_BLOCKS, **serving),
            measurement=MeasurementConfig(allocator=("paged",), duration=duration),
        )
    )


def timed(case: Scenario, *, repeats: int = 5, step_by_step: bool = False) -> Timing:
    """Return the fastest of `repeats` runs, compiled before."""
    best: Timing | None = None
    for _ in range(repeats):
        cpu_s, wall_s = time.process_time(), time.perf_counter()
        done = run(case, case.allocators[0], seed=0, step_by_step=step_by_step)
        timing = Timing(run=done, cpu_s=time.process_time() - cpu_s, wall_s=time.perf_counter() - wall_s)
        if best is None or timing.cpu_s < best.cpu_s:
            best = timing
    assert best is not None
    return best


def show(name: str, timing: Timing) -> None:
    """Print one line."""
    recorder = timing.run.recorder
    print(  # noqa: T201
        f"{name:44}{timing.cpu_s:8.2f} s CPU{timing.wall_s:8.2f} s wall {recorder.iterations:10,} iterations "
        f"{recorder.request_steps:12,} request-steps {recorder.request_steps / timing.cpu_s / 1e6:6.1f} M/s "
        f"{timing.run.end_s:10,.0f} s simulated, {recorder.num_preemptions:,} preemptions"
    )


def show_engines(trace: str) -> None:
    """Print a line per engine preset, each on what it runs on, with its own budget of the same machine."""
    for engine in ENGINES.names():
        case = resolve(
            SimulationConfig(
                load=LoadConfig(trace=trace, trace_rate=0.5, num_prompts=1000),
                serving=ServingConfig(hardware="h100-80gb", model="llama-3.1-8b", engine=engine, quantization="bf16"),
            )
        )
        timed(case, repeats=1)  # it compiles
        best, slow = timed(case, repeats=3), timed(case, repeats=1, step_by_step=True)
        show(f"1,000 requests, {engine} ({case.allocators[0]})", best)
        steps = int(best.run.recorder.arrays.counters[ITERATIONS])
        us, slow_us = (1e6 * timing.cpu_s / steps for timing in (best, slow))
        print(f"    {us:.1f} µs per iteration; step by step {slow_us:.1f}: {slow_us / us:.1f} × as long")  # noqa: T201


def show_layer_groups() -> None:
    """Print two lines for each of three models whose layers differ: vLLM's blocks per layer group, and one table for all layers."""
    for model in ("gpt-oss-120b", "gemma-3-27b", "qwen3.5-35b-a3b"):
        serving = ServingConfig(model=model, quantization="nvfp4")
        timings = []
        for allocator in ("paged", "hybrid"):
            measurement = MeasurementConfig(allocator=(allocator,))
            case = resolve(SimulationConfig(load=LoadConfig(users=100), serving=serving, measurement=measurement))
            timed(case, repeats=1)  # it compiles
            timings.append(timed(case))
            show(f"100 users, {model} ({allocator})", timings[-1])
        slow = timed(case, repeats=2, step_by_step=True)
        print(  # noqa: T201
            f"    hybrid takes {timings[1].cpu_s / timings[0].cpu_s:.1f} × as long as paged; step by step "
            f"{slow.cpu_s / timings[1].cpu_s:.0f} × as long as compiled"
        )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("trace", help="the Azure conversation trace")
    parser.add_argument("--million", action="store_true", help="also a million requests")
    parser.add_argument("--engines", action="store_true", help="the engine presets instead")
    parser.add_argument("--layer-groups", action="store_true", help="models whose layers differ instead")
    options = parser.parse_args()
    if options.layer_groups:
        show_layer_groups()
        return
    if options.engines:
        show_engines(options.trace)
        return
    azure = {"trace": options.trace, "trace_rate": 0.5}
    small = scenario(LoadConfig(**azure, num_prompts=5000))
    timed(small, repeats=1)
    lengths: dict[str, Any] = {"random_input_len": 1000, "random_output_len": 500, "random_range_ratio": 0.2}
    if options.million:  # before all others: the peak of the process is its own
        show("a million requests", timed(scenario(LoadConfig(request_rate=20.0, num_prompts=1_000_000, **lengths)), repeats=1))
        print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")  # noqa: T201
    first = timed(small)
    show("Azure at half speed, 5,000 requests", first)
    show("Azure at half speed, all", timed(scenario(LoadConfig(**azure)), repeats=3))
    crowd = scenario(LoadConfig(request_rate=1e6, num_prompts=4000, **lengths), max_num_seqs=256)
    show("256 at once, saturated, 4,000 requests", timed(crowd, repeats=2))
    plain = scenario(LoadConfig(request_rate=1e6, num_prompts=4000, **lengths), max_num_seqs=256, enable_prefix_caching=False)
    show("the same without prefix caching", timed(plain, repeats=2))
    users = scenario(LoadConfig(users=10_000, think_time="60s", **lengths), duration="300s")
    show("10,000 closed-loop users, 360 s", timed(users, repeats=1))
    slow = timed(small, repeats=1, step_by_step=True)
    print(f"step by step, the first case takes {slow.cpu_s:.2f} s CPU: {slow.cpu_s / first.cpu_s:.1f} × as long")  # noqa: T201


if __name__ == "__main__":
    main()
