"""What `simulate` does with several engines: runs each, and shows them side by side."""

import sys

from pagedkv.errors import ConfigError
from pagedkv.sims.cli_output import output_path, print_view
from pagedkv.sims.config import SimulationConfig


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
