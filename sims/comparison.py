"""The comparison table: the same rows in the terminal and in the report."""

from dataclasses import dataclass
from typing import Any

from pagedkv.sims.recording import KV_KINDS

AT_LEAST = "≥ "
"""Stands before a figure that may be higher."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line: a label and a value per allocator, or a heading without values."""

    label: str
    values: tuple[str, ...] = ()
    depth: int = 0
    """1 for a line under a heading."""


def comparison(document: dict[str, Any]) -> list[Row]:
    """Return the rows for a result document, one value per entry of `results`."""
    columns = document["results"]

    def row(label: str, *values: str, depth: int = 0) -> Row:
        return Row(label=label, values=values, depth=depth)

    rows = [
        *([row("status", *(c["verdict"]["status"] for c in columns))] if columns[0]["verdict"] is not None else []),
        row("running, mean (max)", *(f"{_number(c['running_mean'])} ({c['running_max']})" for c in columns)),
        row("waiting, mean", *(_number(c["waiting_mean"]) for c in columns)),
        row("output tokens/s", *(_interval(c, "output_tokens_per_s", ".0f") for c in columns)),
        row("requests/s", *(_interval(c, "request_throughput_per_s", ".2f") for c in columns)),
    ]
    if any(c.get("num_replicas", 1) > 1 for c in columns):
        rows.insert(1, row("replicas", *(f"{c['num_replicas']:,}" for c in columns)))
    if document["config"]["goodput"]:
        if all(c["verdict"] is not None for c in columns):
            rows.append(row("meet the goals", *(_percent(c["verdict"].get("attained")) for c in columns)))
        rows += [
            row("goodput, requests/s", *(_number(c["goodput_per_s"], ".2f") for c in columns)),
            row("goodput, of all requests", *(_percent(c["goodput_share"]) for c in columns)),
        ]
    rows.append(row("requests", *(f"{c['num_injected']:,}" for c in columns)))
    for outcome in ("finished", "unfinished", "rejected", "failed"):
        rows.append(row(outcome, *(f"{c[f'num_{outcome}']:,}" for c in columns), depth=1))
    rows.append(row("error rate", *(_percent(c["error_rate"]) for c in columns)))
    rows.append(row("preemptions", *(f"{c['num_preemptions']:,}" for c in columns)))
    for key, title in (
        ("prefix_hit_rate", "prefix hit rate"),
        ("resumed_hit_rate", "found on resumption"),
        ("draft_acceptance_rate", "drafts accepted"),
    ):
        if any(c[key] is not None for c in columns):
            rows.append(row(title, *(_percent(c[key]) for c in columns)))
    for key, title in (("num_loaded_tokens", "tokens from the second tier"), ("num_offloaded_tokens", "tokens to the second tier")):
        if any(c[key] is not None for c in columns):
            rows.append(row(title, *(_number(c[key], ".0f") for c in columns)))
    for key, title in (
        ("busy_share", "time with a step running"),
        ("memory_bandwidth_share", "memory bandwidth used"),
        ("compute_share", "compute used"),
    ):
        rows.append(row(title, *(_percent(c[key]) for c in columns)))
    for key, title in (("kv", "share of KV memory"), ("kv_when_waiting", "while requests wait")):
        if any(c[key] for c in columns):
            rows.append(row(title))
            for kind in KV_KINDS:
                if kind not in ("cached", "state") or any(c[key] and c[key][kind] for c in columns):
                    rows.append(row(kind, *(_percent(c[key] and c[key][kind]) for c in columns), depth=1))
    for key, title, scale, unit in (
        ("ttft_s", "TTFT", 1e3, "ms"),
        ("tpot_s", "TPOT", 1e3, "ms"),
        ("itl_s", "ITL", 1e3, "ms"),
        ("e2e_s", "E2E", 1.0, "s"),
    ):
        for p in ("p50", "p90", "p99"):
            rows.append(row(f"{title} {p.upper()}, {unit}", *(_latency(c, f"{key}.{p}", scale) for c in columns)))
    return rows


def advantages(document: dict[str, Any]) -> list[str]:
    """Say what blocks gain against each other allocator, on the same requests."""
    by_name = {column["allocator"]: column for column in document["results"]}
    own = next((name for name in ("hybrid", "paged") if name in by_name), None)
    if own is None:
        return []
    paged = by_name.pop(own)
    return [
        f"{own} against {name}: {paged['output_tokens_per_s'] / other['output_tokens_per_s']:.2f} × the output tokens/s, "
        f"{paged['running_mean'] / other['running_mean']:.2f} × the requests at once."
        for name, other in by_name.items()
        if other["output_tokens_per_s"] and other["running_mean"]
    ]


def prefix_note(document: dict[str, Any], why_off: str | None) -> str | None:
    """Say why nothing is cached, or who does without what paged memory finds in its cache; None if there is nothing to say."""
    if why_off is not None:
        return why_off
    columns = document["results"]
    without = [c["allocator"] for c in columns if c["prefix_hit_rate"] is None and c["resumed_hit_rate"] is None]
    if not without or not any(c["prefix_hit_rate"] or c["resumed_hit_rate"] for c in columns):
        return None
    compute = "computes" if len(without) == 1 else "compute"
    return f"Only memory in blocks caches prefixes here: {', '.join(without)} {compute} every prompt whole."


def _number(value: float | None, spec: str = ".1f") -> str:
    return "–" if value is None else format(value, f",{spec}")


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def _interval(column: dict[str, Any], key: str, spec: str) -> str:
    interval = (column["ci95"] or {}).get(key)
    return _number(column[key], spec) + ("" if interval is None else f" ± {_number((interval[1] - interval[0]) / 2, spec)}")


def _latency(column: dict[str, Any], name: str, scale: float) -> str:
    latency, _, part = name.partition(".")
    if column[latency] is None:
        return "–"
    at_least = AT_LEAST if name in column["lower_bounds"] else ""
    return at_least + _number(scale * column[latency][part], ".0f" if scale > 1 else ".1f")
