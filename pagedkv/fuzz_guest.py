"""Requests for the fuzzer: what each will say, all of it known from the start, and how much of it the allocator knows."""

from dataclasses import dataclass, field

from pagedkv.allocation import KVPoolSettings
from pagedkv.arrays import NO_KEYS, Int32Array, Int64Array
from pagedkv.block_hash import BlockHashChain, BlockKeys
from pagedkv.kv_request import KVRequest
from pagedkv.shadow_memory import prefix_identities


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """All that a request will say, prompt and outputs. Requests may share one."""

    tokens: Int32Array
    """Its tokens, int32 [tokens]."""
    namespace: str = ""
    """Salt of its keys: prefixes are shared only within one."""
    private: bool = False
    """Allocators that compare tokens do not get to see any, nor the namespace, which must be its own."""
    block_size: int
    """Tokens per key."""
    unit: int = 0
    """Tokens per key of a unit, as in `KVPoolSettings.prefix_match_unit`; 0: it has none."""
    identities: Int64Array = field(init=False)
    """What the slots of its tokens must hold."""
    keys: BlockKeys = field(init=False)
    """Keys of its full blocks."""
    unit_keys: BlockKeys = field(init=False)
    """Keys of its full units."""

    def __post_init__(self) -> None:
        """Work out identities and keys."""
        object.__setattr__(self, "keys", self._keys(self.block_size))
        object.__setattr__(self, "unit_keys", self._keys(self.unit) if self.unit else NO_KEYS)
        object.__setattr__(self, "identities", prefix_identities(self.tokens, self.namespace))

    @classmethod
    def for_pool(cls, settings: KVPoolSettings, tokens: Int32Array, *, namespace: str = "", private: bool = False) -> "Script":
        """Return one with the keys that an allocator of these `settings` may ask for."""
        size, unit = settings.block_size, settings.prefix_match_unit
        return cls(tokens=tokens, namespace=namespace, private=private, block_size=size, unit=unit)

    def _keys(self, num_tokens: int) -> BlockKeys:
        """Return the keys of each run of `num_tokens`."""
        chain = BlockHashChain(block_size=num_tokens, salt=self.namespace)
        chain.extend(self.tokens)
        return chain.keys


class Guest:
    """A request with its script, from its arrival to its end."""

    def __init__(self, script: Script, *, name: int | str, prompt_tokens: int, output_tokens: int, priority: int = 0) -> None:
        self.script = script
        self.prompt_tokens, self.output_tokens = prompt_tokens, output_tokens
        self.request = KVRequest(
            request_id=name,
            num_tokens=prompt_tokens,
            block_keys=script.keys,
            unit_keys=script.unit_keys,
            priority=priority,
        )
        self.request.namespace = "" if script.private else script.namespace
        self.know(prompt_tokens)

    def __repr__(self) -> str:
        return f"request {self.request.request_id}"

    @property
    def last(self) -> int:
        """Tokens that it computes until it is done: its last output needs no slot."""
        return self.prompt_tokens + self.output_tokens - 1

    @property
    def uncomputed(self) -> int:
        """Known tokens yet to be computed."""
        return self.request.num_tokens - self.request.num_computed_tokens

    def know(self, num_tokens: int) -> None:
        """Let its first `num_tokens` tokens be known."""
        self.request.num_tokens = num_tokens
        if not self.script.private:
            self.request.token_ids = self.script.tokens[:num_tokens]
