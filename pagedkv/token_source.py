"""Where the tokens of a request come from, for compiled code that compares them: a version for each kind of source.

A kind is a NamedTuple, `source`. Nobody has to hold all tokens of a request as an array: they are asked for block by block.
"""

from typing import Any, NamedTuple

from pagedkv.arrays import Int32Array
from pagedkv.jit import by_kind, lean_jit


@by_kind
def write_tokens(source: Any, first: int, last: int, tokens: Int32Array) -> Any:
    """Write tokens `first` to `last` (exclusive) to the beginning of `tokens`."""


class GivenTokens(NamedTuple):
    """Tokens that are there."""

    token_ids: Int32Array


@write_tokens.register(GivenTokens)
@lean_jit
def _write_given(source: GivenTokens, first: int, last: int, tokens: Int32Array) -> None:
    for i in range(first, last):
        tokens[i - first] = source.token_ids[i]
