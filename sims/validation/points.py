"""What a published figure measured, as steps of an engine: the tokens of each sequence and their context."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pagedkv.sims.validation.benchmark_rows import BenchmarkRow
from pagedkv.sims.validation.row_models import Exclusion, RowModel, excluded, is_burst, kv_cache_dtype_of, model_of, version_of
from pagedkv.step_batch import StepBatch, empty_batch

Kind = Literal["prefill", "decode"]
KINDS: tuple[Kind, ...] = ("prefill", "decode")

ENGINES = (
    ("trt-llm", "tensorrt-llm"),
    ("tensorrt", "tensorrt-llm"),
    ("llama", "llama-cpp"),
    ("ollama", "ollama"),
    ("vllm", "vllm"),
    ("sglang", "sglang"),
)
"""How a publisher's word for an engine begins, in lower case, and its name here."""

CHAT_TOKENS = 200
"""Context of a decode figure of which only the tokens generated are known: 300 of them, half on average, after a short question."""
ASSUMED_PROMPT = 2048
"""Tokens of a prompt where the publisher does not say: what most do."""
ASSUMED_OUTPUT = 128
"""Tokens that a decode figure averages over where the publisher does not say."""
_CHUNK_TOKENS = {"llama-cpp": 512, "ollama": 512, "sglang": 8192}
"""Most tokens of a step: llama.cpp's default --ubatch-size, and the --chunked-prefill-size that SGLang chooses for a Spark."""
_USUAL_CHUNK_TOKENS = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """Steps alike."""

    count: int
    """How many of them."""
    batch: StepBatch
    """What each computes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One figure of a row, and what it takes to predict it."""

    row: BenchmarkRow
    kind: Kind
    engine: str
    """The engine's name here."""
    version: str
    """Which of its builds, empty for current ones."""
    kv_cache_dtype: str
    """Type of its KV cache."""
    subject: RowModel
    """What ran."""
    measured_tok_s: float
    """As published."""
    tokens: int
    """Tokens that the steps make, or read of prompts."""
    steps: tuple[Steps, ...]
    assumed: str
    """What the row does not say and is assumed; empty: nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NotCompared:
    """One figure of a row that is not compared, and why."""

    row: BenchmarkRow
    kind: Kind
    reason: str


def points_of(rows: Sequence[BenchmarkRow]) -> tuple[list[Point], list[NotCompared]]:
    """Return every figure of `rows` that can be compared, and those that cannot."""
    points: list[Point] = []
    left_out: list[NotCompared] = []
    for row in rows:
        for kind in KINDS:
            if (rate := row.prefill_tok_s if kind == "prefill" else row.decode_tok_s) is None:
                continue
            found = _point(row, kind, rate)
            if isinstance(found, Point):
                points.append(found)
            else:
                left_out.append(NotCompared(row=row, kind=kind, reason=found.reason))
    return points, left_out


def _point(row: BenchmarkRow, kind: Kind, rate: float) -> Point | Exclusion:
    reason = excluded(row, kind)
    if reason is not None:
        return reason
    engine = engine_of(row.engine)
    if engine is None:
        return Exclusion(
            reason=f"unknown engine {row.engine!r}: needs a name that begins with {', '.join(word for word, _ in ENGINES)}"
        )
    subject = model_of(row.model, row.weight_dtype, engine)
    if isinstance(subject, Exclusion):
        return subject
    prompt, depth, assumed = _lengths(row, kind)
    limit, tokens = _chunk_tokens(row, engine), row.batch * (prompt if kind == "prefill" else 1)
    if kind == "prefill":
        steps = tuple(prefill_steps(row.batch, prompt, depth, limit=limit))
    elif is_burst(row):
        output = row.output_tokens or ASSUMED_OUTPUT
        steps, tokens = tuple(burst_steps(row, depth, output, limit=limit)), row.batch * output
    else:
        steps = tuple(decode_steps(row.batch, depth))
    return Point(
        row=row,
        kind=kind,
        engine=engine,
        version=version_of(row, engine),
        kv_cache_dtype=kv_cache_dtype_of(row),
        subject=subject,
        measured_tok_s=rate,
        tokens=tokens,
        steps=steps,
        assumed=assumed,
    )


def engine_of(words: str) -> str | None:
    """Return the engine's name here, None if it is not one of those modelled."""
    return next((name for word, name in ENGINES if words.lower().startswith(word)), None)


def _lengths(row: BenchmarkRow, kind: Kind) -> tuple[int, int, str]:
    """Return the prompt's tokens, and those cached before it or, for decode, in the middle of the answer."""
    note = row.note.lower()
    batched = "batched-bench" in row.engine
    if kind == "prefill":
        depth = 0 if batched or row.context_depth is None or row.context_depth == row.prompt_tokens else row.context_depth
        assumed = "" if row.prompt_tokens else f"prompts of {ASSUMED_PROMPT:,} tokens"
        return row.prompt_tokens or ASSUMED_PROMPT, depth, assumed
    if "bench" in row.engine:  # llama-bench and llama-batched-bench: 32 tokens behind the depth
        return 0, (row.context_depth or 0) + 16, ""
    if "300 output tokens" in note:
        return 0, CHAT_TOKENS, f"{CHAT_TOKENS} tokens of context on average"
    output = row.output_tokens or ASSUMED_OUTPUT
    said = row.output_tokens is not None or "128" in note
    if row.context_depth is not None and row.prompt_tokens is not None:
        before = row.context_depth if row.context_depth == row.prompt_tokens else row.context_depth + row.prompt_tokens
        return 0, before + output // 2, "" if said else f"answers of {output} tokens"
    if row.context_depth is not None:
        return 0, row.context_depth + output // 2, "" if row.output_tokens else f"answers of {output} tokens"
    return 0, ASSUMED_PROMPT + output // 2, f"prompts of {ASSUMED_PROMPT:,} and answers of {output} tokens"


def _chunk_tokens(row: BenchmarkRow, engine: str) -> int:
    """Return the most tokens of a step: ggml's own benchmarks on this machine ran with -b 2048 -ub 2048."""
    return _USUAL_CHUNK_TOKENS if "bench" in row.engine else _CHUNK_TOKENS.get(engine, _USUAL_CHUNK_TOKENS)


def decode_steps(batch: int, context: int) -> Iterator[Steps]:
    """Yield the step that makes a token of each of `batch` sequences with `context` tokens in the cache."""
    entries = empty_batch(batch)
    entries["num_scheduled_tokens"], entries["num_slots_needed"], entries["num_known_tokens"] = 1, context, context
    yield Steps(count=1, batch=entries)


def burst_steps(row: BenchmarkRow, context: int, output: int, *, limit: int) -> Iterator[Steps]:
    """Yield the steps between the first token of the first of `row.batch` requests, all sent at once, and the last of the last.

    What is left of the prompts then, and `output` steps of the whole batch with `context` cached tokens each on average.
    """
    prompt = row.prompt_tokens or ASSUMED_PROMPT
    depth = 0 if row.context_depth in (None, prompt) else row.context_depth or 0
    yield from prefill_steps(row.batch - max(1, min(row.batch, limit // prompt)), prompt, depth, limit=limit)
    for step in decode_steps(row.batch, context):
        yield replace(step, count=output)


def prefill_steps(batch: int, prompt: int, depth: int, *, limit: int) -> Iterator[Steps]:
    """Yield the chunks in which `batch` prompts are computed behind `depth` cached tokens, at most `limit` tokens a step.

    Several short prompts share a step, a long one takes several.
    """
    together = max(1, min(batch, limit // prompt))
    whole, rest = divmod(batch, together)
    for count, sequences in ((whole, together), (1 if rest else 0, rest)):
        for start in range(0, prompt if count else 0, limit):
            chunk = min(limit, prompt - start)
            entries = empty_batch(sequences)
            entries["num_scheduled_tokens"], entries["num_slots_needed"] = chunk, depth + start + chunk
            entries["num_known_tokens"] = depth + prompt
            yield Steps(count=count, batch=entries)
