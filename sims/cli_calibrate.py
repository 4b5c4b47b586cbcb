"""`simulate calibrate`: a hardware file from measurements. A part of the composition root, for it may measure with the kernels."""

import time
from collections.abc import Callable
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Group, Parameter

from pagedkv.errors import ConfigError
from pagedkv.sims.cli_output import OUTPUT, SERVING, check_json, output_path, print_view, write_json
from pagedkv.sims.config import ServingConfig

if TYPE_CHECKING:
    from pagedkv.hardware_spec import HardwareSpec
    from pagedkv.sims.calibrate.machine import MeasuredDevice

MEASURED = Group("Measured rates, without a file", sort_key=0)


def calibrate(
    *files: str,
    tokens_per_s: Annotated[float | None, Parameter(group=MEASURED)] = None,
    prefill_tokens_per_s: Annotated[float | None, Parameter(group=MEASURED)] = None,
    batch: Annotated[int, Parameter(group=MEASURED)] = 1,
    context: Annotated[int | None, Parameter(group=MEASURED)] = None,
    prompt: Annotated[int | None, Parameter(group=MEASURED)] = None,
    measure: Annotated[bool, Parameter(group=MEASURED)] = False,
    device: Annotated[Literal["auto", "cpu", "cuda"], Parameter(group=MEASURED)] = "auto",
    serving: Annotated[ServingConfig, Parameter(name="*", group=SERVING)] = ServingConfig(),  # noqa: B008
    output: Annotated[str | None, Parameter(group=OUTPUT)] = None,
    force: Annotated[bool, Parameter(group=OUTPUT)] = False,
    json: Annotated[str | None, Parameter(group=OUTPUT, allow_leading_hyphen=True)] = None,
) -> None:
    """Fit step times and memory of your machine to measurements made on it, and write a hardware file for --hardware.

    Args:
        files: Results of `vllm bench serve`, or the table that it or SGLang's bench_serving prints, tables or records of
            llama-bench and llama-batched-bench, a start-up log of vLLM (or a folder with meta.json), a CSV of rows; the format is
            recognised.
        tokens_per_s: Output tokens a second that were measured, of all sequences together; with --batch and --context.
        prefill_tokens_per_s: Prompt tokens a second that were measured; with --prompt.
        batch: Sequences at once behind those rates.
        context: Tokens in the cache of each sequence, on average, while --tokens-per-s was measured [default: 512].
        prompt: Tokens of each prompt behind --prefill-tokens-per-s [default: 2048].
        measure: Measure this machine's memory bandwidth and arithmetic with pagedkv's own kernels, instead of reading files.
        device: What --measure is about: cuda, cpu, or auto for both, and a file about the GPU if there is one.
        output: Write the hardware file here; its name must end in .toml.
        force: Replace that file if it exists.
        json: Write the result document to this file; - prints it, and nothing else, to stdout.
    """
    if measure:
        if files or tokens_per_s is not None or prefill_tokens_per_s is not None:
            raise ConfigError(
                "--measure measures what the machine reaches, files and rates say what an engine makes of it: measure first, "
                "--output my-machine.toml, then calibrate with --hardware my-machine.toml"
            )
        _measure(_output(output, force=force), device, json=json)
        return
    from pagedkv.sims.calibrate.given import given_rates
    from pagedkv.sims.calibrate.study import calibrate as fit
    from pagedkv.sims.console_calibrate import show_calibration

    check_json(json)
    path = _output(output, force=force)
    today = date.today().isoformat()
    given = given_rates(
        tokens_per_s=tokens_per_s, prefill_tokens_per_s=prefill_tokens_per_s, batch=batch, context=context, prompt=prompt
    )
    study = fit(serving, [Path(file) for file in files], given, date=today, name=path.name if path else "my-machine.toml")
    if path is not None:
        from pagedkv.sims.export import write_atomically

        write_atomically(path, study.toml())
    if json is not None:
        write_json(study.document(), json)
    else:
        print_view(lambda console: show_calibration(study, console))
    _say_where(path, study.subject.serving)


def _measure(path: Path | None, device: str, *, json: str | None) -> None:
    """Measure this machine, and write or show what came of it."""
    import sys

    from pagedkv.sims.calibrate.machine import measured_machine
    from pagedkv.sims.console_calibrate import show_machine

    check_json(json)
    gpu, notes = _gpu(device)
    print("Measuring for about a minute; leave the machine alone.", file=sys.stderr)  # noqa: T201
    devices = []
    if gpu is not None:
        try:
            devices.append(_measured(gpu(), _by_rows("cuda", "bf16")))
        except RuntimeError as error:  # CUDA's: memory that others hold, a driver that is too old
            raise ConfigError(f"cannot measure the GPU: {error}; --device cpu measures the processor") from error
    if device != "cuda":
        from pagedkv.kernels.cpu_rates import measure_cpu

        devices.append(_measured(measure_cpu(), _by_rows("cpu", "fp32")))
    name = path.name if path else "my-machine.toml"
    machine = measured_machine(devices, date=date.today().isoformat(), name=name, notes=notes)
    if path is not None:
        from pagedkv.sims.export import write_atomically

        write_atomically(path, machine.toml())
    if json is not None:
        write_json(machine.document(), json)
    else:
        print_view(lambda console: show_machine(machine, console))
    _say_where(path, ServingConfig())


def measured_hardware(kind: str, *, weights: str, clock: Callable[[], float]) -> "HardwareSpec":
    """Return this machine as measured now: its "cpu", or its "cuda" device, that multiplies weights of a type.

    Args:
        kind: cpu or cuda.
        weights: fp32, bf16 or fp16; of others products by rows are not measured.
        clock: What a processor's times are taken with, in seconds.
    """
    from pagedkv.sims.calibrate.machine import measured_machine

    if kind == "cuda":
        from pagedkv.kernels.gpu_rates import measure_gpu

        rates = measure_gpu()
    else:
        from pagedkv.kernels.cpu_rates import measure_cpu

        rates = measure_cpu(clock=clock)
    by_rows = _by_rows(kind, weights, clock=clock)
    return measured_machine([_measured(rates, by_rows)], date=date.today().isoformat(), name="this-machine.toml").hardware


def _by_rows(kind: str, weights: str, *, clock: Callable[[], float] = time.perf_counter) -> Any:
    """Return what products of a few rows reach, `RowSamples`; None without torch, or if weights of that type are not multiplied."""
    from pagedkv.hardware_toml import AS_STORED

    if find_spec("torch") is None or weights not in AS_STORED:
        return None
    from pagedkv.kernels.linear_rates import measure_rows

    return measure_rows(kind, weights, clock=clock)


def _gpu(device: str) -> tuple[Callable[[], Any] | None, list[str]]:
    """Return (what measures the GPU and returns `MachineRates`, or None; what to say of it).

    Raises:
        ConfigError: If a GPU was asked for, and there is none or no torch.
    """
    if device == "cpu":
        return None, []
    if find_spec("torch") is None:
        why = "torch is not installed, and measuring a GPU needs it: pip install 'pagedkv[kernels]'"
    else:
        from pagedkv.kernels.gpu_rates import has_gpu, measure_gpu

        if has_gpu():
            return measure_gpu, []
        why = "torch finds no CUDA device"
    if device == "cuda":
        raise ConfigError(f"--device cuda: {why}; --device cpu measures the processor")
    return None, [f"The processor only: {why}"]


def _measured(rates: Any, rows: Any) -> "MeasuredDevice":
    """Return what the kernels measured, `MachineRates` and `RowSamples`, in the words of the simulator, which knows no kernels."""
    from pagedkv.sims.calibrate.machine import MeasuredDevice, ReachedByRows, ReachedRate

    def rate(what: str, samples: Any) -> ReachedRate:
        return ReachedRate(what=what, value=samples.median, low=samples.low, high=samples.high, num_samples=len(samples.values))

    by, by_rows = f", {rates.threads} threads" if rates.threads else "", None
    if rows is not None:
        reached = tuple(rate(rows.by, samples) for samples in rows.flops)
        by_rows = ReachedByRows(weights=rows.weights, rows=rows.rows, rates=reached)
    return MeasuredDevice(
        name=rates.device,
        kind=rates.kind,
        memory_bytes=rates.memory_bytes,
        available_bytes=rates.available_bytes,
        read=rate(f"reading memory{by}", rates.read),
        copy=rate(f"copying memory, read and written{by}", rates.copy),
        kv_read=rate(f"keys and values read by paged decode attention{by}", rates.kv_read),
        product=rate(f"{rates.product_by}{by}", rates.product),
        others=tuple(rate(f"{name}{by}", samples) for name, samples in rates.others.items()),
        by_rows=by_rows,
    )


def _output(text: str | None, *, force: bool) -> Path | None:
    """Return the file to write, made sure of before anything is computed.

    Raises:
        ConfigError: If it has no name that --hardware takes, or exists, or cannot be written.
    """
    from pagedkv.sims.export import prepare_file

    path = output_path(text, "--output")
    if path is None:
        return None
    if path.suffix != ".toml":
        raise ConfigError(f"--output {text!r} does not end in .toml, and --hardware takes files that do: write {path.stem}.toml")
    if path.exists() and not path.is_dir() and not force:
        raise ConfigError(f"--output {text!r} exists: give another name, or --force to replace it")
    prepare_file(path, flag="--output")
    return path


def _say_where(path: Path | None, serving: ServingConfig) -> None:
    """Tell where the file is, and how to simulate what was measured."""
    import sys
    from dataclasses import replace

    from pagedkv.sims.command import command_line
    from pagedkv.sims.config import LoadConfig, SimulationConfig

    if path is None:
        print("Nothing is written: give --output my-machine.toml to keep it.", file=sys.stderr)  # noqa: T201
        return
    config = SimulationConfig(load=LoadConfig(users=20), serving=replace(serving, hardware=str(path)))
    print(f"Written: {path}. Use it: {command_line(config)}", file=sys.stderr)  # noqa: T201
