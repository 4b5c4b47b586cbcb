"""Where a constant comes from that a group's own rows do not identify, and which constants matter to which models.

Rows of dense models say nothing of a mixture's experts. How many experts a batch touches is a property of models and texts, and
that products with gathered experts are slower than others holds of every engine that was measured: what no row of a group
identifies of these is taken from the nearest group whose rows do: the same engine's on the same machine, else that of an engine
with the same kernels there, else those on other machines, else that with rows of most models. An engine with the kernels of
another takes from that, on the same machine, what else its rows tell. All other constants that no row identifies are the machine's
figures, or the formula without them.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from pagedkv.model_spec import ModelSpec

FAMILIES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "experts": ("routing_exponent", "expert_rate"),
        "states": ("state_bytes_per_s", "further_state_bytes_per_s", "state_scan_bytes_per_s"),
        "latents": ("latent_attention",),
    }
)
"""By family of models: the constants that no other model's rows depend on."""
CARRIED = FAMILIES["experts"]
"""Constants that hold from one engine to another, if need be."""
SAME_KERNELS: Mapping[str, str] = MappingProxyType({"sglang": "vllm"})
"""By engine: another with its kernels: FlashInfer's attention, flash-linear-attention's states, experts in Triton; both launched
from Python."""
FAMILY_WORDS: Mapping[str, str] = MappingProxyType(
    {"experts": "mixture of experts", "states": "model with states", "latents": "model with latent attention"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Carried:
    """A constant that another group's rows tell."""

    value: float
    whose: str
    """The group, in words."""


def families_of(model: ModelSpec) -> tuple[str, ...]:
    """Return the families, of `FAMILIES`, that a model belongs to; none for a dense one with plain attention."""
    kinds = {group.kind for group in model.layer_groups}
    belongs = {"experts": model.num_experts > 0, "states": "state" in kinds, "latents": "mla" in kinds}
    return tuple(name for name in FAMILIES if belongs[name])


def concerned(name: str, families: Iterable[str]) -> bool:
    """Return whether rows of models of these families can tell a constant."""
    of = next((family for family, names in FAMILIES.items() if name in names), None)
    return of is None or of in families


def carried_constants(groups: Iterable[Mapping[str, Any]], machines: Collection[str], engine: str) -> dict[str, Carried]:
    """Return what fitted groups say of constants to an engine whose rows do not: of `CARRIED`, and of all that its kernels share.

    Args:
        groups: Groups as the file of constants has them, with what they `fitted`.
        machines: The names that the machine goes by: its own, and that of the one it is like.
        engine: The engine, whatever its version.
    """
    told = list(groups)
    base = engine.partition("@")[0]
    alike = SAME_KERNELS.get(base, base)

    def nearness(group: Mapping[str, Any]) -> tuple[bool, bool, bool, int]:
        here, its = group["machine"] in machines, group["engine"].partition("@")[0]
        return here and its == base, here and its == alike, its in (base, alike), group["num_models"]

    kept = {name for group in told if alike != base and nearness(group)[1] for name in group.get("fitted", ())}
    found: dict[str, Carried] = {}
    for name in (*CARRIED, *sorted(kept - set(CARRIED))):
        tell = [group for group in told if name in group.get("fitted", ()) and (name in CARRIED or nearness(group)[1])]
        if tell:
            nearest = max(tell, key=nearness)
            found[name] = Carried(value=nearest["constants"][name], whose=f"{nearest['engine']} on {nearest['machine']}")
    return found
