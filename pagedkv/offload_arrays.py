"""Paged KV memory with a second tier, as the arrays and rules that compiled code works on."""

from typing import NamedTuple

from pagedkv.paged_arrays import PagedArrays, PagedRules
from pagedkv.tier_arrays import TierArrays


class OffloadArrays(NamedTuple):
    """A pool of blocks, and where the content goes that it has to give up."""

    pool: PagedArrays
    tier: TierArrays


class OffloadRules(NamedTuple):
    """How the pool is given. A tier has no rules: it keeps what was used last."""

    paged: PagedRules
