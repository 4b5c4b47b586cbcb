"""The section of published rows: its bars and tables."""

import math
from collections.abc import Iterator, Sequence

from pagedkv.sims.validation.benchmark_rows import BenchmarkRow
from pagedkv.sims.validation.checks import Check, Section, Table, at_most, reported
from pagedkv.sims.validation.plots import scatter_picture
from pagedkv.sims.validation.points import KINDS, Kind
from pagedkv.sims.validation.published import (
    COVERAGE_BAR,
    EXCLUDED_BAR,
    LEFT_OUT_FACTOR,
    MEAN_BARS,
    ROW_BAR,
    EngineStatus,
    Published,
    Residual,
    mean_error,
)

NAME = "published_rows"


def section(published: Published) -> Section:
    """Return bars per engine, tables by engine and model, and every row."""
    checks = [check for status in published.engines for check in _engine_checks(published, status)]
    checks += [check for status in published.engines for check in _further_checks(published, status)]
    checks.append(at_most("rows left out, with reasons", published.excluded_share, EXCLUDED_BAR))
    if published.coverage is not None:
        checks.append(
            Check(
                what="left-out figures within their interval",
                measured="",
                simulated=f"{published.coverage:.1%}",
                bar=f"at least {COVERAGE_BAR:.0%}",
                outcome="holds" if published.coverage >= COVERAGE_BAR else "fails",
            )
        )
    return Section(
        name=NAME,
        title="Published rows of the DGX Spark",
        source=f"{published.path.name}: {len(published.rows)} rows, {len(published.residuals)} figures compared",
        checks=tuple(checks),
        tables=tuple(_tables(published)),
        pictures={"published-rows.svg": _picture(published)},
        details={
            "engines": [
                {
                    "engine": s.engine,
                    "rows": s.num_rows,
                    "models": s.num_models,
                    "constants": s.num_constants,
                    "doubts": s.doubts or None,
                }
                for s in published.engines
            ],
            "coverage": published.coverage,
            "excluded_share": published.excluded_share,
            "residuals": [residual.document() for residual in published.residuals],
            "further": [residual.document() for residual in published.further],
            "not_compared": [
                {
                    "line": each.row.line,
                    "model": each.row.model,
                    "engine": each.row.engine,
                    "kind": each.kind,
                    "reason": each.reason,
                }
                for each in published.not_compared
            ],
        },
    )


def _engine_checks(published: Published, status: EngineStatus) -> Iterator[Check]:
    for kind in KINDS:
        own = published.of(status.engine, kind)
        if not own:
            continue
        what = f"{status.engine}, {kind}: mean error of {len(own)} figure{'s' if len(own) > 1 else ''}"
        error = mean_error(own)
        if status.doubts:
            yield reported(what, "", f"{error:.1%}", status.doubts)
            continue
        least = published.least.get((status.engine, kind))
        why = "" if least is None else f"no values of its constants leave less than {least:.1%}"
        yield at_most(what, error, MEAN_BARS[kind], why=why)
        yield _largest(status.engine, kind, own)
        left_out = mean_error(own, left_out=True)
        if not math.isnan(left_out):
            what = f"{status.engine}, {kind}: mean error of models left out"
            yield at_most(what, left_out, LEFT_OUT_FACTOR * MEAN_BARS[kind])


def _further_checks(published: Published, status: EngineStatus) -> Iterator[Check]:
    """Yield what further rows came to, and what left-out models do with them."""
    for kind in KINDS:
        further = published.further_of(status.engine, kind)
        if further:
            what = f"{status.engine}, {kind}: mean error of {len(further)} further figures, and of models left out"
            error, left_out = mean_error(further), mean_error(further, left_out=True)
            yield reported(what, "", f"{error:.1%}, {left_out:.1%}", f"rows of {further[0].point.row.file}: evidence, not scored")


def _largest(engine: str, kind: Kind, own: Sequence[Residual]) -> Check:
    unexplained = [residual for residual in own if not residual.reason]
    what = f"{engine}, {kind}: largest error without a stated reason"
    if not unexplained:
        return reported(what, "", "", f"all {len(own)} figures have a stated reason, so that there is nothing to hold")
    worst = max(abs(residual.error) for residual in unexplained)
    explained = sum(abs(residual.error) > ROW_BAR for residual in own if residual.reason)
    why = f"{explained} more with a stated reason" if explained else ""
    return at_most(what, worst, ROW_BAR, why=why)


def _tables(published: Published) -> Iterator[Table]:
    yield Table(
        title="By engine and model: figures, mean and largest error, mean error of the model left out",
        header=("engine", "weights", "model", "kind", "figures", "mean", "largest", "left out"),
        rows=tuple(_by_model(published)),
    )
    yield Table(
        title="Figures not compared",
        header=("reason", "figures", "lines of the file"),
        rows=tuple(_by_reason(published)),
    )
    yield Table(
        title="Every figure: tokens/s",
        header=("line", "engine", "model", "figure", "batch", "prompt", "depth", "measured", "simulated", "error", "left out", ""),
        rows=tuple(_by_row(published)),
        detail=True,
    )


def _picture(published: Published) -> str:
    points = {
        engine: [
            (residual.point.measured_tok_s, residual.simulated_tok_s, residual.point.kind == "decode")
            for residual in published.residuals
            if residual.point.engine == engine
        ]
        for engine in sorted({residual.point.engine for residual in published.residuals})
    }
    return scatter_picture(
        "Published and simulated tokens per second",
        points,
        axes=("published, tokens/s", "simulated, tokens/s"),
        marks=("decode", "prefill"),
    )


def _by_model(published: Published) -> Iterator[tuple[str, ...]]:
    by_key: dict[tuple[str, str, str, str], list[Residual]] = {}
    for residual in (*published.residuals, *published.further):
        by_key.setdefault(_key(published, residual), []).append(residual)
    for key, own in sorted(by_key.items()):
        largest = max(own, key=lambda residual: abs(residual.error)).error
        left_out = mean_error(own, left_out=True)
        engine, fmt, model, kind = key
        yield (
            engine,
            fmt,
            model,
            kind,
            str(len(own)),
            f"{mean_error(own):.1%}",
            f"{largest:+.1%}",
            "–" if math.isnan(left_out) else f"{left_out:.1%}",
        )


def _by_reason(published: Published) -> Iterator[tuple[str, ...]]:
    for reason in dict.fromkeys(each.reason for each in published.not_compared):
        lines = [_line(published, each.row) for each in published.not_compared if each.reason == reason]
        yield reason, str(len(lines)), ", ".join(dict.fromkeys(lines))


def _line(published: Published, row: BenchmarkRow) -> str:
    """Return the line of a row, with an f before it if it is one of the further rows."""
    return f"{'f' if row.file != published.path.name else ''}{row.line}"


def _key(published: Published, residual: Residual) -> tuple[str, str, str, str]:
    point = residual.point
    engine = point.engine + (f" ({point.version})" if point.version else "")
    engine += " (further)" if point.row.file != published.path.name else ""
    return engine, point.subject.weight_format.name, point.subject.model.title, point.kind


def _by_row(published: Published) -> Iterator[tuple[str, ...]]:
    for residual in (*published.residuals, *published.further):
        row, left_out = residual.point.row, residual.left_out_error
        yield (
            _line(published, row),
            residual.point.engine,
            residual.point.subject.model.title,
            residual.point.kind,
            str(row.batch),
            "–" if row.prompt_tokens is None else f"{row.prompt_tokens:,}",
            "–" if row.context_depth is None else f"{row.context_depth:,}",
            f"{residual.point.measured_tok_s:,.5g}",
            f"{residual.simulated_tok_s:,.5g}",
            f"{residual.error:+.1%}",
            "–" if left_out is None else f"{left_out:+.1%}",
            residual.reason,
        )
