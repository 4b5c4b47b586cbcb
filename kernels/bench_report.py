"""What the kernel benchmark found, compared and as text."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from pagedkv.kernels.bench_problem import LARGE, Shape


def right_and_timed(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows that take part in comparisons."""
    return [row for row in rows if row.get("correct") and "us" in row]


def against_others(rows: Sequence[dict[str, Any]], ours: str) -> list[dict[str, Any]]:
    """Compare, by shape, the backend `ours` with every other: a ratio above 1 is a win; "no figure" if ours has no right one."""
    found = []
    for name in dict.fromkeys(row["name"] for row in rows if row["backend"] == ours):
        timed = {row["backend"]: row["us"] for row in right_and_timed(rows) if row["name"] == name}
        mine = timed.pop(ours, None)
        for backend, us in timed.items():
            ratio = None if mine is None else us / mine
            verdict = "no figure" if ratio is None else "win" if ratio > 1 else "loss"
            found.append({"name": name, "ours": ours, "against": backend, "ratio": ratio, "result": verdict})
    return found


def among_shapes(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compare the large shape's variants with it, by backend: fp8 in tokens per second, the others in shares."""
    found = []
    for row in right_and_timed(rows):
        variants = {"dtype": "tokens_per_s", "ragged": "share_of_copy", "block_size": "share_of_copy"}
        for field, measure in variants.items():
            plain = replace(Shape(**row["shape"]), **{field: getattr(LARGE, field)})
            bases = [base for base in right_and_timed(rows) if base["shape"] == asdict(plain) and base["backend"] == row["backend"]]
            if row["shape"][field] != getattr(LARGE, field) and bases and measure in row and measure in bases[0]:
                ratio = row[measure] / bases[0][measure]
                found.append(
                    {"name": row["name"], "ours": row["backend"], "against": bases[0]["name"], "ratio": ratio, "result": measure}
                )
    return found


def found_wrong(rows: Sequence[dict[str, Any]]) -> bool:
    """Tell whether a backend's result is wrong, or one of this project's failed."""
    return any(not row.get("correct", True) or "failed" in row for row in rows)


def render(result: dict[str, Any]) -> str:
    """Return the result as text: bandwidth, a table by shape, comparisons."""
    copy, read = (result[key] / 1e9 for key in ("copy_bytes_per_s", "read_bytes_per_s"))
    lines = [f"{result['device']}, torch {result['torch']}: copy {copy:.1f} GB/s, read {read:.1f} GB/s"]
    if result["dry_run"]:
        lines[0] += "; dry run, times mean nothing"
    if result["ended_early"] is not None:
        lines.append(f"ENDED EARLY: {result['ended_early']}")
    for name in dict.fromkeys(row["name"] for row in result["rows"]):
        lines += ["", name, *(_line(row) for row in result["rows"] if row["name"] == name)]
    lines += ["", "Comparisons (above 1: ours is faster)"]
    for c in result["comparisons"]:
        verdict = c["result"] if c["ratio"] is None else f"{c['ratio']:.2f} ({c['result']})"
        lines.append(f"  {c['name']}: {c['ours']} against {c['against']}: {verdict}")
    return "\n".join(lines)


def _line(row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"  {row['backend']:26} FAILED: {row['failed']}"
    if "us" not in row:
        return f"  {row['backend']:26} {row.get('reason', '')}"
    share = f"{row['share_of_copy']:6.1%} of copy" if "share_of_copy" in row else ""
    error = "not finite" if row["error"] is None else f"{row['error']:.1e}"
    wrong = "" if row["correct"] else f"  WRONG: error {error}"
    singly = f"  launched one by one, no graph: {row['no_graph']}" if "no_graph" in row else ""
    return f"  {row['backend']:26} {row['us']:10.1f} µs  {share}{wrong}{singly}"
