"""What `simulate`, `max-users` and `max-context` do with several engines: ask each, and show them side by side."""

import sys
from typing import TYPE_CHECKING

from pagedkv.errors import ConfigError
from pagedkv.sims.cli_output import check_json, output_path, print_view, say_size, write_json
from pagedkv.sims.config import SimulationConfig

if TYPE_CHECKING:
    from pagedkv.sims.engine_capacity import Search


def compare_engines(config: SimulationConfig, *, json: str | None, out: str | None, report: str | None, overwrite: bool) -> None:
    """Simulate every engine that `config` names with the same load.

    Args:
        config: What is asked for.
        json: Write the comparison to this file; - prints it, and nothing else, to stdout.
        out: Write comparison.json, metrics.prom and trace.json of all engines to this folder, and each one's results to a folder in
            it by its name.
        report: Not for several engines.
        overwrite: Replace what other runs have left in the folders of `out`.

    Raises:
        ConfigError: If nothing can run, or a report is wanted.
    """
    from pagedkv.sims.chrome_trace import trace_text
    from pagedkv.sims.engine_comparison import column_name, scenarios
    from pagedkv.sims.engine_comparison import compare_engines as run_all
    from pagedkv.sims.export import keep_other_runs, prepare_file, prepare_folder, to_json, write, write_atomically
    from pagedkv.sims.progress import ProgressOnStderr
    from pagedkv.sims.vllm_metrics import metrics_text

    if report is not None:
        raise ConfigError("--report and --images show one engine: with several, give --out FOLDER, which gets a report for each")
    folder, file = output_path(out, "--out"), output_path(None if json == "-" else json, "--json")
    ready, refused = scenarios(config)
    say_size(ready.values())
    if folder is not None:
        for engine, scenario in ready.items():
            if not overwrite:
                keep_other_runs(scenario, folder / engine)
            prepare_folder(folder / engine)
    if file is not None:
        prepare_file(file, flag="--json")
    names = [column_name(engine, allocator) for engine, scenario in ready.items() for allocator in scenario.allocators]
    with ProgressOnStderr(names, repeats=config.measurement.repeats) as progress:
        compared = run_all(config, ready, refused, progress=progress)
    document = to_json(compared.document())
    if folder is not None:
        for engine, results in compared.results.items():
            write(results, folder / engine)
        write_atomically(folder / "metrics.prom", metrics_text(compared.results.values()))
        write_atomically(folder / "trace.json", trace_text(compared.results.values()))
        write_atomically(folder / "comparison.json", document)
    if file is not None:
        write_atomically(file, document)
    if json == "-":
        sys.stdout.write(document)
        return
    from pagedkv.sims.console_engines import show_engines

    print_view(lambda console: show_engines(compared, console))
    for path in (folder, file):
        if path is not None:
            print(f"Written: {path}", file=sys.stderr)  # noqa: T201


def ask_engines(
    question: str,
    search: "Search",
    config: SimulationConfig,
    *,
    unit: str,
    attain: float,
    json: str | None,
    report: str | None,
) -> None:
    """Ask `search`, the question of this name, for every engine that `config` names.

    Args:
        question: The command, e.g. max-users.
        search: What answers it for one engine.
        config: What is asked for.
        unit: What the answer counts, e.g. users.
        attain: Share of the requests that must meet the goals.
        json: Write all answers to this file; - prints them, and nothing else, to stdout.
        report: Not for several engines.

    Raises:
        ConfigError: If no engine has an answer, or a report is wanted.
    """
    from pagedkv.sims.capacity_answer import SCHEMA_VERSION
    from pagedkv.sims.console_capacity import show_engine_answers
    from pagedkv.sims.engine_capacity import ask_engines as ask_all
    from pagedkv.sims.engine_capacity import columns, engine_configs
    from pagedkv.sims.progress import ProgressOnStderr

    if report is not None:
        raise ConfigError("--report shows the search of one engine: name one with --engine")
    check_json(json)
    configs = engine_configs(config)
    with ProgressOnStderr(columns(configs), repeats=1) as progress:
        answers = ask_all(search, config, configs, attain=attain, progress=progress)
    if json is None:
        print_view(lambda console: show_engine_answers(answers, console, unit=unit, attain=attain))
        return
    head = {"schema_version": SCHEMA_VERSION, "question": question, "unit": unit, "attain": attain}
    write_json(head | answers.document(), json)
