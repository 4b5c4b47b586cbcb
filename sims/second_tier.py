"""A second tier behind the KV cache: how large it is, how fast content moves to and from it, and who may have one."""

from dataclasses import dataclass
from typing import get_args

from pagedkv.errors import ConfigError, unknown_name
from pagedkv.hardware_spec import HardwareSpec
from pagedkv.kv_spec import KVCacheSpec
from pagedkv.memory_budget import MemoryBudget
from pagedkv.offload_tier import TierKind, tier_blocks
from pagedkv.quantity import parse_quantity
from pagedkv.sims.config import ServingConfig
from pagedkv.sims.step_formula import CopyCoefficients
from pagedkv.units import parse_bytes

TIER_KINDS: tuple[str, ...] = get_args(TierKind)


@dataclass(frozen=True, slots=True, kw_only=True)
class SecondTier:
    """Where the content goes that the prefix cache has to give up."""

    kind: str
    """`host` or `nvme`."""
    num_blocks: int
    bytes_per_s: float
    """What copies reach, in each direction."""
    latency_s: float
    """Until a copy begins."""
    source: str
    """Who says so."""

    @property
    def title(self) -> str:
        """What it is, and who says how fast."""
        rate = f"{self.bytes_per_s / 1e9:g} GB/s ({self.source.partition(':')[0]})"
        return f"second tier {self.num_blocks:,} blocks, {self.kind}, {rate}"

    def coefficients(self, block_bytes: int) -> CopyCoefficients:
        """Return what copying a block of `block_bytes` bytes costs."""
        return CopyCoefficients(block_bytes / self.bytes_per_s, self.latency_s, self.kind == "host")


def second_tier(serving: ServingConfig, hardware: HardwareSpec, kv_spec: KVCacheSpec, budget: MemoryBudget) -> SecondTier | None:
    """Return the tier that `serving` asks for, or None.

    Raises:
        ConfigError: If it cannot be, or nobody knows how fast it is.
    """
    others = {"--offload-tier": serving.offload_tier, "--offload-bandwidth": serving.offload_bandwidth}
    if serving.offload_size is None:
        if said := [f"{flag} {value}" for flag, value in others.items() if value is not None]:
            raise ConfigError(f"{said[0]} says how a second tier is, and there is none: add --offload-size, e.g. 200GiB")
        return None
    if serving.enable_prefix_caching is False:
        raise ConfigError("--offload-size keeps what leaves the prefix cache: it needs prefix caching")
    if kv_spec.state_bytes_per_sequence:
        raise ConfigError("--offload-size keeps what leaves the prefix cache: a model's layers with a state are not cached")
    kind = serving.offload_tier or ("nvme" if hardware.unified else "host")
    if kind not in TIER_KINDS:
        raise unknown_name("offload-tier", kind, TIER_KINDS)
    if kind == "host" and hardware.unified:
        raise ConfigError(
            f"--offload-tier host: on {hardware.title} host memory is the memory that the KV cache is in, and such a tier frees "
            "nothing; give the KV cache that memory, or use --offload-tier nvme"
        )
    num_blocks = tier_blocks(parse_bytes(serving.offload_size, name="--offload-size"), budget.block_bytes)
    latency = hardware.disk_read_latency if kind == "nvme" else None
    latency_s = 0.0 if latency is None else latency.value
    if serving.offload_bandwidth is not None:
        rate = parse_quantity(serving.offload_bandwidth, "bytes/s", name="--offload-bandwidth")
        if rate <= 0:
            raise ConfigError(f"--offload-bandwidth is {serving.offload_bandwidth}: needs more than 0, e.g. 5GB/s")
        return SecondTier(kind=kind, num_blocks=num_blocks, bytes_per_s=rate, latency_s=latency_s, source="--offload-bandwidth")
    known = hardware.disk_read_bandwidth if kind == "nvme" else None
    if known is None:
        what, example = ("disk", "5GB/s") if kind == "nvme" else ("link to the host's memory", "25GB/s")
        raise ConfigError(f"nobody knows how fast the {what} of {hardware.title} is: say so, e.g. --offload-bandwidth {example}")
    return SecondTier(
        kind=kind, num_blocks=num_blocks, bytes_per_s=known.value, latency_s=latency_s, source=f"{known.tag}: {known.source}"
    )
