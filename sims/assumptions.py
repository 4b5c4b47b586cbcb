"""Every number that an answer rests on, with its source: the table behind docs/assumptions.md.

`python -m pagedkv.sims.assumptions` prints the generated part of that page.
"""

from collections.abc import Iterator
from typing import TypeAlias

from pagedkv.activation_peak import DENSE_PEAK_WIDTH, EXPERT_PEAK_WIDTH, SAMPLER_BYTES_PER_LOGIT
from pagedkv.catalogue import hardware_names, load_hardware, load_model, model_names
from pagedkv.hardware_spec import HardwareSpec
from pagedkv.readable_formats import OLLAMA_FORMAT, as_gguf
from pagedkv.sims.calibration import fitted_groups
from pagedkv.sims.config import ATTAIN
from pagedkv.sims.deployment import PAGE_BYTES
from pagedkv.sims.load_flags import DEFAULT_THINK_TIME_S
from pagedkv.sims.routing.prefix_affine import BALANCE_ABS_THRESHOLD, BALANCE_REL_THRESHOLD
from pagedkv.sims.saturation import THROUGHPUT_SHARE_LIMIT, WAITING_SHARE_LIMIT
from pagedkv.sims.step_constants import EAGER_S_PER_LAYER
from pagedkv.sims.step_groups import OF_WEIGHTS
from pagedkv.start_up import COMPILE_PEAK_BYTES, KERNEL_BUILD_BYTES, KERNEL_BUILD_MOST_BYTES, READAHEAD_BYTES
from pagedkv.units import GIB, KIB
from pagedkv.weight_format import WEIGHT_FORMATS

Row: TypeAlias = tuple[str, str, str, str]
"""What, value with unit, tag, source."""

_IN_GGUF = ("fp8", "mxfp4", "mxfp4+fp8", "int4+bf16")
"""Formats that models have and no GGUF has."""
_UNITS = (("bytes/s)", 1e9, "GB/s"), ("(bytes)", 2**30, "GiB"), ("flop/s)", 1e12, "TFLOPS"), ("(s)", 1e-3, "ms"))


def machine_rows(hardware: HardwareSpec) -> Iterator[Row]:
    """Yield the rows of every figure of a machine."""
    for label, figure in hardware.figures():
        what, _, _ = label.partition(" (")
        scale, unit = next(((s, u) for mark, s, u in _UNITS if mark in label), (1.0, ""))
        yield what, f"{figure.value / scale:,.4g} {unit}".strip(), figure.tag, figure.source


def code_rows() -> tuple[Row, ...]:
    """Return the rows of the constants that the code itself holds."""
    return (
        (
            "activations: sampler",
            f"{SAMPLER_BYTES_PER_LOGIT} bytes per logit × max-num-seqs × vocabulary",
            "estimated",
            "fitted to a vLLM 0.19 run on an RTX 4090",
        ),
        (
            "activations: widest layer, dense",
            f"{DENSE_PEAK_WIDTH} hidden states of 16 bits per token",
            "estimated",
            "Llama-3.1-8B's layer: 3 + 3 × 14,336 / 4,096",
        ),
        (
            "activations: widest layer, experts",
            f"{EXPERT_PEAK_WIDTH} hidden states of 16 bits per token",
            "estimated",
            "DeepSeek-V4-Flash on a Spark: 5.30 − 1.39 GiB for 6,176 tokens",
        ),
        (
            "torch.compile and Triton with cold caches",
            f"{COMPILE_PEAK_BYTES / GIB:g} GiB of a unified memory",
            "measured",
            "31.6 GiB were missing in a KV cache (eugr/spark-vllm-docker PR 286)",
        ),
        (
            "building kernels for experts and 4-bit arithmetic",
            f"{KERNEL_BUILD_BYTES / GIB:g} GiB for each core, {KERNEL_BUILD_MOST_BYTES / GIB:g} for each of MAX_JOBS",
            "estimated",
            "3 to 8 GiB seen (flashinfer issue 3634); 3 makes about the 112 GiB in use of vLLM issue 46307",
        ),
        (
            "reading a mapped file",
            f"pieces of {READAHEAD_BYTES // KIB} KiB, each waits for the disk",
            "spec",
            "Linux's read_ahead_kb; with it a Spark reads 0.57 GB/s, and gpt-oss-120b took 110 s (llama.cpp PR 18012)",
        ),
        (
            "work of the processor on unified memory",
            "--cpu-bandwidth / weights read: the share by which all rates of memory fall",
            "estimated",
            "one memory controller serves both",
        ),
        (
            "launches without CUDA graphs",
            f"{EAGER_S_PER_LAYER * 1e6:g} µs per layer and step",
            "estimated",
            "about 10 launches of 4 µs per layer",
        ),
        (
            "experts touched by a step over n tokens",
            "1 − (1 − k/E)^(n^r) of them, with the routing_exponent r below",
            "measured",
            "1 would be uniform routing; rows of mixtures on two engines say 0.7 to 0.8",
        ),
        (
            "routing_exponent and expert_rate where no row of the engine tells them",
            "as of the same engine on that machine, else of the engine with rows of most models",
            "estimated",
            "routing is of models and texts; gathered experts are multiplied slower on every engine that was measured",
        ),
        (
            "a step's time",
            "(weights^p + linear^p)^(1/p) + (KV^p + attention^p)^(1/p) + states + overheads; without a fit the longer of each pair",
            "estimated",
            "roofline, the halves in sequence",
        ),
        (
            "products with measured rates by rows",
            "what so many rows took, linear in between, and reading the weights at least; dense models, and without a fit",
            "estimated",
            "docs/hardware.md: libraries change kernels with the number of rows",
        ),
        (
            "pages of `vattention`",
            f"{PAGE_BYTES >> 20} MiB of the keys of the widest layer",
            "spec",
            "stock CUDA virtual memory; Prabhu et al., vAttention, ASPLOS 2025",
        ),
        (
            "moving and copying tokens within the memory, mapping pages",
            "no simulated time, whatever the allocator",
            "estimated",
            "not priced, in favour of the allocators that need them",
        ),
        (
            "copies to and from a second tier",
            "beside the step, which waits for what takes longer; a disk is written at the rate at which it is read",
            "estimated",
            "connectors copy layer by layer; published figures of a Spark's disk are of reading",
        ),
        (
            "vLLM's defaults by device",
            "2,048 tokens and 256 sequences; 8,192 and 1,024 from 70 GiB on, but for A100 and GB10",
            "spec",
            "vLLM 0.33 EngineArgs",
        ),
        (
            "weights of `ollama` without --quantization",
            f"{OLLAMA_FORMAT}, whatever the model's own; of gpt-oss its own, all beside the experts 16 bits wide",
            "estimated",
            "its library's default (ollama/ollama issues 1543 and 8989); older names may be q4_0, the smallest models q8_0",
        ),
        (
            "weights of `llama-cpp` without --quantization",
            "the model's own as a GGUF has it: "
            + ", ".join(f"{as_gguf(WEIGHT_FORMATS[name]).name} for {name}" for name in _IN_GGUF),
            "spec",
            "llama.cpp's convert_hf_to_gguf.py (--fp8-as-q8; without it bf16) and PR 17083; ggml-org's GGUFs of gpt-oss",
        ),
        (
            "router and network",
            "no time, and loads as they are at that moment",
            "estimated",
            "milliseconds next to answers of seconds",
        ),
        (
            "prefix-affine routing leaves a home",
            f"with over {BALANCE_ABS_THRESHOLD} requests and over {BALANCE_REL_THRESHOLD:g} times as many as the idlest replica",
            "spec",
            "defaults of the vLLM router 0.1.15 and the SGLang gateway 0.3.1",
        ),
        ("think time", f"{DEFAULT_THINK_TIME_S:g} s, exponential", "estimated", "a person reads and types"),
        (
            "lengths azure-conv",
            "quantiles, and a 20 × 20 table of ranks",
            "measured",
            "19,366 requests of Azure's conversation trace, 2023 (Azure Public Dataset, CC-BY-4.0)",
        ),
        (
            "lengths sharegpt",
            "quantiles, and a 20 × 20 table of ranks",
            "measured",
            "58,787 first turns of ShareGPT (NanoFlow repository, Apache-2.0)",
        ),
        (
            "saturated",
            f"waiting over {WAITING_SHARE_LIMIT:.0%} of the time, or under {THROUGHPUT_SHARE_LIMIT:.0%} of the unloaded throughput",
            "estimated",
            "a definition: docs/metrics.md",
        ),
        ("goals attained", f"{ATTAIN:.0%} of requests", "estimated", "a definition: docs/metrics.md"),
    )


_NEAR_THE_OTHERS = "no row with these weights tells it: the machine's figure, or near the engine's other weight types"


def fitted_rows() -> Iterator[Row]:
    """Yield the constants of fitted groups, by machine, engine and weight type: measured if rows tell them, else their origin."""
    for group in fitted_groups():
        source = f"{group['source']}, fitted {group['date']}"
        where = f"{group['engine']} on {group['machine']}"
        for name, value in group["constants"].items():
            assumed = group["assumed"].get(name)
            tag, why = ("measured", source) if assumed is None else ("estimated", assumed)
            yield f"{where}: {name}", f"{value:,.4g}", tag, why
        for fmt, its in group["weights"].items():
            models = f"{its['num_figures']} figures of {its['num_models']} model{'s' if its['num_models'] > 1 else ''}"
            for name in OF_WEIGHTS:
                tells = name in its["fitted"]
                tag, why = ("measured", f"{models}: {source}") if tells else ("estimated", _NEAR_THE_OTHERS)
                yield f"{where}, {fmt}: {name}", f"{its[name]:,.4g}", tag, why


def markdown() -> str:
    """Return the generated part of docs/assumptions.md."""
    lines = ["## In the code", "", "| what | value | tag | source |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in code_rows()]
    lines += ["", "## Fitted step times", "", "How, and how well: [validation.md](validation.md). In SI units.", ""]
    lines += ["| what | value | tag | source |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in fitted_rows()]
    lines += ["", "## In the catalogues", ""]
    for name in hardware_names():
        lines += [f"### {load_hardware(name).title} (`{name}`)", "", "| what | value | tag | source |", "|---|---|---|---|"]
        lines += [f"| {' | '.join(row)} |" for row in machine_rows(load_hardware(name))]
        lines.append("")
    lines += ["### Weight formats", "", "| format | bits per weight | the rest | source |", "|---|---|---|---|"]
    lines += [f"| {f.name} | {f.bits_per_weight:g} | {f.wide_bits} bits | {f.source} |" for f in WEIGHT_FORMATS.values()]
    lines += ["", "### Models", "", "| model | parameters | KV bytes per token, 16 bits | source |", "|---|---|---|---|"]
    for name in model_names():
        model = load_model(name)
        kv = model.kv_spec("auto").bytes_per_token
        lines.append(f"| {name} | {model.params_total:,} | {kv:,} | {model.source} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")  # noqa: T201
