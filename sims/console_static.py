"""What the terminal shows without a simulation: what fits, the catalogues, a word explained, a vLLM command read."""

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.text import Text

from pagedkv.hardware_spec import HardwareSpec
from pagedkv.model_spec import ModelSpec
from pagedkv.sims.console import waterfall
from pagedkv.sims.console_table import plain_table
from pagedkv.sims.deployment import Deployment
from pagedkv.sims.fit import Fit, under_each_rule
from pagedkv.sims.from_vllm import VllmCommand, offload_note
from pagedkv.sims.glossary import Entry
from pagedkv.units import GIB


def show_budget(deployment: Deployment, console: Console) -> None:
    """Print where the memory goes."""
    console.print(Text(f"{deployment.model.title} on {deployment.hardware.title}, {deployment.config.engine}", "bold"), "\n")
    console.print(waterfall(deployment))


def show_fit(answer: Fit, deployment: Deployment, console: Console) -> None:
    """Print what a deployment holds."""
    longest = deployment.scheduler.max_model_len
    console.print(Text(f"{deployment.model.title} on {deployment.hardware.title}, {deployment.config.engine}", "bold"), "\n")
    console.print(waterfall(deployment), "\n")
    table = plain_table("tokens each", f"{deployment.own_allocator} holds", "contiguous-max holds", left=())
    for row in answer.rows:
        table.add_row(f"{row.context:,}", f"{row.paged:,}", f"{row.contiguous_max:,}")
    console.print(table, "\n")
    limit, rows = deployment.scheduler.max_num_seqs, [*answer.rows, answer.at_context]
    if max(answer.users or 0, *(row.paged for row in rows if row)) > limit:
        console.print(f"Of more requests than max-num-seqs, {limit:,} run at once and the others wait.", markup=False)
    console.print(
        f"A formula with every user at max-model-len {longest:,} claims {answer.formula_users:.1f} users. Real requests are "
        "shorter and do not all run at once: simulate says how many people that is.",
        markup=False,
    )
    console.print()
    console.print("The same model and machine under each engine's rule, with its defaults:", style="bold")
    for other in under_each_rule(deployment):
        holds = "does not start" if other.kv_tokens is None else f"{other.kv_tokens:,} tokens"
        console.print(Text.assemble((f"  {other.engine}: {holds}", "bold"), f"\n    {other.equation}"))
    console.print()
    if answer.longest_context is not None:
        console.print(f"{answer.users:,} requests at once can have {answer.longest_context:,} tokens each.", markup=False)
    if answer.at_context is not None:
        row = answer.at_context
        console.print(f"At {row.context:,} tokens each, {row.paged:,} requests fit at once.", markup=False)


def show_models(models: Mapping[str, ModelSpec], console: Console) -> None:
    """Print models of the catalogue, by name."""
    table = plain_table("model", "params", "active", "KV B/token", "state", "context")
    for name, model in models.items():
        spec = model.kv_spec("auto")
        state = f"{spec.state_bytes_per_sequence / 1e6:,.1f} MB" if spec.state_bytes_per_sequence else ""
        active = f"{model.params_active / 1e9:.1f}B" if model.num_experts else ""
        params = f"{model.params_total / 1e9:.1f}B"
        table.add_row(name, params, active, f"{spec.bytes_per_token:,}", state, f"{model.max_context:,}")
    console.print(table)


def show_hardware(machines: Mapping[str, HardwareSpec], console: Console) -> None:
    """Print machines of the catalogue, by name."""
    table = plain_table("machine", "visible", "memory", "spec GB/s", "reached", "BF16 TFLOPS", left=(0, 2))
    for name, machine in machines.items():
        table.add_row(
            name,
            f"{machine.visible_bytes / GIB:.1f} GiB",
            machine.memory_kind,
            f"{machine.memory_bandwidth.value / 1e9:,.0f}",
            f"{machine.read_bandwidth_bytes_per_s / 1e9:,.0f}",
            f"{machine.effective_flops(None) / 1e12:,.0f}",
        )
    console.print(table)


def show_entries(entries: Sequence[Entry], console: Console) -> None:
    """Print words of the glossary."""
    for entry in entries:
        console.print(Text.assemble((entry.title, "bold"), f" ({entry.name})\n  {entry.formula}\n  {entry.meaning}"))


def show_vllm_command(read: VllmCommand, defaults: Sequence[str], command: str, console: Console) -> None:
    """Print what a vLLM command means here, and what is left out."""
    console.print(f"In pagedkv:  {command}", soft_wrap=True, markup=False)
    if defaults:
        console.print(f"vLLM's own defaults, which the command leaves open: {', '.join(defaults)}", markup=False)
    if read.without_effect:
        console.print(f"Left out, no effect on memory or scheduling: {', '.join(read.without_effect)}", markup=False)
    if read.not_modelled:
        console.print(Text(f"Not modelled, the answer may differ: {', '.join(read.not_modelled)}", "yellow"))
    if note := offload_note(read):
        console.print(Text(note, "yellow"))
    console.print()
