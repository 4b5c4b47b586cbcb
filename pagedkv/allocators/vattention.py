"""vAttention's allocator: a request's tokens are contiguous in virtual memory, and pages are mapped behind them as they come.

Kernels need no block table. The price is large pages, and calls of the driver that map them.

Source: Prabhu et al., "vAttention: Dynamic Memory Management for Serving LLMs without PagedAttention", ASPLOS 2025, and
microsoft/vattention.
"""

from collections.abc import Sequence

import numpy as np

from pagedkv.allocation import Grant, KVPoolSettings
from pagedkv.allocators import ALLOCATORS
from pagedkv.arrays import NO_SLOTS, Int64Array
from pagedkv.block_table import block_slots
from pagedkv.errors import ConfigError, IntegrityError
from pagedkv.kv_request import KVRequest
from pagedkv.virtual_pages import MappingCounts, VirtualPages

_TOKENS_AHEAD = 10
"""How far `manage_pages` looks ahead. Source: EAGER_NUM_STEPS in vattention.cu."""
_PAGES_AHEAD = 2
"""Where it stops looking. Source: EAGER_NUM_KVBLOCKS in vattention.cu."""


@ALLOCATORS.register("vattention")
class VAttentionAllocator:
    """Rows of max_model_len tokens, rounded up to pages of `page_tokens` slots; slot = physical page * page_tokens + offset.

    The pool is num_slots // page_tokens pages; the slots left over are not usable. A request holds the pages that its tokens reach
    into. Pages mapped beyond that, behind a running request or an idle row, are free: whoever needs them gets them. The state of a
    request lies in the first pages of its row.
    """

    name = "vattention"
    placement = "page"
    num_groups = 1
    rounding_slots = 0

    def __init__(self, settings: KVPoolSettings) -> None:
        self.unit_slots = settings.page_tokens
        num_pages = settings.num_slots // settings.page_tokens
        if not num_pages:
            raise ConfigError(
                f"a pool of {settings.num_slots} slots holds no page of {settings.page_tokens} tokens: needs page-tokens of "
                f"{settings.num_slots} or less"
            )
        self.state_pages = self._pages_for(settings.state_slots)
        self.pages = VirtualPages(
            num_pages=num_pages,
            num_rows=settings.max_num_seqs,
            pages_per_row=self.state_pages + self._pages_for(settings.max_model_len),
        )
        self.num_slots = settings.num_slots
        self.usable_slots = num_pages * settings.page_tokens
        self.max_model_len = settings.max_model_len
        self.max_num_seqs = settings.max_num_seqs
        self.state_slots = self.state_pages * settings.page_tokens
        self.watermark_pages = int(settings.watermark * num_pages)
        self.reserve_full_isl = settings.reserve_full_isl
        self._rows: dict[KVRequest, int] = {}
        """By live request: its row."""

    @property
    def counts(self) -> MappingCounts:
        """Pages mapped and unmapped so far."""
        return self.pages.counts

    def admission_slots(self, prompt_tokens: int, output_tokens: int) -> int | None:
        """Return 0, or None if it is longer than a row or even the empty pool is too small."""
        tokens = prompt_tokens + output_tokens - 1
        fits = tokens <= self.max_model_len and self._pages_needed(tokens) <= self.pages.num_pages
        return 0 if fits else None

    def get_computed_tokens(self, request: KVRequest) -> int:
        """Return 0: nothing is shared."""
        return 0

    def allocate_slots(self, request: KVRequest, num_new_tokens: int, *, has_scheduled_reqs: bool = False) -> Grant | None:
        """Map pages as tokens come. O(pages mapped); O(max_num_seqs) at admission and when mapped pages must be reclaimed.

        An admission gets the row that has just enough pages mapped already. It must leave the watermark free while something runs;
        growth is refused only if it needs a page and none is free.

        Raises:
            ConfigError: If the tokens go beyond max_model_len, or all rows are taken.
        """
        request.check_known(max_model_len=self.max_model_len, num_keys=0)
        request.check_slots(num_new_tokens=num_new_tokens, num_slots_held=self.num_slots_held(request))
        tokens = request.num_computed_tokens + num_new_tokens
        request.check_length(tokens, self.max_model_len)
        needed, row = self._pages_needed(tokens), self._rows.get(request)
        if row is None:
            request.check_place(len(self._rows), self.max_num_seqs)
            gated = max(needed, self._pages_needed(request.num_tokens)) if self.reserve_full_isl else needed
            if gated + (self.watermark_pages if has_scheduled_reqs else 0) > self.pages.free_pages:
                return None
            row = self.pages.best_row(needed)
            assert row is not None  # fewer than max_num_seqs requests live
        if not self.pages.need(row, needed):
            return None
        self._rows[request] = row
        return Grant()

    def premap(self, request: KVRequest, num_tokens: int) -> int:
        """Map unmapped pages for the next `num_tokens` tokens of `request`, between steps; return how many: all or none.

        Raises:
            ConfigError: If the request holds nothing, or `num_tokens` is below 1; nothing has changed then.
        """
        if request not in self._rows:
            raise request.holds_nothing()
        if num_tokens < 1:
            raise request.error(f"cannot map pages for {num_tokens} tokens: the number must be 1 or more")
        return self.pages.map_ahead(self._rows[request], self._num_missing(request, num_tokens))

    def manage_pages(self) -> None:
        """Do what vAttention's background thread does while a step computes. O(max_num_seqs).

        Every request gets the page of its next token, reclaimed if need be; if they cannot all be had, none is mapped. Then pages
        are mapped for the token after that, and so on up to the tenth, until 2 are mapped. If no next token needed a page, one page
        of an idle row is unmapped.
        """
        near_the_end = [request for request in self._rows if self._num_missing(request, _TOKENS_AHEAD)]
        near_the_end.sort(key=self._rows.__getitem__)
        due = sum(self._num_missing(request, 1) for request in near_the_end)
        self.pages.reclaim(due)
        if due <= self.pages.num_unmapped:
            mapped = sum(self.premap(request, 1) for request in near_the_end)
            for tokens in range(2, _TOKENS_AHEAD + 1):
                for request in near_the_end:
                    if mapped < _PAGES_AHEAD:
                        mapped += self.premap(request, tokens)
        if not due:
            self.pages.unmap_idle_page()

    def note_computed(self, request: KVRequest) -> None:
        """Nothing is kept for others."""

    def free(self, request: KVRequest) -> None:
        """Make its row idle: its pages stay mapped, and are free. O(1).

        Raises:
            ConfigError: If it has none.
        """
        if request not in self._rows:
            raise request.holds_nothing()
        self.pages.release(self._rows.pop(request))

    def preempt(self, request: KVRequest) -> None:
        """Make its row idle; it will start anew."""
        self.free(request)
        request.num_computed_tokens = 0

    def live_requests(self) -> Sequence[KVRequest]:
        """Return the requests that have a row."""
        return tuple(self._rows)

    def num_slots_held(self, request: KVRequest) -> int:
        """Return the slots of the pages that its tokens reach into."""
        row = self._rows.get(request)
        return 0 if row is None else (int(self.pages.arrays.num_needed[row]) - self.state_pages) * self.unit_slots

    def slots_held(self, request: KVRequest, group: int = 0) -> Int64Array:
        """Return the physical slots of those pages."""
        row = self._rows.get(request)
        if row is None:
            return NO_SLOTS
        return block_slots(self.pages.arrays.table[row, self.state_pages : self.pages.arrays.num_needed[row]], self.unit_slots)

    def cached_slots(self) -> Int64Array:
        """Return none: what a mapped page held before is of no use to another request."""
        return NO_SLOTS

    @property
    def num_cached_slots(self) -> int:
        """None: see `cached_slots`."""
        return 0

    @property
    def free_slots(self) -> int:
        """Slots of pages that no request needs, mapped ones included."""
        return self.pages.free_pages * self.unit_slots

    def check_integrity(self) -> None:
        """Raise IntegrityError unless pages have one place each and exactly the live requests' rows are in use."""
        self.pages.check_integrity()
        if sorted(self._rows.values()) != np.flatnonzero(self.pages.arrays.num_needed).tolist():
            raise IntegrityError(
                f"requests have rows {sorted(self._rows.values())}, which need {self.pages.arrays.num_needed.tolist()} pages"
            )

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self.unit_slots)

    def _pages_needed(self, tokens: int) -> int:
        return self.state_pages + self._pages_for(tokens)

    def _num_missing(self, request: KVRequest, num_tokens: int) -> int:
        """Return the pages not mapped yet behind the next `num_tokens` tokens, as far as max_model_len."""
        tokens = min(request.num_computed_tokens + num_tokens, self.max_model_len)
        return max(self._pages_needed(tokens) - int(self.pages.arrays.num_mapped[self._rows[request]]), 0)
