"""Studies that others published, run again: PagedAttention's figures, prefix reuse on Mooncake's trace, vLLM's watermark."""

from dataclasses import replace
from pathlib import Path

from pagedkv.sims.config import LoadConfig, MeasurementConfig, ServingConfig, SimulationConfig
from pagedkv.sims.prefix_study import study_prefixes
from pagedkv.sims.results import simulate
from pagedkv.sims.scenario import resolve
from pagedkv.sims.validation.checks import Check, Section, Table, reported

SOSP = SimulationConfig(
    load=LoadConfig(request_rate=2.0, lengths="sharegpt", over_length="drop"),
    serving=ServingConfig(hardware="a100-40gb", model="opt-13b", kv_cache_memory_bytes="12GiB", max_model_len=2048),
    measurement=MeasurementConfig(
        allocator=("paged", "contiguous-oracle", "contiguous-pow2", "contiguous-max"), warmup="60s", duration="3540s"
    ),
)
"""PagedAttention's figures 2 and 13a: the settings of docs/validation/sosp23.toml."""
WATERMARK = SimulationConfig(
    load=LoadConfig(
        users=128, think_time="0s", num_prompts=450, random_input_len=1000, random_output_len=5000, random_range_ratio=0.2
    ),
    serving=ServingConfig(
        hardware="gb200",
        model="qwen2.5-7b",
        kv_cache_memory_bytes="16GiB",
        max_model_len=8192,
        max_num_seqs=256,
        enable_prefix_caching=False,
    ),
    measurement=MeasurementConfig(allocator=("paged",), repeats=10),
)
"""vLLM PR 44594: the settings of docs/validation/watermark.toml."""

PAPER = {
    "contiguous-max": ("Orca (Max)", (20.4, 13.3, 57.3, 8.9, 7.00)),
    "contiguous-pow2": ("Orca (Pow2)", (26.8, 17.9, 13.6, 41.6, 9.81)),
    "contiguous-oracle": ("Orca (Oracle)", (38.2, 25.2, 0.0, 36.6, 13.62)),
}
"""Shares of KV memory in %: tokens, reserved, internal, external and others; mean batch. Source: Kwon et al., SOSP 2023."""
POINTS_BAR = 4.0
BATCH_BAR = 0.10
PAGED_BAR = 96.0
_SHARES = ("tokens", "reserved", "internal", "external and others")

MOONCAKE = {None: 0.6396, 30_000: 0.6242, 10_000: 0.4235}
"""Block hit ratio of an ideal LRU by capacity. Source: a plain LRU over the trace, computed independently."""

PREEMPTIONS = {0.0: 1065, 0.02: 400, 0.05: 187, 0.1: 168}
THROUGHPUT = {0.0: 11_582, 0.02: 12_134, 0.05: 12_167, 0.1: 11_835}
"""By watermark: preemptions and output tokens/s. Source: vLLM PR 44594."""
PREEMPTIONS_BAR = 0.25
GAIN_POINTS_BAR = 2.0


def sosp_section(data: Path) -> Section:
    """Return PagedAttention's figures 2 and 13a."""
    lengths = data / "sharegpt_lengths.csv.gz"
    config = replace(SOSP, load=replace(SOSP.load, lengths=str(lengths), lengths_in_order=True))
    results = {name: result.figures for name, result in simulate(resolve(config)).by_allocator.items()}
    checks, rows = [], []
    for name, (title, (*paper, batch)) in PAPER.items():
        kv = results[name]["kv_when_waiting"]
        ours = [100 * kv[kind] for kind in ("tokens", "reserved", "internal")] + [100 * (kv["external"] + kv["free"])]
        running = results[name]["running_mean"]
        rows.append((f"{title}, paper", *(f"{share:.1f}" for share in paper), f"{batch:.2f}"))
        rows.append((f"`{name}`", *(f"{share:.1f}" for share in ours), f"{running:.2f}"))
        if name == "contiguous-max":
            checks.append(_equal("contiguous-max: mean batch", f"{batch:.2f}", f"{running:.2f}"))
            checks.append(_equal("contiguous-max: external and others, %", f"{paper[3]:.1f}", f"{ours[3]:.1f}"))
            continue
        worst = max(range(4), key=lambda i: abs(ours[i] - paper[i]))
        checks.append(_points(f"{name}: {_SHARES[worst]}, the share most off", paper[worst], ours[worst], POINTS_BAR))
        checks.append(
            Check(
                what=f"{name}: mean batch",
                measured=f"{batch:.2f}",
                simulated=f"{running:.2f} ({running / batch - 1:+.1%})",
                bar=f"within {BATCH_BAR:.0%}",
                outcome="holds" if abs(running / batch - 1) <= BATCH_BAR else "fails",
            )
        )
    kv = results["paged"]["kv"]
    filled = 100 * kv["tokens"] / (kv["tokens"] + kv["reserved"] + kv["internal"])
    checks.append(
        Check(
            what="paged: tokens / slots in taken blocks, %",
            measured="96.3",
            simulated=f"{filled:.1f}",
            bar=f"at least {PAGED_BAR:g}",
            outcome="holds" if filled >= PAGED_BAR else "fails",
        )
    )
    checks.append(
        reported(
            "paged: mean batch",
            "30.42",
            f"{results['paged']['running_mean']:.1f}",
            "it depends on how fast a step is: today's kernels finish requests sooner than those of 2023",
        )
    )
    return Section(
        name="sosp23",
        title="PagedAttention, SOSP 2023 (figures 2 and 13a)",
        source="OPT-13B on an A100-40GB, 12 GiB of KV = 15,728 slots, ShareGPT at 2 requests/s for an hour: "
        "docs/validation/sosp23.toml",
        checks=tuple(checks),
        tables=(
            Table(
                title="Shares of KV memory in % while requests wait, and the mean batch",
                header=("system", *_SHARES, "mean batch"),
                rows=tuple(rows),
            ),
        ),
    )


def mooncake_section(data: Path) -> Section:
    """Return the block hit ratios of an ideal LRU on Mooncake's trace, and those of an engine's pool beside them."""
    study = study_prefixes(data / "mooncake_synthetic.jsonl.gz", blocks="inf,30000,10000", caches="ideal-lru,block-pool")
    found = {(row.cache, row.blocks): row.hit_ratio_blocks for row in study.rows}
    checks = []
    for blocks, ratio in MOONCAKE.items():
        size = "without evictions" if blocks is None else f"{blocks:,} blocks"
        checks.append(_equal(f"ideal LRU, {size}: block hit ratio", f"{ratio:.4f}", f"{found['ideal-lru', blocks]:.4f}"))
        checks.append(
            reported(
                f"block pool, {size}: block hit ratio",
                "",
                f"{found['block-pool', blocks]:.4f}",
                "an engine's pool keeps no partial block, and frees a prompt's tail before its head",
            )
        )
    return Section(
        name="mooncake",
        title="Prefix reuse on a real trace (Mooncake, FAST 2025)",
        source=f"{study.requests:,} requests, {study.prompt_blocks:,} blocks of {study.block_tokens}",
        checks=tuple(checks),
    )


def watermark_section() -> Section:
    """Return vLLM's watermark study: preemptions and throughput by watermark."""
    figures = {}
    for watermark in PREEMPTIONS:
        config = replace(WATERMARK, serving=replace(WATERMARK.serving, watermark=watermark))
        figures[watermark] = simulate(resolve(config)).by_allocator["paged"].figures
    repeats = WATERMARK.measurement.repeats
    preemptions = {watermark: each["num_preemptions"] / repeats for watermark, each in figures.items()}
    throughput = {watermark: each["output_tokens_per_s"] for watermark, each in figures.items()}
    checks = []
    for watermark, published in PREEMPTIONS.items():
        off = preemptions[watermark] / published - 1
        checks.append(
            Check(
                what=f"watermark {watermark:g}: preemptions",
                measured=f"{published:,}",
                simulated=f"{preemptions[watermark]:,.0f} ({off:+.0%})",
                bar=f"within {PREEMPTIONS_BAR:.0%}",
                outcome="holds" if abs(off) <= PREEMPTIONS_BAR else "fails",
            )
        )
    best = max(throughput, key=lambda watermark: throughput[watermark])
    checks.append(
        Check(
            what="watermark of the best throughput",
            measured="0.05",
            simulated=f"{best:g}",
            bar="0.02 to 0.05",
            outcome="holds" if best in (0.02, 0.05) else "fails",
        )
    )
    gains = [100 * (rates[0.05] / rates[0.0] - 1) for rates in (THROUGHPUT, throughput)]
    checks.append(_points("throughput at 0.05 against 0, gain in %", gains[0], gains[1], GAIN_POINTS_BAR))
    rows = tuple(
        (
            f"{watermark:g}",
            f"{PREEMPTIONS[watermark]:,}",
            f"{preemptions[watermark]:,.0f}",
            f"{THROUGHPUT[watermark]:,}",
            f"{throughput[watermark]:,.0f}",
            f"{figures[watermark]['itl_s']['p99'] * 1e3:.1f}",
        )
        for watermark in PREEMPTIONS
    )
    return Section(
        name="watermark",
        title="Watermark against preemptions (vLLM PR 44594)",
        source="Qwen2.5-7B on one GB200, 16 GiB of KV, 450 requests of 1,000 + 5,000 tokens, 128 at a time, ten "
        "seeds: docs/validation/watermark.toml",
        checks=tuple(checks),
        notes=(
            "The constants are the catalogue's for a GB200, not fitted to these runs: throughput comes out lower throughout, and "
            "ratios between rows are what compares.",
        ),
        tables=(
            Table(
                title="Published, one run each, and here, the mean of ten seeds",
                header=("watermark", "preemptions: published", "here", "output tokens/s: published", "here", "ITL P99 here, ms"),
                rows=rows,
            ),
        ),
    )


def _equal(what: str, measured: str, simulated: str) -> Check:
    return Check(
        what=what,
        measured=measured,
        simulated=simulated,
        bar="to the printed digits",
        outcome="holds" if measured == simulated else "fails",
    )


def _points(what: str, measured: float, simulated: float, limit: float) -> Check:
    return Check(
        what=what,
        measured=f"{measured:.1f}",
        simulated=f"{simulated:.1f} ({simulated - measured:+.1f} points)",
        bar=f"within {limit:g} points",
        outcome="holds" if abs(simulated - measured) <= limit else "fails",
    )
