"""A request as SGLang's scheduling rules see it: a record for compiled code, and an object for who has no scheduler."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from pagedkv.arrays import Int32Array
from pagedkv.scheduling.requests import REQUEST, RequestArrays

MAX_NEW_TOKENS_COUNTED = 4096
"""Of a request's future output, admission looks at no more than this. Source: SGLang 0.5.23 (CLIP_MAX_NEW_TOKENS)."""

SGLANG_REQUEST = np.dtype(
    [
        ("max_new_tokens", "<i8"),
        ("tie", "<i8"),
        ("arrival", "<i8"),
        ("prefilled_before", "<i8"),
        ("num_matched_tokens", "<i8"),
        ("node", "<i4"),
        ("namespace", "<i4"),
        ("routing", "<i4"),
        ("ignore_eos", "<i4"),
        ("late", "<i4"),
    ],
    align=True,
)
"""What SGLang's rules know of a request besides `REQUEST`; see `SGLangRequest`:

* max_new_tokens, ignore_eos, arrival, prefilled_before, num_matched_tokens; namespace: its number in the tree;
* tie: breaks ties under hrrn; routing: the place of its routing key among all, in their order; 0: it has none;
* node, late: where its match ended, and whether one before it begins alike, when the queue was last sorted by that.
"""

SGLangRecords: TypeAlias = npt.NDArray[np.void]
"""`SGLANG_REQUEST`, by request index."""


@dataclass(slots=True, eq=False, kw_only=True)
class SGLangRequest:
    """One request with its tokens. A scheduler has records in its place."""

    index: int
    """Its number."""
    name: str
    """Breaks ties under hrrn, as text."""
    tokens: Int32Array
    """Prompt and outputs, at least those known so far."""
    num_prompt_tokens: int
    num_output_tokens: int = 0
    """Generated so far."""
    max_new_tokens: int
    """Most that it may generate: what admission counts with, not what will come."""
    ignore_eos: bool = False
    """It generates all of them, whatever comes."""
    namespace: Hashable = None
    """Requests of different namespaces share nothing: SGLang's extra_key."""
    routing_key: str = ""
    """What groups requests under routing-key; empty: nothing."""
    arrival: int = 0
    """Its place in the order in which requests joined the queue."""
    prefilled_before: int = 0
    """Prompt tokens that the engine had computed, for anybody, when it joined the queue."""
    num_matched_tokens: int = 0
    """Of its tokens but the last, those that the cache had when the queue was last sorted by it."""

    @property
    def num_tokens(self) -> int:
        """Known tokens."""
        return self.num_prompt_tokens + self.num_output_tokens

    @property
    def known_tokens(self) -> Int32Array:
        """Prompt and outputs so far, a view."""
        return self.tokens[: self.num_tokens]


def records_of(requests: Sequence[SGLangRequest]) -> tuple[RequestArrays, SGLangRecords]:
    """Return the records of `requests`, by their places; of no namespace."""
    common, own = np.zeros(len(requests), REQUEST), np.zeros(len(requests), SGLANG_REQUEST)
    names, keys = sorted(request.name for request in requests), sorted({"", *(request.routing_key for request in requests)})
    for i, request in enumerate(requests):
        common["prompt_tokens"][i], common["num_known_tokens"][i] = request.num_prompt_tokens, request.num_tokens
        for name in ("max_new_tokens", "ignore_eos", "arrival", "prefilled_before", "num_matched_tokens"):
            own[name][i] = getattr(request, name)
        own["tie"][i], own["routing"][i] = names.index(request.name), keys.index(request.routing_key)
    return common, own
