"""The section of published rows: its bars and tables."""

import math
from collections.abc import Iterator, Sequence

from pagedkv.sims.validation.checks import Check, Section, Table, at_most, reported
from pagedkv.sims.validation.plots import rows_picture
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
_ONLY_HYBRID_BATCHES = "llama-cpp"


def section(published: Published) -> Section:
    """Return bars per engine, tables by engine and model, and every row."""
    checks = [check for status in published.engines for check in _engine_checks(published, status)]
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
        pictures={"published-rows.svg": rows_picture(published)},
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
        yield at_most(what, error, MEAN_BARS[kind])
        yield _largest(status.engine, kind, own)
        yield from _left_out(status.engine, kind, own)


def _largest(engine: str, kind: Kind, own: Sequence[Residual]) -> Check:
    unexplained = [residual for residual in own if not residual.reason]
    what = f"{engine}, {kind}: largest error without a stated reason"
    if not unexplained:
        return reported(what, "", "", f"all {len(own)} figures have a stated reason, so that there is nothing to hold")
    worst = max(abs(residual.error) for residual in unexplained)
    explained = sum(abs(residual.error) > ROW_BAR for residual in own if residual.reason)
    why = f"{explained} more with a stated reason" if explained else ""
    return at_most(what, worst, ROW_BAR, why=why)


def _left_out(engine: str, kind: Kind, own: Sequence[Residual]) -> Iterator[Check]:
    error = mean_error(own, left_out=True)
    if math.isnan(error):
        return
    limit = LEFT_OUT_FACTOR * MEAN_BARS[kind]
    batched = [residual for residual in own if _is_only_hybrid_in_batches(residual)]
    rest = [residual for residual in own if not _is_only_hybrid_in_batches(residual)]
    why = ""
    if kind == "decode" and batched and rest:
        names = " and ".join(sorted({residual.point.subject.model.title for residual in batched}))
        why = (
            f"{mean_error(rest, left_out=True):.1%} without {names}: the only model with states that has rows in batches, so that "
            f"without it no row tells what a state costs there ({mean_error(batched, left_out=True):.0%})"
        )
    yield at_most(f"{engine}, {kind}: mean error of models left out", error, limit, why=why)


def _is_only_hybrid_in_batches(residual: Residual) -> bool:
    return residual.point.engine == _ONLY_HYBRID_BATCHES and residual.point.subject.model.name == "nemotron-3-nano-4b"


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


def _by_model(published: Published) -> Iterator[tuple[str, ...]]:
    keys = sorted({_key(residual) for residual in published.residuals})
    for key in keys:
        own = [residual for residual in published.residuals if _key(residual) == key]
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
        lines = [each.row.line for each in published.not_compared if each.reason == reason]
        yield reason, str(len(lines)), ", ".join(map(str, dict.fromkeys(lines)))


def _key(residual: Residual) -> tuple[str, str, str, str]:
    point = residual.point
    engine = point.engine + (f" ({point.version})" if point.version else "")
    return engine, point.subject.weight_format.name, point.subject.model.title, point.kind


def _by_row(published: Published) -> Iterator[tuple[str, ...]]:
    for residual in published.residuals:
        row, left_out = residual.point.row, residual.left_out_error
        yield (
            str(row.line),
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
