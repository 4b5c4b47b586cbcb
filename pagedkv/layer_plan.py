"""What one layer of a model is made of."""

from dataclasses import dataclass
from typing import Literal

Mixer = Literal["full", "sliding_window", "chunked", "linear", "mamba", "none"]
FeedForward = Literal["dense", "moe", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerPlan:
    """What one layer is made of."""

    mixer: Mixer
    """How it looks at other tokens."""
    feed_forward: FeedForward
    """How it works on each token."""
    compression: int = 0
    """Tokens per compressed entry that it keeps beside a window; 0: none."""
    owns_cache: bool = True
    """Whether it computes keys and values, or reads those of an earlier layer."""
    has_indexer: bool = True
    """Whether it selects tokens itself, where the model has an indexer, or takes another layer's selection."""
    num_kv_heads: int | None = None
    """Key and value heads where layers differ in them; None: as the file says."""
    intermediate_size: int | None = None
    """Width of the feed-forward part where layers differ in it; None: as the file says."""
