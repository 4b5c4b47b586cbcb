"""The fields of a config.json, read with their types checked; a field about attention that nobody read is an error."""

import re
import reprlib
from collections.abc import Iterable, Mapping

from pagedkv.errors import ConfigError

MAX_SIZE = 10**9
"""No dimension, count or length of a model is above this."""
MAX_LAYERS = 10_000

_ABOUT_ATTENTION = re.compile(
    "attn|attention|kv|window|swa|sliding|chunk|head|mamba|ssm|conv|index|lora|latent|state|compress|linear|sparse|sinks?(_|$)|layer_type"
    "|block|pattern|recurrent|delta|cache|interval|retention|memory"
)
"""Parts of names that may change what is cached."""
_HARMLESS = re.compile(
    r"\w*(dropout|softcap|softcapping|scale|scaling|multiplier|temperature\w*|_theta|_beta|_act|_implementation|_token_(id|index)|_kernels)"
    r"|use_cache|cache_implementation|chunk_size(_feed_forward)?|output_\w+|query_pre_attn_scalar|num_logits_to_keep|expand"
    r"|attn_temperature_tuning|use_bidirectional_attention|indexer_rope_interleave|index_share_for_mtp_iteration|use_unified_vision_chunk"
    r"|decoder_sparse_step|ignore_index|(mtp|mlp|moe|time_step|lm_head|vision|image|video|audio|mm)_\w+"
)
"""Names that match but change neither cache nor parameters: numerics, kernels, training, drafting layers, towers."""


class ConfigFields:
    """Typed access to one JSON object. It remembers what was read."""

    def __init__(self, table: Mapping[str, object], *, where: str) -> None:
        self.table = table
        self.where = where
        self._read: set[str] = set()

    def error(self, name: str, problem: str) -> ConfigError:
        """Return the error that names a field and what is wrong with it."""
        return ConfigError(f"{self.where}: {name} {problem}")

    def supersede(self, *names: str) -> None:
        """Note that other fields answer what these would."""
        self._read.update(names)

    def has(self, name: str) -> bool:
        """Return whether the field is there and not null."""
        return self.value(name) is not None

    def value(self, name: str) -> object:
        """Return the field as it is; None if absent."""
        self._read.add(name)
        return self.table.get(name)

    def integer(self, *names: str, default: int | None = None, minimum: int = 1, maximum: int = MAX_SIZE) -> int:
        """Return the first of the fields that is there; without a default one must be."""
        for name in names:
            value = self.value(name)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
                raise self.error(name, f"is {reprlib.repr(value)}: needs a whole number from {minimum:,} to {maximum:,}")
            return value
        if default is None:
            raise self.error(" or ".join(names), f"is missing: needs a whole number from {minimum:,} to {maximum:,}")
        return default

    def number(self, name: str, *, maximum: float) -> float:
        """Return a number above 0."""
        value = self.value(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= maximum:
            raise self.error(name, f"is {reprlib.repr(value)}: needs a number above 0, up to {maximum:g}")
        return float(value)

    def flag(self, name: str, *, default: bool = False) -> bool:
        """Return true or false."""
        value = self.value(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(name, f"is {reprlib.repr(value)}: needs true or false")
        return value

    def text(self, *names: str, default: str = "") -> str:
        """Return the first of the fields that is there, a string."""
        for name in names:
            value = self.value(name)
            if value is None:
                continue
            if not isinstance(value, str):
                raise self.error(name, f"is {reprlib.repr(value)}: needs a string")
            return value
        return default

    def section(self, name: str) -> "ConfigFields | None":
        """Return a nested object, None if absent."""
        value = self.value(name)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            raise self.error(name, f"is {reprlib.repr(value)}: needs an object")
        return ConfigFields(value, where=f"{self.where}, {name}")

    def items(self, name: str) -> list[object] | None:
        """Return a list, None if absent."""
        value = self.value(name)
        if value is None:
            return None
        if not isinstance(value, list):
            raise self.error(name, f"is {reprlib.repr(value)}: needs a list")
        return value

    def per_layer(self, name: str, num_layers: int, *, spare: int = 0) -> list[object] | None:
        """Return a list with an entry for each layer, None if absent; `spare` more may follow, for drafting layers."""
        entries = self.items(name)
        if entries is None:
            return None
        if not num_layers <= len(entries) <= num_layers + spare:
            raise self.error(name, f"has {len(entries)} entries: needs one for each of {num_layers} layers")
        return entries[:num_layers]

    def choices(self, name: str, num_layers: int, known: Iterable[str]) -> list[str] | None:
        """Return a list with one of `known` for each layer, None if absent."""
        entries = self.per_layer(name, num_layers)
        allowed = list(known)
        names = []
        for entry in entries or ():
            if not isinstance(entry, str) or entry not in allowed:
                raise self.error(name, f"has {reprlib.repr(entry)}: needs one of {', '.join(allowed)}")
            names.append(entry)
        return None if entries is None else names

    def check_all_understood(self) -> None:
        """Refuse a field about attention that nothing read and that is not off (null, false, 0 or empty).

        Raises:
            ConfigError: With the field's name.
        """
        for name, value in self.table.items():
            if name in self._read or not value:
                continue
            if _ABOUT_ATTENTION.search(name) and not _HARMLESS.fullmatch(name):
                shown = reprlib.repr(value)
                raise self.error(name, f"is {shown}: a field about attention that is not understood for this architecture")
