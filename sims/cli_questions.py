"""The inverse questions as commands: how many users, how long a context, what of many settings, which of two runs, what to set.

Heavy modules are imported inside functions, so that `--help` stays quick.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

from cyclopts import Parameter

from pagedkv.errors import ConfigError
from pagedkv.sims.cli_engines import ask_engines
from pagedkv.sims.cli_output import INTERRUPTED, LOAD, MEASUREMENT, OUTPUT, SERVING, check_json, output_path, print_view, write_json
from pagedkv.sims.cli_report import further_command, question_command, report_file, write_capacity_report
from pagedkv.sims.config import ATTAIN, LoadConfig, MeasurementConfig, ServingConfig, SimulationConfig

T = TypeVar("T")

Load = Annotated[LoadConfig, Parameter(name="*", group=LOAD)]
Serving = Annotated[ServingConfig, Parameter(name="*", group=SERVING)]
Measurement = Annotated[MeasurementConfig, Parameter(name="*", group=MEASUREMENT)]
Attain = Annotated[float, Parameter(group=MEASUREMENT)]
Config = Annotated[Path | None, Parameter(group=OUTPUT)]
Json = Annotated[str | None, Parameter(group=OUTPUT, allow_leading_hyphen=True)]
Report = Annotated[str | None, Parameter(group=OUTPUT)]


def max_users(
    *,
    load: Load = LoadConfig(),  # noqa: B008
    serving: Serving = ServingConfig(),  # noqa: B008
    measurement: Measurement = MeasurementConfig(),  # noqa: B008
    attain: Attain = ATTAIN,
    config: Config = None,
    json: Json = None,
    report: Report = None,
) -> None:
    """Find the largest number of users within the goals; without goals, the largest that is stable. Allocator: the engine's own.

    Several engines, --engine vllm,sglang, are asked one after the other and stand in one table.

    Args:
        attain: Share of the requests that must meet the goals.
        config: Take settings from a config.toml, as --out of simulate writes it; flags override it.
        json: Write the answer to this file; - prints it, and nothing else, to stdout.
        report: Write report.html to this file: the curve of the search, and the run at what was found.
    """
    from pagedkv.sims.capacity_answer import SCHEMA_VERSION, shown_value
    from pagedkv.sims.command import changed, flat
    from pagedkv.sims.console_capacity import show_max_users
    from pagedkv.sims.max_users import max_users as search

    del config  # main has put its settings among the flags
    wanted = SimulationConfig(load=load, serving=serving, measurement=measurement)
    if "," in serving.engine:
        ask_engines("max-users", search, wanted, unit="users", attain=attain, json=json, report=report)
        return
    page = report_file(report)
    asked, answers = _answers(search, wanted, attain=attain, json=json)
    if page is not None:
        words = question_command("max-users", wanted, attain=attain)
        run = changed(asked, users=shown_value(answers[0]))
        further = further_command("max-users", wanted, answers[0], attain=attain)
        write_capacity_report(page, run, answers, unit="users", attain=attain, command=words, further=further)
    if json is None:
        print_view(lambda console: show_max_users(answers, console, attain=attain))
        return
    head = {"schema_version": SCHEMA_VERSION, "question": "max-users", "unit": "users", "attain": attain, "config": flat(asked)}
    write_json(head | {"answers": [answer.document() for answer in answers]}, json)


def max_context(
    *,
    load: Load = LoadConfig(),  # noqa: B008
    serving: Serving = ServingConfig(),  # noqa: B008
    measurement: Measurement = MeasurementConfig(),  # noqa: B008
    attain: Attain = ATTAIN,
    config: Config = None,
    json: Json = None,
    report: Report = None,
) -> None:
    """Find the longest context at which --users N fit: within the goals; without goals, stable and without preemptions.

    Every request has the context; --random-output-len tokens of it are its output (256 unless given). max-model-len is the context
    itself unless given. Allocator: the engine's, unless given. Several engines, --engine vllm,sglang, stand in one table.

    Args:
        attain: Share of the requests that must meet the goals.
        config: Take settings from a config.toml, as --out of simulate writes it; flags override it.
        json: Write the answer to this file; - prints it, and nothing else, to stdout.
        report: Write report.html to this file: the curve of the search, and the run at what was found.
    """
    from pagedkv.sims.capacity_answer import SCHEMA_VERSION, shown_value
    from pagedkv.sims.command import flat
    from pagedkv.sims.console_capacity import show_max_context
    from pagedkv.sims.max_context import max_context as search
    from pagedkv.sims.max_context import with_context

    del config  # main has put its settings among the flags
    wanted = SimulationConfig(load=load, serving=serving, measurement=measurement)
    if "," in serving.engine:
        ask_engines("max-context", search, wanted, unit="tokens", attain=attain, json=json, report=report)
        return
    page = report_file(report)
    asked, answers = _answers(search, wanted, attain=attain, json=json)
    if page is not None:
        words = question_command("max-context", wanted, attain=attain)
        found = [answer.found for answer in answers]
        run = with_context(asked, shown_value(found[0]), output_len=answers[0].output_len)
        further = further_command("max-context", wanted, found[0], attain=attain)
        write_capacity_report(page, run, found, unit="tokens of context", attain=attain, command=words, further=further)
    if json is None:
        print_view(lambda console: show_max_context(answers, console, attain=attain))
        return
    head = {"schema_version": SCHEMA_VERSION, "question": "max-context", "unit": "tokens", "attain": attain, "config": flat(asked)}
    write_json(head | {"answers": [answer.document() for answer in answers]}, json)


def sweep(
    *flags: Annotated[str, Parameter(allow_leading_hyphen=True)],
    out: Annotated[str | None, Parameter(group=OUTPUT)] = None,
    workers: Annotated[int | None, Parameter(group=OUTPUT)] = None,
    metric: Annotated[str | None, Parameter(group=OUTPUT)] = None,
    config: Config = None,
    json: Json = None,
) -> None:
    """Simulate every combination of some flags' values: --users 10,20,50..100:10 --block-size 8,16 --out FOLDER.

    A comma separates values (a comma of a value itself is written with a backslash before it); first..last:step is a range of
    numbers, times or sizes. A value of --goodput is words: --goodput ttft:2000 tpot:100,ttft:500 tpot:50 are two sets of goals.
    --enforce-eager true,false sweeps a switch. Every run has one allocator, paged unless given. An interrupted sweep goes on where
    it stopped when the command is repeated.

    Args:
        flags: Any flags of simulate.
        out: Folder of results.csv, results.json and sweep.html; results.jsonl gets every run as soon as it is done.
        workers: Processes [default: one per core].
        metric: Figure of the picture, such as ttft_s.p99 [default: goodput_share, or output_tokens_per_s without goals].
        config: Take settings from a config.toml, as --out of simulate writes it; flags override it.
        json: Write results.json to this file, too; - prints it, and nothing else, to stdout.
    """
    from pagedkv.sims.console_sweep import show_sweep
    from pagedkv.sims.progress import ProgressOnStderr
    from pagedkv.sims.sweep import run_sweep
    from pagedkv.sims.sweep_grid import parse_grid

    del config  # main has put its settings among the flags
    check_json(json)
    if out is None:
        raise ConfigError(
            "sweep needs flags with several values, and a folder for what comes out: "
            "simulate sweep --users 20..100:20 --block-size 16,64 --out sweep/"
        )
    grid, folder = parse_grid(flags), output_path(out, "--out")
    assert folder is not None
    steps = [f"of {len(grid):,} runs, {i:,} done" for i in range(len(grid) + 1)]
    done = 0

    def tell(finished: int, total: int) -> None:
        nonlocal done
        done = finished
        progress(steps[finished], 0, finished / total)

    try:
        with ProgressOnStderr(steps, repeats=1) as progress:
            result = run_sweep(grid, folder, workers=workers, metric=metric, progress=tell)
    except KeyboardInterrupt:
        kept = f"{done:,} of {len(grid):,} runs are kept in {folder}: the same command goes on from there"
        print(f"interrupted: {kept}", file=sys.stderr)  # noqa: T201
        sys.exit(INTERRUPTED)
    if json is None:
        print_view(lambda console: show_sweep(result, console))
        print(f"Written: {folder}", file=sys.stderr)  # noqa: T201
    else:
        write_json(result.document(), json)


def compare(first: str | None = None, second: str | None = None, *, json: Json = None) -> None:
    """Say what differs between two runs: settings, figures, and with --repeats in both whether it is more than noise.

    Args:
        first: A summary.json, or the folder that --out wrote.
        second: Another.
        json: Write the comparison to this file; - prints it, and nothing else, to stdout.
    """
    from pagedkv.sims.console_compare import show_run_comparison
    from pagedkv.sims.run_comparison import compare_runs

    if first is None or second is None:
        raise ConfigError("compare needs two runs, each a summary.json or a folder that --out wrote: simulate compare run1/ run2/")
    check_json(json)
    compared = compare_runs(Path(first), Path(second))
    if json is None:
        print_view(lambda console: show_run_comparison(compared, console))
    else:
        write_json(compared.document(), json)


def advise(
    *,
    load: Load = LoadConfig(),  # noqa: B008
    serving: Serving = ServingConfig(),  # noqa: B008
    measurement: Measurement = MeasurementConfig(),  # noqa: B008
    attain: Attain = ATTAIN,
    config: Config = None,
    json: Json = None,
) -> None:
    """Find settings that serve --users N better, one at a time from the defaults, and print a vllm serve command.

    A setting is changed only if a simulation gains from it: more requests within the goals, then more throughput. Settings given
    here are kept.

    Args:
        attain: Share of the requests that should meet the goals.
        config: Take settings from a config.toml, as --out of simulate writes it; flags override it.
        json: Write the advice to this file; - prints it, and nothing else, to stdout.
    """
    from pagedkv.sims.advise import advise as search
    from pagedkv.sims.console_advise import show_advice
    from pagedkv.sims.engines import load_engine
    from pagedkv.sims.progress import ProgressOnStderr
    from pagedkv.sims.scenario import asked_allocators

    del config  # main has put its settings among the flags
    check_json(json)
    if not serving.engine.startswith("vllm") or "," in serving.engine:
        raise ConfigError(f"--engine {serving.engine}: advise writes a vllm serve command, so it is about vllm, or a version of it")
    own = load_engine(serving.engine).columns(serving)[:1]
    names = asked_allocators(measurement, usual=own)
    if names != own:
        raise ConfigError(f"--allocator is {','.join(names)}: advise is about vLLM, whose allocator is {own[0]} for this model")
    asked = SimulationConfig(load=load, serving=serving, measurement=replace(measurement, allocator=names))
    with ProgressOnStderr(["advise"], repeats=1) as progress:
        advice = search(asked, attain=attain, progress=_telling(progress, "advise"))
    if json is None:
        print_view(lambda console: show_advice(advice, console))
    else:
        write_json(advice.document(), json)


def _answers(
    search: Callable[..., T], wanted: SimulationConfig, *, attain: float, json: str | None
) -> tuple[SimulationConfig, list[T]]:
    """Ask `search` about one engine, once per allocator, with progress on stderr."""
    from pagedkv.sims.engines import load_engine
    from pagedkv.sims.progress import ProgressOnStderr
    from pagedkv.sims.scenario import asked_allocators

    check_json(json)
    serving, measurement = wanted.serving, wanted.measurement
    names = asked_allocators(measurement, usual=load_engine(serving.engine).columns(serving)[:1])
    config = replace(wanted, measurement=replace(measurement, allocator=names))
    with ProgressOnStderr(names, repeats=1) as progress:
        return config, [search(config, name, attain=attain, progress=_telling(progress, name)) for name in names]


def _telling(progress: Any, name: str) -> Any:
    return lambda share: progress(name, 0, share)
