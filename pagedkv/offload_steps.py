"""The paged allocator with a second tier, for a whole step at once, in compiled code."""

import pagedkv.scheduling.offload_grants  # noqa: F401 - what compiled code does with this kind of memory
from pagedkv.allocation import KVPoolSettings
from pagedkv.errors import ConfigError
from pagedkv.offload_arrays import OffloadArrays, OffloadRules
from pagedkv.paged_steps import PagedStepAllocator
from pagedkv.tier_arrays import NUM_DROPPED, NUM_LOADED, NUM_STORED, NUM_USED, TierArrays


class OffloadStepAllocator(PagedStepAllocator):
    """`PagedStepAllocator`, and `offload_blocks` blocks that keep what leaves its prefix cache: see `pagedkv.offload_tier`.

    Only a compiled scheduler asks for prefixes, and only it fills the tier.
    """

    name = "paged-offload"

    def __init__(self, settings: KVPoolSettings) -> None:
        """Make an empty pool and an empty tier.

        Raises:
            ConfigError: If prefixes are cached and the tier has no blocks.
        """
        if settings.enable_prefix_caching and not settings.offload_blocks:
            raise ConfigError("offload-blocks is 0: paged-offload needs 1 or more; paged is the allocator without a second tier")
        super().__init__(settings)
        most_blocks = self.tables.blocks.shape[1]
        self.tier = TierArrays.empty(
            num_blocks=settings.offload_blocks, most_hits=most_blocks, most_removed=most_blocks + 1 + self.state_units
        )
        self.arrays, self.rules = OffloadArrays(self.paged_arrays, self.tier), OffloadRules(self.paged_rules)

    @property
    def num_offloaded(self) -> int:
        """Blocks copied to the tier so far."""
        return int(self.tier.counts[NUM_STORED])

    @property
    def num_loaded(self) -> int:
        """Blocks copied back so far."""
        return int(self.tier.counts[NUM_LOADED])

    @property
    def num_dropped(self) -> int:
        """Blocks whose content is lost: others needed their place in the tier."""
        return int(self.tier.counts[NUM_DROPPED])

    @property
    def num_kept(self) -> int:
        """Blocks of the tier that have content."""
        return int(self.tier.counts[NUM_USED])

    def check_integrity(self) -> None:
        """Raise IntegrityError unless the pool and the tier are sound."""
        super().check_integrity()
        self.tier.check_integrity()
