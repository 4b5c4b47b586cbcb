"""What a step of any scheduler is to its tests."""

from pagedkv.scheduling.step import Step, StepScheduler


def add(to: StepScheduler, *lengths: tuple[int, int], priority: int = 0) -> list[int | None]:
    """Add requests of so many prompt and output tokens."""
    return [to.add(prompt_tokens=prompt, output_tokens=output, priority=priority) for prompt, output in lengths]


def entries(step: Step) -> list[tuple[int, int]]:
    """(request, tokens) in scheduling order."""
    n = step.num_entries
    return list(zip(step.batch["request"][:n].tolist(), step.batch["num_scheduled_tokens"][:n].tolist(), strict=True))


def advance(one: StepScheduler) -> list[tuple[int, int]]:
    """Decide and complete a step; return its entries."""
    scheduled = entries(one.schedule())
    one.check_integrity()
    one.complete()
    one.check_integrity()
    return scheduled
