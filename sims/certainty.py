"""How wide an interval is stated: the one rule, by which what is less known is never stated more surely.

From best known to least:

1. `MEASURED`: this very model was measured on the machine whose file says so: as far as its own rates were off when left out.
2. `KNOWN`: rows of several models, with these weights and this cache: as far as left-out models were off.
3. `DOUBTED`: rows of a single model, too few, other weights, another cache, a family of models without rows, another version or
   engine that stands in: `WIDENED` times that.
4. `UNKNOWN`: no rows: at least as wide as `DOUBTED` is for this engine wherever it was fitted (for any engine, if it was nowhere),
   and as far as the catalogue's figures were off where they could be compared.

Each is at least as wide as the one before, for a model of any family.
"""

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, Literal

Certainty = Literal["measured", "known", "doubted", "unknown"]
WIDENED = 2.0
"""How much wider an interval is where there is a doubt."""
KINDS = ("decode", "prefill")
SPREAD_PREFIX: Mapping[str, str] = MappingProxyType({"experts": "experts_", "states": "state_"})
"""Families of models whose rates have spreads of their own in a group, and how their names begin; the others are of dense models
with plain attention, than which none is known better."""


def spreads_of(group: Mapping[str, Any], certainty: Certainty, *, families: Iterable[str]) -> dict[str, float]:
    """Return by kind of rate, as logarithms, how far rates by the constants of a fitted group may be off.

    Args:
        group: The group, as its file has it.
        certainty: How well what is asked is known by its rows.
        families: Those of the model (`constant_sources.FAMILIES`).
    """
    own = group.get("own_spread", {})
    prefixes = ["", *(SPREAD_PREFIX[family] for family in families if family in SPREAD_PREFIX)]
    spreads = {}
    for kind in KINDS:
        its = max(group["spread"].get(f"{prefix}{kind}", 0.0) for prefix in prefixes)
        measured = own.get(kind, its)
        known = max(its, measured)  # no other model is known better than those that were measured
        widened = max(group.get("widened", WIDENED) * its, known)
        spreads[kind] = {"measured": measured, "known": known, "doubted": widened, "unknown": widened}[certainty]
    return spreads


def unknown_spreads(
    groups: Iterable[Mapping[str, Any]], engine: str, catalogue: Mapping[str, float], *, families: Iterable[str]
) -> dict[str, float]:
    """Return the same where no group applies.

    Args:
        groups: All fitted groups that are known of, of this machine and others.
        engine: The engine's name, with or without a version.
        catalogue: How far the catalogue's own figures were off, where there are rows.
        families: Those of the model.
    """
    everywhere, of = list(groups), list(families)
    base = engine.partition("@")[0]
    nearest = [group for group in everywhere if group["engine"].partition("@")[0] == base] or everywhere
    widest = [spreads_of(group, "unknown", families=of) for group in nearest]
    return {kind: max(catalogue[kind], *(each[kind] for each in widest)) for kind in KINDS}
