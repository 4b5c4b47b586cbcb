"""The head of report.html: the verdict, and the commands that give it again, and what to try next."""

from html import escape
from typing import Any

from pagedkv.sims.command import command_line
from pagedkv.sims.comparison import advantages, prefix_note
from pagedkv.sims.config import ATTAIN
from pagedkv.sims.reporting.page import badge, command
from pagedkv.sims.results import Results
from pagedkv.sims.run_texts import run_facts
from pagedkv.sims.verdict import state_words


def verdict_head(results: Results, document: dict[str, Any], *, level: int, proposal: str | None) -> str:
    """Return the verdict as HTML under a heading of this level: who fits, what was asked, how sure that is, and the commands.

    `proposal` is what to try next, if there is something.
    """
    scenario = results.scenario
    items = "".join(
        f"<li><strong>{escape(c['allocator'])}</strong> {badge(c['verdict']['status'])} {escape(c['verdict']['text'])}</li>"
        for c in document["results"]
    )
    note = prefix_note(document, scenario.deployment.why_no_prefix_caching)
    gains = "".join(f"<li>{escape(line)}</li>" for line in (*advantages(document), *([note] if note else [])))
    first = document["results"][0]["verdict"]
    state = state_words(first["status"], fits=first["fits"])
    headline = first["text"].partition(f": {state}")[0]  # a trace's name may hold a colon, too
    served = scenario.deployment
    model = f"{scenario.model_titles}, {served.weight_format.name} weights"
    subtitle = f"{model}, on {served.hardware.title}, {document['config']['engine']}"
    goals = ", ".join(f"{goal.metric} {1e3 * goal.limit_s:,g} ms" for goal in scenario.goals)
    wanted = f"goals {goals} for {ATTAIN:.0%} of the requests · " if goals else ""
    log, calibration = next(iter(results.by_allocator.values())).runs[0].measured, document["calibration"]
    asked = ""
    if len(log):
        lengths = f"{log.prompt_tokens.mean():,.0f} tokens and ask for {log.output_tokens.mean():,.0f}"
        asked = f" The measured requests have prompts of {lengths}, on average."
    sure = (
        f'Step times are <a href="#assumptions">{calibration["status"]}</a>: rates may be off by a factor of '
        f"{calibration['decode_factor']:.2f} in decoding and {calibration['prefill_factor']:.2f} in prefill."
    )
    return (
        f'<section id="verdict" aria-labelledby="verdict-title">\n<h{level} id="verdict-title">{escape(headline)}</h{level}>\n'
        f'<p class="soft">{escape(subtitle)}</p>\n<ul>{items}{gains}</ul>\n'
        f'<p class="soft">{escape(wanted + run_facts(results) + "." + asked)} {sure}</p>\n'
        f"<p>This run:</p>{command('this-run', command_line(results.scenario.config))}\n"
        + ("" if proposal is None else f"<p>Try next:</p>{command('next-run', proposal)}\n")
        + "</section>"
    )
