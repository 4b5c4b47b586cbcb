"""The commands beside `simulate` itself: what fits, the catalogues, words, prefix caches, fuzzing; and those of cli_questions.

Heavy modules are imported inside functions, so that `--help` stays quick.
"""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from pagedkv.sims import cli_questions
from pagedkv.sims.cli_budget import budget
from pagedkv.sims.cli_output import BAR_MISSED, LOAD, OUTPUT, SERVING, check_json, output_path, print_view, write_json
from pagedkv.sims.config import ServingConfig
from pagedkv.sims.config_words import DEFAULT_PARAMETER

# An app of its own: cyclopts drops the keys of a configuration file that are names of commands, and "hardware" is both.
tools = App(name="simulate", default_parameter=DEFAULT_PARAMETER, suppress_keyboard_interrupt=False)


@tools.command
def fit(
    *,
    users: Annotated[int | None, Parameter(group=LOAD)] = None,
    context: Annotated[int | None, Parameter(group=LOAD)] = None,
    serving: Annotated[ServingConfig, Parameter(name="*", group=SERVING)] = ServingConfig(),  # noqa: B008
    json: Annotated[str | None, Parameter(group=OUTPUT, allow_leading_hyphen=True)] = None,
) -> None:
    """Say at once what fits: KV tokens, requests by context length, next to what a formula claims.

    Args:
        users: Say how long the context of so many requests can be at once.
        context: Say how many requests of so many tokens fit at once.
        json: Write the answer to this file; - prints it, and nothing else, to stdout.
    """
    from pagedkv.sims.console_static import show_fit
    from pagedkv.sims.deployment import deploy
    from pagedkv.sims.fit import fit as static_fit
    from pagedkv.sims.fit import under_each_rule

    deployment = deploy(serving)
    answer = static_fit(deployment, users=users, context=context)
    if json is None:
        print_view(lambda console: show_fit(answer, deployment, console))
    else:
        engines = [asdict(other) for other in under_each_rule(deployment)]
        write_json(asdict(answer) | {"engines": engines}, json)


@tools.command
def models(
    *text: str,
    json: Annotated[str | None, Parameter(group=OUTPUT, allow_leading_hyphen=True)] = None,
) -> None:
    """List the models of the catalogue, or those whose name has a text.

    Args:
        text: What to look for, e.g. qwen3 or llama 70b: every word must be in the name or the title, or else in a repository.
        json: Write the list to this file; - prints it, and nothing else, to stdout.
    """
    from pagedkv.sims.catalogue_lists import find_models, models_document
    from pagedkv.sims.console_static import show_models

    check_json(json)
    found = find_models(" ".join(text))
    if json is None:
        print_view(lambda console: show_models(found, console))
    else:
        write_json(models_document(found.items()), json)


@tools.command
def hardware(
    *text: str,
    json: Annotated[str | None, Parameter(group=OUTPUT, allow_leading_hyphen=True)] = None,
) -> None:
    """List the machines of the catalogue, or those whose name has a text.

    Args:
        text: What to look for, e.g. h200: every word must be in the name or the title, or else in another name of it.
        json: Write the list to this file; - prints it, and nothing else, to stdout.
    """
    from pagedkv.sims.catalogue_lists import find_hardware, hardware_document
    from pagedkv.sims.console_static import show_hardware

    check_json(json)
    found = find_hardware(" ".join(text))
    if json is None:
        print_view(lambda console: show_hardware(found, console))
    else:
        write_json(hardware_document(found.items()), json)


@tools.command
def explain(*words: str) -> None:
    """Explain a figure or a word of the answer by its formula; without a word, all of them.

    Args:
        words: A field such as ttft_s or kv_when_waiting, or a title such as goodput.
    """
    from pagedkv.sims.console_static import show_entries
    from pagedkv.sims.glossary import GLOSSARY
    from pagedkv.sims.glossary import explain as entry_of

    entries = [entry_of(" ".join(words))] if words else list(GLOSSARY.values())
    print_view(lambda console: show_entries(entries, console))


@tools.command
def prefix_cache(
    trace: str,
    *,
    blocks: str = "inf,30000,10000",
    cache: str = "block-pool,radix,ideal-lru",
    eviction: str = "lru",
    json: Annotated[str | None, Parameter(group=OUTPUT, allow_leading_hyphen=True)] = None,
) -> None:
    """Say how much of a trace's prompts each prefix cache finds, by capacity, and which capacity reaches 90 % of the best.

    Args:
        trace: A file that says what its prompts are made of (Mooncake's hash_ids).
        blocks: Capacities in blocks of the trace, a comma list; inf evicts nothing.
        cache: block-pool (the real allocator), radix (SGLang's tree), ideal-lru; a comma list.
        eviction: Policies, a comma list: lru, lfu, fifo, mru, slru, priority, cost-aware and others.
        json: Write the result document to this file; - prints it, and nothing else, to stdout.
    """
    from pagedkv.sims.console_prefix import show_prefix_study
    from pagedkv.sims.prefix_study import study_prefixes

    check_json(json)
    study = study_prefixes(Path(trace), blocks=blocks, caches=cache, evictions=eviction)
    if json is None:
        print_view(lambda console: show_prefix_study(study, console))
    else:
        write_json(study.document(), json)


@tools.command
def fuzz(
    *,
    allocator: str = "all",
    ops: int = 100_000,
    seed: int = 0,
    json: Annotated[str | None, Parameter(group=OUTPUT, allow_leading_hyphen=True)] = None,
) -> None:
    """Do random operations on allocators, hold each to its laws, and name the seed of a failure. Exit status 1 if one fails.

    Args:
        allocator: Names, a comma list; all: every one there is.
        ops: Operations for each allocator.
        seed: Same seed, same operations.
        json: Write the result document to this file; - prints it, and nothing else, to stdout.
    """
    from pagedkv.sims.console_fuzz import show_fuzz
    from pagedkv.sims.fuzz_command import run_fuzz
    from pagedkv.sims.progress import ProgressOnStderr

    check_json(json)
    names = tuple(allocator.split(","))
    with ProgressOnStderr(["fuzz"], repeats=1) as progress:
        results = run_fuzz(names, ops, seed, progress=lambda what, share: progress("fuzz", 0, share))
    if json is None:
        print_view(lambda console: show_fuzz(results, console))
    else:
        write_json({"results": [result.document() for result in results]}, json)
    if any(result.failure for result in results):
        sys.exit(1)


@tools.command
def validate(
    *,
    data: str | None = None,
    sections: str | None = None,
    hardware: str | None = None,
    rows: bool = False,
    json: Annotated[str | None, Parameter(group=OUTPUT, allow_leading_hyphen=True)] = None,
) -> None:
    """Compare the simulator with measurements: published rows, a real vLLM run, three studies. Exit status 3 if a bar is missed.

    Args:
        data: A folder like shared/data, a CSV of your own rows with the columns of dgx_spark_benchmarks.csv, or a folder with a
            vLLM log (meta.json, requests.jsonl, timeseries.csv) [default: ../shared/data beside a checkout].
        sections: Comparisons, a comma list: published_rows, vllm_log, sosp23, mooncake, watermark [default: all].
        hardware: The machine of your rows or log [default: dgx-spark for rows; the one that a log names].
        rows: Print every row, too.
        json: Write the result document to this file; - prints it, and nothing else, to stdout.
    """
    from pagedkv.sims.console_validate import show_validation
    from pagedkv.sims.progress import ProgressOnStderr
    from pagedkv.sims.validation.run import SECTIONS
    from pagedkv.sims.validation.run import validate as compare

    check_json(json)
    path = output_path(data, "--data")
    names = SECTIONS if sections is None else tuple(name.strip() for name in sections.split(","))
    with ProgressOnStderr(names, repeats=1) as progress:
        validation = compare(path, only=names, hardware=hardware, telling=lambda name, share: progress(name, 0, share))
    if json is None:
        print_view(lambda console: show_validation(validation, console, rows=rows))
    else:
        write_json(validation.document(), json)
    if not validation.holds:
        sys.exit(BAR_MISSED)


tools.command(budget)
for question in (
    cli_questions.max_users,
    cli_questions.max_context,
    cli_questions.sweep,
    cli_questions.compare,
    cli_questions.advise,
):
    tools.command(question)
