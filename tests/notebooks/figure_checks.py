"""What each figure of the notebooks must show: called inside a notebook's kernel, over its variables, after the last cell."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from pagedkv.sims.budget_parts import PARTS
from pagedkv.sims.memory_map import cells_of
from pagedkv.sims.metrics import Latencies
from pagedkv.sims.recording import RUNNING, WAITING
from pagedkv.sims.records import Outcome
from pagedkv.units import GIB

Namespace = Mapping[str, Any]


def check_figures(names: Namespace) -> list[str]:
    """Hold every figure among the variables against the data that made it; return their names.

    Each must fail its check, too, once a number in any of its traces is another.
    """
    figures = sorted(name for name, value in names.items() if isinstance(value, go.Figure) and not name.startswith("_"))
    for name in figures:
        check(name, names[name], names)
        for place, trace in enumerate(names[name].data):
            if name.endswith("_map") and trace.type != "heatmap":
                continue  # tables and hatching: tests/test_memory_map.py
            try:
                check(name, spoilt(names[name], place), names)
            except AssertionError:
                continue
            raise AssertionError(f"{name}: nobody notices when trace {place} shows another number")
    return figures


def check(name: str, figure: go.Figure, names: Namespace) -> None:
    """Hold one figure against its data."""
    if name.endswith("_map"):
        check_map(figure, names[name.removesuffix("_map") + "_panels"])
        return
    assert name in CHECKS, f"nobody knows what {name} must show"
    CHECKS[name](figure, names)


def spoilt(figure: go.Figure, place: int) -> go.Figure:
    """Return the figure with another number in the trace at `place`, in a map in that trace of the last frame."""
    other = go.Figure(figure)
    trace = other.frames[-1].data[place] if other.frames else other.data[place]
    attribute = "customdata" if other.frames else "z" if trace.type == "heatmap" else "x" if trace.orientation == "h" else "y"
    values = np.array(getattr(trace, attribute), float)
    where = np.flatnonzero(np.isfinite(values))[0 if other.frames else -1]
    values.flat[where] = 0.9 * values.flat[where] - 0.05
    setattr(trace, attribute, values)
    return other


def check_map(figure: go.Figure, panels: Mapping[str, Sequence[Any]]) -> None:
    """The cells of every frame are the snapshot's, panel by panel, and its slider names the moments."""
    moments = next(iter(panels.values()))
    assert [step.label for step in figure.layout.sliders[0].steps] == [frame.label for frame in moments]
    assert [note.text.partition("<br>")[0] for note in figure.layout.annotations] == list(panels)
    assert len(figure.frames) == len(moments)
    for number, drawn in enumerate(figure.frames):
        heatmaps = [trace for trace in drawn.data if trace.type == "heatmap"]
        for heatmap, frames in zip(heatmaps, panels.values(), strict=True):
            shown = np.asarray(heatmap.customdata).reshape(-1, 6)
            shown = shown[shown[:, 0] >= 0]
            snapshot = frames[number].snapshot
            assert np.array_equal(shown, cells_of(snapshot, len(shown)))
            assert len(shown) == snapshot.states.size or len(shown) > 200  # thinned out, but not to nothing


def same(trace: Any, x: Sequence[Any], y: Sequence[Any]) -> None:
    """The trace has these points."""
    for shown, meant in ((trace.x, x), (trace.y, y)):
        assert len(shown) == len(meant) > 0
        if isinstance(meant[0], str):
            assert list(shown) == list(meant)
        else:
            assert np.allclose(np.asarray(shown, float), np.asarray(meant, float), rtol=1e-4, atol=0.0)


def shares(figure: go.Figure, names: Namespace) -> None:
    """01: by kind and allocator; and what is shown is the whole memory."""
    results, allocators = names["results"].by_allocator, list(names["ALLOCATOR_NAMES"])
    for trace in figure.data:
        same(trace, [100 * results[name].figures["kv"][trace.name] for name in allocators], allocators)
    assert np.allclose(np.sum([trace.x for trace in figure.data], axis=0), 100)
    means = [results[name].figures["kv"]["tokens"] for name in allocators]
    assert means == sorted(means), "the text says in which order"


def unfilled(figure: go.Figure, names: Namespace) -> None:
    """02: counted anew from the lengths."""
    sizes = names["sizes"]
    counted = [sum(-length % size for length in names["lengths"]) / len(names["lengths"]) for size in sizes]
    same(figure.data[0], sizes, counted)
    same(figure.data[1], sizes, [(size - 1) / 2 for size in sizes])


def answers(figure: go.Figure, names: Namespace) -> None:
    """03: 30 words of prompt and 6 of answer in blocks of 4, of which the first 7 can be shared."""
    counts = names["COUNTS"]
    same(figure.data[0], counts, [9 * count for count in counts])
    same(figure.data[1], counts, [7 + 2 * count for count in counts])


def cliff(figure: go.Figure, names: Namespace) -> None:
    """04: three curves over the rates; and there is a cliff."""
    rows = [names["runs"][rate].by_allocator["paged"].figures for rate in names["RATES"]]
    waits_s = [row["ttft_s"]["p50"] for row in rows]
    for trace, values in zip(
        figure.data, ([row["output_tokens_per_s"] for row in rows], [row["num_preemptions"] for row in rows], waits_s), strict=True
    ):
        same(trace, names["RATES"], values)
    assert rows[0]["num_preemptions"] == 0 < rows[-1]["num_preemptions"]
    assert waits_s[-1] > 100 * waits_s[0]


def edge(figure: go.Figure, names: Namespace) -> None:
    """04: who ran and who waited in one run, and its preemptions."""
    timeline = names["runs"][names["EDGE"]].by_allocator["paged"].runs[0].recorder.timeline
    starts_s, seconds, means = timeline.means()
    by_axis = {trace.yaxis: trace for trace in figure.data if trace.mode == "lines"}
    for axis, gauge in (("y", RUNNING), ("y2", WAITING)):
        same(by_axis[axis], starts_s + seconds / 2, means[:, gauge])
    (marks,) = [trace for trace in figure.data if trace.mode == "markers"]
    assert np.sum(marks.customdata) == timeline.preemptions.sum() > 0
    at_s, _ = timeline.preemptions_over_time()
    same(marks, at_s, np.interp(at_s, starts_s + seconds / 2, means[:, RUNNING]))


def weights(figure: go.Figure, names: Namespace) -> None:
    """05: a weight where the table says, nothing elsewhere; they sum to 1."""
    shown = np.asarray(figure.data[0].z, float)
    assert np.array_equal(np.isfinite(shown.T).sum(), names["ann"].num_tokens)
    assert np.allclose(shown[names["offsets"], names["blocks"]], names["dense_weights"])
    assert np.isclose(np.nansum(shown), 1)


def running(figure: go.Figure, names: Namespace) -> None:
    """05: the output after each block ends where the dense one is."""
    for i, trace in enumerate(figure.data):
        same(trace, [1, 2, 3], [guess[i] for guess in names["guesses"]])
    assert np.allclose([trace.y[-1] for trace in figure.data], names["dense"])
    assert np.allclose(names["kernel_out"][:, 0], [names["dense"], names["dense_bob"]])


def waterfall(figure: go.Figure, names: Namespace) -> None:
    """06: the parts of the budget, end to end."""
    budget = names["results"].scenario.deployment.budget
    (bars,) = figure.data
    sizes = [getattr(budget, part) / GIB for part in PARTS]
    assert np.allclose(bars.x, [*sizes, budget.visible / GIB])
    assert np.allclose(bars.base, [*np.cumsum([0, *sizes])[:-1], 0])
    assert np.isclose(sum(sizes), budget.visible / GIB)


def kv(figure: go.Figure, names: Namespace) -> None:
    """06: kinds of memory over time: the mean over the measured window is the reported share, and all together are everything."""
    for axis, result in zip(("y", "y2"), names["results"].by_allocator.values(), strict=True):
        traces = {trace.name: trace for trace in figure.data if trace.yaxis == axis}
        assert np.allclose(np.sum([trace.y for trace in traces.values()], axis=0), 100, atol=0.01)
        measured = np.asarray(traces["tokens"].x) > names["results"].scenario.warmup_s
        mean = np.asarray(traces["tokens"].y)[measured].mean()
        assert np.isclose(mean, 100 * result.figures["kv"]["tokens"], rtol=0.02)


def by_users(figure: go.Figure, names: Namespace) -> None:
    """06: what all get, what each gets."""
    users, rows = names["USERS"], names["by_users"]
    same(figure.data[0], users, [rows[number]["output_tokens_per_s"] for number in users])
    same(figure.data[1], users, [1000 * rows[number]["tpot_s"]["p50"] for number in users])


def tpot(figure: go.Figure, names: Namespace) -> None:
    """06: the curves are the quantiles of the requests' paces."""
    assert [trace.name for trace in figure.data] == list(names["results"].by_allocator)
    for trace, result in zip(figure.data, names["results"].by_allocator.values(), strict=True):
        run = result.runs[0]
        log = run.measured.where((run.measured.outcome == Outcome.FINISHED) | (run.measured.outcome == Outcome.UNFINISHED))
        paces_s = Latencies.of(log, run.end_s).tpot_s
        paces_s = paces_s[np.isfinite(paces_s) & (paces_s > 0)]
        shares = np.linspace(0, 1, len(trace.y))  # not the rounded ones: between two paces far apart a quantile is steep
        same(trace, np.quantile(paces_s, shares), 100 * shares)


def engines(figure: go.Figure, names: Namespace) -> None:
    """07: a bar per engine and allocator."""
    rows = names["rows"]
    results = [result for each in names["comparison"].results.values() for result in each.by_allocator.values()]
    assert len(rows) == len(results)
    columns = (
        [result.figures["running_mean"] for result in results],
        [result.figures["output_tokens_per_s"] for result in results],
        [result.figures["ttft_s"]["p50"] for result in results],
    )
    for trace, values in zip(figure.data, columns, strict=True):
        same(trace, values, list(rows))


def pauses(figure: go.Figure, names: Namespace) -> None:
    """07: pauses by percentile."""
    results = names["comparison"].results
    for trace, percentile in zip(figure.data, ("p50", "p90", "p99"), strict=True):
        own = [next(iter(results[engine].by_allocator.values())).figures["itl_s"][percentile] for engine in names["PAUSES"]]
        same(trace, list(names["PAUSES"]), [1000 * value for value in own])


def served(figure: go.Figure, names: Namespace) -> None:
    """08: users by engine; the saying's order."""
    same(figure.data[0], list(names["served"].values()), list(names["served"]))
    assert names["served"]["naive"] <= 2 < 100 <= names["served"]["vllm, paged"]


def prefixes(figure: go.Figure, names: Namespace) -> None:
    """08: by how much sooner, first token and whole answer."""
    for trace, key in zip(figure.data, ("ttft_s", "e2e_s"), strict=True):
        same(trace, names["labels"], [gain[key] for gain in names["gains"]])
    assert len(names["gains"]) == len(names["CHATS"])


def speculation(figure: go.Figure, names: Namespace) -> None:
    """08: a curve per batch; the break-even is where the text says."""
    for trace, values in zip(figure.data, names["speedups"].values(), strict=True):
        same(trace, names["ACCEPTANCES"], values)
    for values, break_even in zip(names["speedups"].values(), (0.4, 0.5), strict=True):
        assert abs(np.interp(1, values, names["ACCEPTANCES"]) - break_even) < 0.05
    assert names["speedups"][1][-2] > 2 > names["speedups"][64][-1]


def batches(figure: go.Figure, names: Namespace) -> None:
    """08: each slower, all together faster."""
    same(figure.data[0], names["BATCHES"], [1 / row["tpot_s"]["p50"] for row in names["batches"]])
    same(figure.data[1], names["BATCHES"], [row["output_tokens_per_s"] for row in names["batches"]])
    assert list(figure.data[0].y) == sorted(figure.data[0].y, reverse=True)
    assert list(figure.data[1].y) == sorted(figure.data[1].y)


def block_sizes(figure: go.Figure, names: Namespace) -> None:
    """08: parts of the slots held, which are all of them."""
    for trace, kind in zip(figure.data, ("tokens", "reserved", "internal"), strict=True):
        same(trace, [str(size) for size in names["SIZES"]], [names["held"][size][kind] for size in names["SIZES"]])
    assert np.allclose(np.sum([trace.y for trace in figure.data], axis=0), 100)


CHECKS: dict[str, Callable[[go.Figure, Namespace], None]] = {
    "share_figure": shares,
    "unfilled_figure": unfilled,
    "answers_figure": answers,
    "cliff_figure": cliff,
    "edge_figure": edge,
    "weights_figure": weights,
    "running_figure": running,
    "waterfall_figure": waterfall,
    "kv_figure": kv,
    "users_figure": by_users,
    "tpot_figure": tpot,
    "engines_figure": engines,
    "pause_figure": pauses,
    "served_figure": served,
    "prefix_figure": prefixes,
    "speculation_figure": speculation,
    "batch_figure": batches,
    "block_figure": block_sizes,
}
