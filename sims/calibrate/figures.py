"""Measured rates as figures that the formula of a step can predict; what cannot be, and what contradicts what."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from pagedkv.errors import ConfigError
from pagedkv.sims.calibrate.subject import Subject
from pagedkv.sims.measurements import MeasuredRate, Measurements
from pagedkv.sims.validation.benchmark_rows import BenchmarkRow
from pagedkv.sims.validation.peaks import impossible
from pagedkv.sims.validation.points import Kind, Point, Steps, decode_steps, points_of, prefill_steps
from pagedkv.sims.validation.row_models import RowModel

CONTRADICTION = 0.20
"""Rates of the same work that differ by more than this contradict each other: no constants give both."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A rate, what it is of, and the steps behind it."""

    where: str
    """The file and the place in it, or the flag."""
    what: str
    """The work, in words."""
    point: Point


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftOut:
    """A rate that is not fitted, and why."""

    where: str
    reason: str


def figures_of(
    subject: Subject, files: Sequence[Measurements], given: Sequence[MeasuredRate]
) -> tuple[list[Figure], list[LeftOut]]:
    """Return every rate as a figure, and those left out: no machine of this kind reaches them, or they are of something else.

    Raises:
        ConfigError: If two of the same work contradict each other.
    """
    rates = [*given, *(rate for file in files for rate in file.rates)]
    figures = [_figure(subject, rate) for rate in rates]
    left_out: list[LeftOut] = []
    for file in files:
        figures += _of_rows(subject, file, left_out)
    possible: list[Figure] = []
    for figure in figures:
        reason = impossible(figure.point, subject.request.hardware)
        if reason is None:
            possible.append(figure)
        else:
            left_out.append(LeftOut(where=figure.where, reason=reason))
    _refuse_contradictions(possible)
    return possible, left_out


def _figure(subject: Subject, rate: MeasuredRate) -> Figure:
    kind: Kind = "prefill" if rate.kind == "prefill" else "decode"
    row = BenchmarkRow(
        line=0,
        source=rate.where,
        engine=subject.engine,
        model=subject.request.model.name,
        weight_dtype=subject.request.weight_format.name,
        batch=rate.batch,
        prompt_tokens=rate.prompt_tokens,
        context_depth=rate.depth,
        prefill_tok_s=rate.tokens_per_s if kind == "prefill" else None,
        decode_tok_s=rate.tokens_per_s if kind == "decode" else None,
        note="",
        verified=True,
    )
    of_each = {"prefill": rate.prompt_tokens, "decode": 1, "run": rate.output_tokens}[rate.kind]
    point = Point(
        row=row,
        kind=kind,
        engine=subject.engine,
        version="",
        kv_cache_dtype=subject.serving.kv_cache_dtype,
        subject=RowModel(model=subject.request.model, weight_format=subject.request.weight_format, source="--model"),
        measured_tok_s=rate.tokens_per_s,
        tokens=rate.batch * of_each,
        steps=tuple(_steps(subject, rate)),
        assumed="",
    )
    return Figure(where=rate.where, what=_in_words(rate), point=point)


def _steps(subject: Subject, rate: MeasuredRate) -> Iterator[Steps]:
    if rate.kind in ("prefill", "run"):
        limit = rate.chunk_tokens or subject.chunk_tokens
        yield from prefill_steps(rate.batch, rate.prompt_tokens, rate.depth, limit=limit)
    if rate.kind == "decode":
        yield from decode_steps(rate.batch, rate.depth)
    elif rate.kind == "run":
        (step,) = decode_steps(rate.batch, rate.depth + rate.prompt_tokens + rate.output_tokens // 2)
        yield Steps(count=rate.output_tokens, batch=step.batch)


def _in_words(rate: MeasuredRate) -> str:
    behind = f" behind {rate.depth:,}" if rate.depth else ""
    if rate.kind == "prefill":
        return f"prefill, batch {rate.batch}, {rate.prompt_tokens:,} tokens{behind}"
    if rate.kind == "decode":
        return f"decode, batch {rate.batch}, context {rate.depth:,}"
    return f"run, batch {rate.batch}, {rate.prompt_tokens:,} + {rate.output_tokens:,} tokens{behind}"


def _of_rows(subject: Subject, file: Measurements, left_out: list[LeftOut]) -> Iterator[Figure]:
    """Yield the figures of rows that name a model each: those of this engine and weight type."""
    points, not_compared = points_of(list(file.rows))
    left_out += [LeftOut(where=f"{file.path}, line {each.row.line}", reason=each.reason) for each in not_compared]
    base, fmt = subject.engine.partition("@")[0], subject.request.weight_format.name
    for point in points:
        where = f"{file.path}, line {point.row.line}"
        if point.engine != base:
            left_out.append(LeftOut(where=where, reason=f"of {point.engine}, not of {base}"))
        elif point.version:
            left_out.append(LeftOut(where=where, reason=f"of older builds of {base} ({point.version})"))
        elif point.subject.weight_format.name != fmt:
            left_out.append(LeftOut(where=where, reason=f"with {point.subject.weight_format.name} weights, not {fmt}"))
        else:
            row = point.row
            context = int(point.steps[0].batch["num_slots_needed"][0])
            lengths = f"{row.prompt_tokens or 0:,} tokens" if point.kind == "prefill" else f"context {context:,}"
            yield Figure(where=where, what=f"{point.kind}, batch {row.batch}, {lengths}, {row.model}", point=point)


def _refuse_contradictions(figures: Sequence[Figure]) -> None:
    for i, figure in enumerate(figures):
        for other in figures[:i]:
            a, b = figure.point, other.point
            if _same_work(a, b) and abs(np.log(a.measured_tok_s / b.measured_tok_s)) > np.log1p(CONTRADICTION):
                raise ConfigError(
                    f"{other.where} says {b.measured_tok_s:,.5g} tokens/s and {figure.where} "
                    f"{a.measured_tok_s:,.5g} for the same work ({figure.what}): "
                    "they contradict each other; leave out the one that is wrong, or measure again"
                )


def _same_work(a: Point, b: Point) -> bool:
    return (
        a.kind == b.kind
        and a.tokens == b.tokens
        and a.subject.model.name == b.subject.model.name
        and len(a.steps) == len(b.steps)
        and all(x.count == y.count and np.array_equal(x.batch, y.batch) for x, y in zip(a.steps, b.steps, strict=True))
    )
