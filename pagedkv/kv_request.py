"""What an allocator must know of a request."""

from dataclasses import dataclass, field

import numpy as np

from pagedkv.arrays import NO_KEYS, NO_TOKENS, Int32Array
from pagedkv.block_hash import BlockHashChain, BlockKeys
from pagedkv.errors import ConfigError


@dataclass(slots=True, kw_only=True, eq=False)
class KVRequest:
    """A request as its owner, the scheduler, keeps it up to date. It is told apart by identity."""

    request_id: int | str
    """Its name in messages."""
    num_tokens: int
    """Tokens known: prompt and outputs so far, drafts excluded."""
    block_keys: BlockKeys = field(default_factory=lambda: NO_KEYS)
    """Keys of its full blocks, at least num_tokens // block_size of them unless caching is off."""
    unit_keys: BlockKeys = field(default_factory=lambda: NO_KEYS)
    """Keys of its units of `KVPoolSettings.prefix_match_unit` tokens, at least num_tokens // prefix_match_unit of them if that is
    on: the keys of a chain with blocks of that size."""
    token_ids: Int32Array = field(default_factory=lambda: NO_TOKENS)
    """The known tokens, int32 [num_tokens], for allocators that compare tokens and not keys; empty: it shares nothing there."""
    message_start: int = 0
    """Where the last message of its prompt starts, for server slots that keep a checkpoint there; 0: nobody says."""
    namespace: str = ""
    """Salt and adapter: only requests of one namespace share. Keys contain theirs already."""
    priority: int = 0
    """For eviction by priority: what it leaves behind is worth the more the higher this is."""
    admission_slots: int = 0
    """What `Allocator.admission_slots` said at its arrival."""
    num_computed_tokens: int = 0
    """Tokens whose keys and values are in the cache, or will be after the step being scheduled."""

    def update(self, chain: BlockHashChain) -> None:
        """Take over the tokens and keys of `chain`."""
        self.num_tokens, self.block_keys = chain.num_tokens, chain.keys

    def check_known(self, *, max_model_len: int, num_keys: int) -> None:
        """Raise ConfigError unless it has 1 to `max_model_len` tokens and at least `num_keys` keys."""
        if not 1 <= self.num_tokens <= max_model_len:
            raise self.error(f"{self.num_tokens} known tokens: needs 1 or more, up to max_model_len {max_model_len}")
        if num_keys:
            self._check_keys("block", self.block_keys, num_keys)

    def check_units(self, num_keys: int) -> None:
        """Raise ConfigError unless it has at least `num_keys` keys of units."""
        if num_keys:
            self._check_keys("unit", self.unit_keys, num_keys)

    def _check_keys(self, what: str, keys: BlockKeys, num_keys: int) -> None:
        if not (keys.dtype == np.uint64 and keys.ndim == 2 and keys.shape[1] == 2):
            raise self.error(f"{what} keys of type {keys.dtype}, shape {keys.shape}: needs uint64 [{what}s, 2]")
        if len(keys) < num_keys:
            raise self.error(f"{len(keys)} {what} keys for {num_keys} full {what}s of {self.num_tokens} tokens: extend them")

    def check_slots(self, *, num_new_tokens: int, num_lookahead_tokens: int = 0, num_slots_held: int) -> None:
        """Raise ConfigError unless new slots can follow its computed tokens, which must lie within the slots held."""
        if num_new_tokens < 1 or num_lookahead_tokens < 0:
            raise self.error(f"{num_new_tokens} new and {num_lookahead_tokens} look-ahead tokens: needs 1 or more, and 0 or more")
        if not 0 <= self.num_computed_tokens <= num_slots_held:
            raise self.error(
                f"{self.num_computed_tokens} computed tokens, but it holds {num_slots_held} slots: set it to what is held"
            )

    def check_length(self, num_tokens: int, max_model_len: int) -> None:
        """Raise ConfigError if it would have slots for `num_tokens` tokens and they are more than `max_model_len`."""
        if num_tokens > max_model_len:
            raise self.error(f"{num_tokens} tokens are more than max_model_len {max_model_len}")

    def check_place(self, num_live: int, max_num_seqs: int) -> None:
        """Raise ConfigError unless one more request can hold slots besides `num_live`."""
        if num_live >= max_num_seqs:
            raise self.error(f"{num_live} requests hold slots already: free one first, or raise max_num_seqs {max_num_seqs}")

    def holds_nothing(self) -> ConfigError:
        """Return the error for a request that should hold slots and does not."""
        return self.error("holds no blocks: it was never allocated, or was freed before")

    def error(self, problem: str) -> ConfigError:
        """Return the error that tells this request's `problem`."""
        return ConfigError(f"request {self.request_id!r}: {problem}")
