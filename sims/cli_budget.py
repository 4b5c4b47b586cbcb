"""`simulate budget`: where the memory goes, and how it got there."""

from typing import Annotated

from cyclopts import Parameter

from pagedkv.errors import ConfigError
from pagedkv.sims.cli_output import OUTPUT, SERVING, check_json, print_view, write_json
from pagedkv.sims.config import ServingConfig


def budget(
    *,
    timeline: bool = False,
    comes_and_goes: tuple[str, ...] = (),
    warm_caches: bool = False,
    compile_jobs: int | None = None,
    direct_io: bool = False,
    drop_caches: bool = False,
    cache_ram: str | None = None,
    kv_offloading_size: str | None = None,
    serving: Annotated[ServingConfig, Parameter(name="*", group=SERVING)] = ServingConfig(),  # noqa: B008
    json: Annotated[str | None, Parameter(group=OUTPUT, allow_leading_hyphen=True)] = None,
) -> None:
    """Say where the memory goes in eight parts; with --timeline, how it gets there and what may go wrong on the way.

    Args:
        timeline: Show every phase from before the start until the engine serves, the moment of least available memory, what happens
            then, and the settings that avoid it.
        comes_and_goes: Timeline: who comes for a while: a second model or a size, e.g. qwen3-8b or 12GiB, while the engine serves;
            12GiB@loading from its start until its KV cache has its size. Several come one after the other while it serves, and
            at once while it loads.
        warm_caches: Timeline: nothing is compiled, an earlier start has left all of it on disk.
        compile_jobs: Timeline: compilers at once, as MAX_JOBS says [default: one for each core].
        direct_io: Timeline: weights are read past the page cache (vLLM --load-format instanttensor, llama.cpp --direct-io).
        drop_caches: Timeline: something drops page caches while weights are loaded.
        cache_ram: Timeline: what llama-server may keep of old prompts, 0GiB to turn it off [default: 8GiB].
        kv_offloading_size: Timeline: a tier of KV blocks in the processor's memory, e.g. 16GiB.
        json: Write the result document to this file; - prints it, and nothing else, to stdout.
    """
    from dataclasses import fields

    from pagedkv.sims.budget_timeline import TimelineFlags, budget_timeline, document, nvme_note, with_note
    from pagedkv.sims.deployment import deploy, memory_request

    check_json(json)
    flags = TimelineFlags(
        comes_and_goes=comes_and_goes,
        warm_caches=warm_caches,
        compile_jobs=compile_jobs,
        direct_io=direct_io,
        drop_caches=drop_caches,
        cache_ram=cache_ram,
        kv_offloading_size=kv_offloading_size,
    )
    if not timeline:
        for each in fields(TimelineFlags):
            if getattr(flags, each.name) != each.default:
                raise ConfigError(f"--{each.name.replace('_', '-')} is about the way to the budget: add --timeline")
        _show_budget(serving, json)
        return
    answer = budget_timeline(memory_request(serving), flags)
    if answer.timeline.budget is not None and answer.timeline.options.host_tier_bytes and answer.timeline.request.hardware.unified:
        from pagedkv.sims.budget_timeline import PREFIX_TOKENS

        deployment = deploy(serving)
        tokens = deployment.scheduler.max_num_batched_tokens
        cost = deployment.step_time.prefill_cost(PREFIX_TOKENS, max_num_batched_tokens=tokens)
        answer = with_note(answer, nvme_note(answer.timeline, cost.total_s))
    if json is None:
        from pagedkv.sims.console_timeline import show_timeline

        print_view(lambda console: show_timeline(answer, console))
    else:
        write_json({"timeline": document(answer)}, json)


def _show_budget(serving: ServingConfig, json: str | None) -> None:
    from pagedkv.sims.budget_parts import budget_document
    from pagedkv.sims.console_static import show_budget
    from pagedkv.sims.deployment import deploy

    deployment = deploy(serving)
    if json is None:
        print_view(lambda console: show_budget(deployment, console))
    else:
        write_json({"budget": budget_document(deployment.budget)}, json)
