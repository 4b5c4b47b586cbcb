"""`simulate calibrate`: a hardware file from measurements. A part of the composition root, for it may measure with the kernels."""

from datetime import date
from pathlib import Path
from typing import Annotated

from cyclopts import Group, Parameter

from pagedkv.errors import ConfigError
from pagedkv.sims.cli_output import OUTPUT, SERVING, check_json, output_path, print_view, write_json
from pagedkv.sims.config import ServingConfig

MEASURED = Group("Measured rates, without a file", sort_key=0)


def calibrate(
    *files: str,
    tokens_per_s: Annotated[float | None, Parameter(group=MEASURED)] = None,
    prefill_tokens_per_s: Annotated[float | None, Parameter(group=MEASURED)] = None,
    batch: Annotated[int, Parameter(group=MEASURED)] = 1,
    context: Annotated[int | None, Parameter(group=MEASURED)] = None,
    prompt: Annotated[int | None, Parameter(group=MEASURED)] = None,
    measure: Annotated[bool, Parameter(group=MEASURED)] = False,
    serving: Annotated[ServingConfig, Parameter(name="*", group=SERVING)] = ServingConfig(),  # noqa: B008
    output: Annotated[str | None, Parameter(group=OUTPUT)] = None,
    force: Annotated[bool, Parameter(group=OUTPUT)] = False,
    json: Annotated[str | None, Parameter(group=OUTPUT, allow_leading_hyphen=True)] = None,
) -> None:
    """Fit step times and memory of your machine to measurements made on it, and write a hardware file for --hardware.

    Args:
        files: Results of `vllm bench serve`, tables or records of llama-bench and llama-batched-bench, a start-up log of vLLM (or a
            folder with meta.json), a CSV of rows; the format is recognised.
        tokens_per_s: Output tokens a second that were measured, of all sequences together; with --batch and --context.
        prefill_tokens_per_s: Prompt tokens a second that were measured; with --prompt.
        batch: Sequences at once behind those rates.
        context: Tokens in the cache of each sequence, on average, while --tokens-per-s was measured [default: 512].
        prompt: Tokens of each prompt behind --prefill-tokens-per-s [default: 2048].
        measure: Measure this machine's memory bandwidth and arithmetic with pagedkv's own kernels, instead of reading files.
        output: Write the hardware file here; its name must end in .toml.
        force: Replace that file if it exists.
        json: Write the result document to this file; - prints it, and nothing else, to stdout.
    """
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
    _say_where(path)


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


def _say_where(path: Path | None) -> None:
    import sys

    if path is None:
        print("Nothing is written: give --output my-machine.toml to keep it.", file=sys.stderr)  # noqa: T201
    else:
        print(f"Written: {path}; use it with --hardware {path}", file=sys.stderr)  # noqa: T201
