"""What prefix caching saves on a trace, by kind of cache, eviction policy and capacity, and how much capacity is enough."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from pagedkv.errors import ConfigError, unknown_name
from pagedkv.eviction import EVICTION_POLICIES
from pagedkv.sims.prefix_replay import REPLAYS
from pagedkv.sims.traces import Trace, read_trace

CACHES = tuple(REPLAYS)
IDEAL = "ideal-lru"
UNLIMITED = "inf"
ENOUGH = 0.9
"""Share of the hit ratio without evictions for which the capacity is searched."""
_PRECISION = 0.01
"""Of that search, as a share of the capacity."""


class HitRatios(NamedTuple):
    """Shares of all prompts that were found in the cache."""

    blocks: float
    """Blocks found / blocks of all prompts, partial ones included."""
    tokens: float
    """Tokens found / prompt tokens."""


RatiosByCapacity: TypeAlias = Callable[[int | None], HitRatios]


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixRow:
    """One cache of one capacity."""

    cache: str
    """A name in `CACHES`."""
    eviction: str
    """A name in `pagedkv.eviction`."""
    blocks: int | None
    """Its capacity; None: nothing is ever evicted."""
    hit_ratio_blocks: float
    """See `HitRatios`."""
    hit_ratio_tokens: float
    """See `HitRatios`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EnoughBlocks:
    """How large a cache must be."""

    cache: str
    """A name in `CACHES`."""
    eviction: str
    """A name in `pagedkv.eviction`."""
    best_hit_ratio_blocks: float
    """Without evictions."""
    capacity_for_90_percent: int
    """Blocks that reach `ENOUGH` of that, at most 1 % more than needed; 0 if no prompt begins like an earlier one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixStudy:
    """The answer."""

    trace: str
    """The file."""
    requests: int
    """Its requests."""
    prompt_tokens: int
    """Tokens in all prompts."""
    prompt_blocks: int
    """Blocks in all prompts, partial ones included."""
    distinct_blocks: int
    """How many of them differ."""
    block_tokens: int
    """Tokens per block."""
    rows: tuple[PrefixRow, ...]
    """By cache, eviction and capacity, as asked for."""
    capacities: tuple[EnoughBlocks, ...]
    """By cache and eviction."""

    def document(self) -> dict[str, Any]:
        """Return it as JSON values, an unlimited capacity as "inf"."""
        document = asdict(self)
        for row in document["rows"]:
            row["blocks"] = UNLIMITED if row["blocks"] is None else row["blocks"]
        return document


def study_prefixes(
    path: Path, *, blocks: str = "inf,30000,10000", caches: str = ",".join(CACHES), evictions: str = "lru"
) -> PrefixStudy:
    """Replay the prompts of a trace through each cache of each eviction policy and capacity.

    ideal-lru knows one policy, so it has the rows of lru whatever `evictions` says.

    Args:
        path: A trace that says what its prompts are made of.
        blocks: Capacities, separated by commas; inf: nothing is evicted.
        caches: Names in `CACHES`, separated by commas.
        evictions: Names in `pagedkv.eviction`, separated by commas.

    Raises:
        ConfigError: If a capacity or a name is wrong.
        TraceFormatError: If the trace cannot be read or does not say what its prompts are made of.
    """
    capacities = [_capacity(word) for word in _words("blocks", blocks)]
    names = {kind: _words(kind, text) for kind, text in (("cache", caches), ("eviction", evictions))}
    for kind, known in (("cache", CACHES), ("eviction", EVICTION_POLICIES.names())):
        for name in names[kind]:
            if name not in known:
                raise unknown_name(f"{kind} policy" if kind == "eviction" else kind, name, known)
    if names["cache"] == [IDEAL] and "lru" not in names["eviction"]:
        raise ConfigError(f"{IDEAL} evicts by lru, not by {evictions}: for other policies choose block-pool or radix as well")
    trace = read_trace(path, with_content=True)
    assert trace.content is not None
    rows, enough = list[PrefixRow](), list[EnoughBlocks]()
    for name in names["cache"]:
        for eviction in ["lru"] if name == IDEAL else names["eviction"]:
            ratios = _ratios_by_capacity(trace, name, eviction)
            rows += [_row(name, eviction, capacity, ratios(capacity)) for capacity in capacities]
            enough.append(_enough(name, eviction, ratios, trace.content.ids.size))
    return PrefixStudy(
        trace=str(path),
        requests=len(trace),
        prompt_tokens=int(trace.prompt_tokens.sum()),
        prompt_blocks=trace.content.ids.size,
        distinct_blocks=len(set(trace.content.ids.tolist())),
        block_tokens=trace.content.tokens_per_id,
        rows=tuple(rows),
        capacities=tuple(enough),
    )


def capacity_reaching(target: float, ratio_of: Callable[[int], float], limit: int) -> int:
    """Return a capacity, at most `limit`, that reaches `target` and is at most 1 % more than needed; 0 if the target is 0.

    By halving: where more capacity finds less, as under some policies, it is one at which the target is crossed.
    """
    too_few, enough = 0, limit if target > 0 else 0
    while enough - too_few > max(1, _PRECISION * enough):
        middle = (too_few + enough) // 2
        if ratio_of(middle) >= target:
            enough = middle
        else:
            too_few = middle
    return enough


def _row(name: str, eviction: str, capacity: int | None, found: HitRatios) -> PrefixRow:
    ratios = {"hit_ratio_blocks": found.blocks, "hit_ratio_tokens": found.tokens}
    return PrefixRow(cache=name, eviction=eviction, blocks=capacity, **ratios)


def _enough(name: str, eviction: str, ratios: RatiosByCapacity, limit: int) -> EnoughBlocks:
    best = ratios(None).blocks
    capacity = capacity_reaching(ENOUGH * best, lambda blocks: ratios(blocks).blocks, limit)
    return EnoughBlocks(cache=name, eviction=eviction, best_hit_ratio_blocks=best, capacity_for_90_percent=capacity)


def _ratios_by_capacity(trace: Trace, name: str, eviction: str) -> RatiosByCapacity:
    """Return the function from a capacity to what this cache finds; it remembers its answers."""
    prompts = trace.content
    assert prompts is not None
    num_blocks, num_tokens = prompts.ids.size, int(trace.prompt_tokens.sum())

    @cache
    def ratios(capacity: int | None) -> HitRatios:
        room = num_blocks if capacity is None else min(capacity, num_blocks)  # room for all blocks of all prompts is no limit
        blocks, tokens = REPLAYS[name](prompts, trace.prompt_tokens, room, eviction)
        return HitRatios(int(blocks.sum()) / num_blocks, int(tokens.sum()) / num_tokens)

    return ratios


def _words(kind: str, text: str) -> Sequence[str]:
    words = list(dict.fromkeys(word.strip() for word in text.split(",")))
    if "" in words:
        raise ConfigError(f"{kind} is {text!r}: needs one or more values separated by commas")
    return words


def _capacity(word: str) -> int | None:
    if word == UNLIMITED:
        return None
    number = int(word) if word.isascii() and word.isdecimal() and len(word) < 10 else 0
    if number < 1:
        raise ConfigError(f"blocks is {word!r}: needs whole numbers from 1 to 999999999, or {UNLIMITED} for a cache without limit")
    return number
