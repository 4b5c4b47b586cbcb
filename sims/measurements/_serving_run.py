"""What a run of a serving benchmark says of steps: how long first tokens and those behind them took.

The median time between tokens is that of a step which only decodes. With one request at a time, the time to the first token is its
prefill; with several, it has queueing in it, and what a whole run of requests made per second stands for it.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from pagedkv.errors import ConfigError
from pagedkv.sims.measurements import MeasuredRate, positive, whole

_WAVES = 4
"""A run is long enough for its rate to count from so many requests per place on."""


def serving_rates(where: str, run: Mapping[str, Any], notes: list[str]) -> Iterator[MeasuredRate]:
    """Yield the rates of one run.

    Args:
        where: The file and the place in it.
        run: Figures under the names of vLLM's result; a `max_concurrency` or `request_rate` that is missing means no limit.
        notes: What is left out of it is added here.

    Raises:
        ConfigError: If a figure is missing or cannot be.
    """
    completed = whole(run.get("completed"), where, "completed", least=1)
    prompt = round(positive(run.get("total_input_tokens"), where, "total_input_tokens") / completed)
    output = positive(run.get("total_output_tokens"), where, "total_output_tokens") / completed
    duration_s = positive(run.get("duration"), where, "duration", "the seconds that the run took")
    unlimited = str(run.get("request_rate", "inf")) == "inf"
    most = run.get("max_concurrency")
    places = completed if most is None else min(whole(most, where, "max_concurrency", least=1), completed)
    if output < 2:
        raise ConfigError(
            f"{where}: {output:g} output tokens per request; decoding shows from 2 on, such as --random-output-len 128"
        )
    # Alone, a request's tokens come step by step; among others, times per output token have their prefills in them.
    known = ("median_itl_ms", "median_tpot_ms", "mean_tpot_ms") if places == 1 else ("median_itl_ms",)
    key = next((each for each in known if run.get(each)), None)
    if key is None:
        raise ConfigError(f"{where}: no {' and no '.join(known)}; the benchmark writes them")
    token_s = positive(run[key], where, key, "milliseconds") / 1e3
    if unlimited:
        batch = places
    else:  # Little's law: how many are there on average
        mean_s = positive(run.get("mean_tpot_ms"), where, "mean_tpot_ms", "milliseconds") / 1e3 * (output - 1)
        batch = min(max(round(completed * mean_s / duration_s), 1), places)
        notes.append(f"{where}: requests came at a rate, so that {batch} is how many decoded at once on average")
    yield MeasuredRate(
        where=f"{where}, {key}", kind="decode", batch=batch, depth=prompt + round(output / 2), tokens_per_s=batch / token_s
    )
    if unlimited and places == 1:
        key = "median_ttft_ms" if run.get("median_ttft_ms") else "mean_ttft_ms"
        first_s = positive(run.get(key), where, key, "milliseconds") / 1e3
        yield MeasuredRate(where=f"{where}, {key}", kind="prefill", batch=1, prompt_tokens=prompt, tokens_per_s=prompt / first_s)
    elif unlimited and completed >= _WAVES * places:
        rate = positive(run.get("output_throughput"), where, "output_throughput", "output tokens a second")
        steps = max(round(output) - 1, 1)  # a prefill makes the first token
        yield MeasuredRate(
            where=f"{where}, output_throughput",
            kind="run",
            batch=places,
            prompt_tokens=prompt,
            output_tokens=steps,
            tokens_per_s=rate * steps / output,
        )
    else:
        notes.append(
            f"{where}: its time to the first token has queueing in it, so that it says nothing of prefill; needs "
            f"--max-concurrency 1, or --max-concurrency with {_WAVES} times as many --num-prompts and no --request-rate"
        )
