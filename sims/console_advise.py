"""Advice in the terminal: the command, and the run behind each of its values."""

from rich.console import Console
from rich.text import Text

from pagedkv.sims.advise import NOTES, Advice


def show_advice(advice: Advice, console: Console) -> None:
    """Print the command, why, and what was tried in vain."""
    console.print(Text("Serve with", "bold"))
    console.print(advice.serve, soft_wrap=True, markup=False)
    if advice.serve_note:
        console.print(Text(advice.serve_note, "yellow"))
    if advice.start_note:
        console.print(Text(advice.start_note, "yellow"))
    console.print()
    if not advice.kept:
        console.print("No setting that was tried gains anything over the defaults.")
    kept = {trial.setting for trial in advice.kept}
    for value in advice.values:
        console.print(Text.assemble((f"{_flag(value.setting)} {value.value}", "bold"), f"  {value.reason}"))
        if value.setting in kept and value.setting in NOTES:
            console.print(Text(f"  {NOTES[value.setting]}", "yellow"))
    before, after = advice.attained
    if before is not None and after is not None:
        console.print(f"In all: {before:.1%} → {after:.1%} of the requests meet the goals.", markup=False)
    rates = advice.output_tokens_per_s
    if rates[0] and rates[1]:
        console.print(f"In all: {rates[0]:,.1f} → {rates[1]:,.1f} output tokens/s.", markup=False)
    if advice.speculation is not None:
        console.print(f"Speculative decoding, {advice.speculation}.", markup=False)
    console.print(Text(advice.verdict, "green" if advice.meets else "yellow"))
    _show_narrower(advice, console)
    vain = [trial for trial in advice.trials if not trial.kept]
    if vain:
        console.print()
        console.print(Text("Tried, and not kept", "bold"))
        for trial in vain:
            console.print(f"  {_flag(trial.setting)} {trial.value}: {trial.reason}", markup=False)
    console.print()
    console.print(f"This run:  {advice.simulate}", soft_wrap=True, markup=False)


def _show_narrower(advice: Advice, console: Console) -> None:
    """Print what fewer bits of weights would reach, apart from the advice."""
    if not advice.narrower_weights:
        return
    console.print()
    console.print(Text("Not advised, since the answers change: fewer bits of weights", "bold"))
    for each in advice.narrower_weights:
        met = "; this meets the goals" if each.meets else ""
        console.print(Text(f"  --quantization {each.quantization}: {each.reason}{met}", "yellow"))
    if (last := advice.narrower_weights[-1]).meets:
        console.print(f"  {last.serve}", soft_wrap=True, markup=False)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
