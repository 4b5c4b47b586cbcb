"""What prompts are made of: the same ids in two prompts are the same tokens, so a cache can share them."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pagedkv.arrays import Int64Array
from pagedkv.scheduling.content import Contents, shared_segments


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PromptContent:
    """The prompts of a trace as ids, each of which stands for `tokens_per_id` tokens and for all tokens before them."""

    ids: Int64Array
    """The ids of all prompts, one prompt behind the other."""
    offsets: Int64Array
    """Where they begin, shape (prompts + 1,): prompt i is ids[offsets[i] : offsets[i + 1]]."""
    tokens_per_id: int
    """Tokens behind an id; the last one of a prompt stands for what is left."""

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def of(self, prompt: int) -> Int64Array:
        """Return the ids of one prompt, a view."""
        return self.ids[self.offsets[prompt] : self.offsets[prompt + 1]]

    def take(self, prompts: npt.NDArray[np.integer]) -> "PromptContent":
        """Return these prompts, in this order."""
        lengths = np.diff(self.offsets)[prompts]
        offsets = np.concatenate(([0], np.cumsum(lengths)))
        within = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
        ids = self.ids[np.repeat(self.offsets[prompts], lengths) + within]
        return PromptContent(ids=ids, offsets=offsets, tokens_per_id=self.tokens_per_id)

    def contents(self, prompt_tokens: Int64Array) -> Contents:
        """Return what requests with these prompts of so many tokens share, for any block size.

        An id that only one id ever follows goes on in it: a segment per fork on the way, not one per id. A block that two ids have
        part of counts as the later one's, so ids that differ never share it. O(ids log ids).
        """
        prompt = np.repeat(np.arange(len(self)), np.diff(self.offsets))
        within = np.arange(self.ids.size) - self.offsets[prompt]
        before = np.where(within == 0, -1, np.roll(self.ids, 1))
        _, firsts = np.unique(self.ids, return_index=True)
        parents, children = np.unique(before[firsts], return_counts=True)
        begins = np.flatnonzero((before == -1) | np.isin(before, parents[children > 1]))
        last = np.append(begins[1:], self.ids.size) - 1
        ends = np.minimum((within[last] + 1) * self.tokens_per_id, prompt_tokens[prompt[last]])
        bounds = np.searchsorted(begins, self.offsets)
        return Contents(shared_segments(self.ids[begins], ends), bounds[:-1], np.diff(bounds))
