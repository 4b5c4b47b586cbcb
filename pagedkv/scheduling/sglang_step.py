"""One step of SGLang's scheduler: who prefills, who decodes, who is retracted, and what follows when it is done."""

import numpy as np

from pagedkv.arrays import Int64Array
from pagedkv.errors import IntegrityError
from pagedkv.scheduling.radix_rows import RadixRows
from pagedkv.scheduling.requests import NO_ROW
from pagedkv.scheduling.sglang_prefill import PassLimits, Prefill, PrefillPass, Verdict
from pagedkv.scheduling.sglang_queue import REFRESH_INTERVAL, Permutation, refresh_prompts
from pagedkv.scheduling.sglang_request import SGLangRequest
from pagedkv.scheduling.sglang_requests import SGLangRequests
from pagedkv.scheduling.sglang_retraction import NewTokenRatio, fits_after_eviction, retract, slots_for_decode
from pagedkv.scheduling.sglang_settings import SGLangSettings
from pagedkv.scheduling.step import Blocker

NOBODY: Int64Array = np.zeros(0, np.int64)


class SGLangStep:
    """The batch and the decisions about it: `decide` fills `resumed`, `admitted`, `decoding`, `retracted`; `complete` applies them.

    As in SGLang, a request that a decode step finished counts as running until the next decode step, though it holds nothing any
    more, and a batch found full stays full until somebody leaves.
    """

    def __init__(self, settings: SGLangSettings, memory: RadixRows, permutation: Permutation | None) -> None:
        self.requests = SGLangRequests()
        self.ratio = NewTokenRatio(conservativeness=settings.schedule_conservativeness)
        self.free_rows = list(range(settings.max_running_requests))[::-1]
        self.resumed: list[Prefill] = []
        """The prompt in pieces, if it goes on."""
        self.admitted: list[Prefill] = []
        self.decoding: Int64Array = NOBODY
        """Indices of the requests that make a token."""
        self.num_drafts: Int64Array = NOBODY
        """Drafts that a decode step verifies, by place in `decoding`."""
        self.retracted: list[SGLangRequest] = []
        self.failed: list[SGLangRequest] = []
        """Those who were alone and still did not fit: they hold nothing and never come back."""
        self._settings, self._memory, self._permutation = settings, memory, permutation
        self._running: Int64Array = NOBODY  # in SGLang's order, just finished ones included
        self._half_done: SGLangRequest | None = None  # its prompt is computed in pieces
        self._full: Blocker | None = None  # why nobody is admitted before somebody leaves
        self._num_passes = 0

    @property
    def blocker(self) -> Blocker:
        """Why the head of the queue did not start in the step decided last."""
        if not self.requests.waiting:
            return Blocker.NONE
        if self.retracted or not (self.resumed or self.admitted or self.decoding.size):
            return Blocker.KV_MEMORY
        return self._full or Blocker.TOKEN_BUDGET

    @property
    def goes_on(self) -> bool:
        """Whether the same requests would decode in the next step, if they have slots and nobody comes or ends."""
        others = self.resumed or self.admitted or self.retracted or self.failed or self._half_done is not None
        return self.decoding.size > 0 and not others and (self._full is not None or not self.requests.waiting)

    def limits(self, num_mixed: int) -> PassLimits:
        """Return what bounds a prefill pass now."""
        memory = self._memory
        return self._settings.pass_limits(
            num_mixed=num_mixed,
            new_token_ratio=self.ratio.current,
            caches_prefixes=memory.enable_caching,
            state_slots=memory.state_units * memory.unit_slots,
        )

    def holders(self) -> Int64Array:
        """Return who holds memory: the running ones, the prompt in pieces, and who is admitted now."""
        rows = self.requests.arrays["row"]
        new = [prefill.request.index for prefill in (*self.resumed, *self.admitted)]
        if self._half_done is not None and not self.resumed and self._half_done.index not in new:
            new.append(self._half_done.index)
        return np.concatenate((self._running[rows[self._running] != NO_ROW], np.array(new, np.int64)))

    def decide(self) -> None:
        """Decide the next step and take its slots. Nobody is in it if the head of the queue cannot run though nobody else does."""
        self.resumed, self.admitted, self.decoding, self.retracted, self.failed = [], [], NOBODY, [], []
        while True:
            had_running = self._running.size > 0
            if self._prefill() or self._decode():
                return
            self.ratio.reset()  # SGLang's loop turns idly; in the next turn those who finished are gone
            if not had_running:
                self._full = None
                return

    def _prefill(self) -> bool:
        """Admit who fits and take their slots; return whether anybody prefills."""
        room = self._settings.max_running_requests - self._running.size
        if self._half_done is None:
            if self._full is not None or not self.requests.waiting:
                return False
            if room <= 0:
                self._full = Blocker.MAX_NUM_SEQS
                return False
        one = self._pass(room)
        if not one.admitted:
            return False
        self._take_up(one.admitted)
        if self._settings.enable_mixed_chunk:
            running = self._drop_finished()
            stored = self.requests.arrays["num_computed_tokens"][running]
            # Where decoding beside the prompts takes more than there is, SGLang fails; here the running ones wait for a step.
            if slots_for_decode(stored, self._memory.unit_slots) <= self._memory.free_slots:
                self._grow(running, stored + 1, wanted_slots=running.size * self._memory.unit_slots)
                self.decoding = running
        return True

    def _pass(self, room: int) -> PrefillPass:
        """Walk the queue; nobody is admitted if the prompt in pieces must go on and cannot."""
        requests, memory = self.requests, self._memory
        tree = memory.cache.tree if memory.enable_caching else None
        if tree is not None and memory.eviction == "lru" and self._num_passes % REFRESH_INTERVAL == 0:
            refresh_prompts(requests.waiting, tree)
        self._num_passes += 1
        running = requests.live(self._running)
        requests.sort(self._settings.schedule_policy, tree, running=running, permutation=self._permutation)
        one = PrefillPass(memory.cache, running, self.limits(self._running.size if self._settings.enable_mixed_chunk else 0))
        if (half_done := self._half_done) is not None:
            done, row = (int(requests.arrays[name][half_done.index]) for name in ("num_computed_tokens", "row"))
            # Nothing but the budgets limits it in SGLang, which fails if they are wrong; here it takes what there is.
            one.resume(half_done, done, requests.waiting, most=memory.room(row) - done)
            if not one.admitted:
                return one
        for request in requests.waiting:
            if one.is_spent:
                break
            if len(one.admitted) >= room:
                self._full = Blocker.MAX_NUM_SEQS
                break
            if (verdict := one.add(request)) is not Verdict.CONTINUE:
                if verdict is Verdict.NO_TOKEN:
                    self._full = Blocker.KV_MEMORY
                break
        return one

    def _take_up(self, prefills: list[Prefill]) -> None:
        """Give the requests of a pass rows and slots."""
        for prefill in prefills:
            if prefill.hit is None:
                self.resumed.append(prefill)
                continue
            self.admitted.append(prefill)
            row = self.free_rows.pop()
            self.requests.count_admission(prefill.request, row, prefill.start)
            self._memory.admit(row, prefill.hit)
        self.requests.take_up({prefill.request for prefill in self.admitted})
        self._half_done = next((prefill.request for prefill in prefills if prefill.chunked), None)
        indices = np.array([prefill.request.index for prefill in prefills], np.int64)
        num_new = sum(prefill.end - prefill.start for prefill in prefills)
        ends, block_size = np.array([prefill.end for prefill in prefills], np.int64), self._memory.unit_slots
        self._grow(indices, ends, wanted_slots=num_new + (indices.size * block_size if block_size > 1 else 0))
        self.requests.num_prefilled_tokens += num_new

    def _decode(self) -> bool:
        """Let every running request make a token, without those for whom there is no room; return whether anybody does."""
        num_before = self._running.size
        running = self._drop_finished()
        if running.size:
            memory, computed = self._memory, self.requests.arrays["num_computed_tokens"]
            per_step = 1 + self._settings.num_speculative_tokens
            if fits_after_eviction(memory.cache, slots_for_decode(computed[running], memory.unit_slots, per_step)):
                self.ratio.decay()
            else:
                running = self._running = self._retract(running)
            self.num_drafts = np.minimum(per_step - 1, self._settings.max_model_len - computed[running] - 1)
            ends = computed[running] + 1 + self.num_drafts
            self._grow(running, ends, wanted_slots=running.size * memory.unit_slots * per_step)
        if running.size < num_before:
            self._full = None
        self.decoding = running
        return running.size > 0

    def _retract(self, running: Int64Array) -> Int64Array:
        """Take requests out of the batch until the others fit; return these, in SGLang's order from then on."""
        live = self.requests.live(running)

        def release(place: int) -> None:
            row = int(self.requests.arrays["row"][live[place].index])
            self._memory.retract(row)
            self.free_rows.append(row)

        done = retract(
            self._memory.cache,
            num_prompt=np.array([request.num_prompt_tokens for request in live], np.int64),
            num_output=np.array([request.num_output_tokens for request in live], np.int64),
            max_new=np.array([request.max_new_tokens for request in live], np.int64),
            release=release,
            tokens_per_step=1 + self._settings.num_speculative_tokens,
        )
        self.ratio.current = done.new_token_ratio
        # SGLang aborts the last one if it is short. Where a prompt in pieces holds the rest, it can come again instead.
        failed, retracted = (done.aborted, done.retracted) if self._half_done is None else ([], done.retracted + done.aborted)
        self.retracted = [live[place] for place in retracted]
        for request in self.retracted:
            self.requests.put_back(request)
        self.failed = [self.requests.forget(live[place].index) for place in failed]
        return running[done.kept]

    def complete(self, num_accepted: Int64Array) -> tuple[Int64Array, Int64Array, int]:
        """Count the step's tokens as computed. Who is done gives its memory back; so do drafts that are not accepted.

        Args:
            num_accepted: Of the drafts of each who decodes.

        Returns:
            Who got output tokens, who of them is done, and how many tokens there were.
        """
        arrays, prefills, decoding = self.requests.arrays, [*self.resumed, *self.admitted], self.decoding
        for prefill in prefills:
            arrays["num_computed_tokens"][prefill.request.index] = prefill.end
        extra = self._accepted(num_accepted)
        arrays["num_computed_tokens"][decoding] += 1 + extra
        arrays["num_known_tokens"][decoding] += extra
        resumed, admitted = (_whole(part) for part in (self.resumed, self.admitted))
        sampled = np.concatenate((resumed, decoding, admitted))
        arrays["num_known_tokens"][sampled] += 1
        missing = arrays["prompt_tokens"][sampled] + arrays["output_tokens"][sampled] - arrays["num_known_tokens"][sampled]
        finished = sampled[missing == 0]
        done = set(finished.tolist())
        for prefill in prefills:
            if prefill.request.index not in done:
                self._store(prefill)
        for index in finished.tolist():
            self._finish(index)
        if self._settings.num_speculative_tokens:
            for index in decoding.tolist():
                if index not in done:
                    self._memory.shrink(int(arrays["row"][index]), int(arrays["num_computed_tokens"][index]))
        if prefills:
            self._merge(np.concatenate((resumed, admitted)), len(prefills))
        self.resumed, self.admitted, self.decoding = [], [], NOBODY
        if not self.requests.waiting and not self.holders().size:  # SGLang's loop turns idly from now on
            self._running, self._full = NOBODY, None
            self.ratio.reset()
        return sampled, finished, sampled.size + int(extra.sum())

    def _accepted(self, num_accepted: Int64Array) -> Int64Array:
        """Return how many tokens more than one each who decodes gets: no more than it has drafts, or still wants."""
        if not self._settings.num_speculative_tokens or not self.decoding.size:
            return np.zeros(self.decoding.size, np.int64)
        records = self.requests.arrays[self.decoding]
        wanted = records["prompt_tokens"] + records["output_tokens"] - records["num_known_tokens"] - 1
        extra: Int64Array = np.minimum(np.minimum(num_accepted, self.num_drafts), wanted)
        return extra

    def _merge(self, whole: Int64Array, num_prefills: int) -> None:
        """Let those whose prompts are computed, `whole` of `num_prefills`, run with the others."""
        joined = whole[self.requests.arrays["row"][whole] != NO_ROW]
        # Somebody has left, a prompt in pieces included, or the batch is a new one, and nobody has found that full.
        if joined.size < num_prefills or not self._running.size or self.decoding.size:
            self._full = None
        if self.decoding.size:  # they were one batch, prompts first
            self._running = np.concatenate((joined, self._drop_finished()))
        else:
            self._running = np.concatenate((self._running, joined))

    def _drop_finished(self) -> Int64Array:
        """Let those who are done leave the batch; return who is left."""
        self._running = self._running[self.requests.arrays["row"][self._running] != NO_ROW]
        return self._running

    def _grow(self, indices: Int64Array, num_tokens: Int64Array, *, wanted_slots: int) -> None:
        rows = self.requests.arrays["row"][indices]
        if not self._memory.grow(rows, num_tokens, wanted_slots=wanted_slots):
            raise IntegrityError(f"no room for {num_tokens.tolist()} tokens of requests {indices.tolist()}, which was promised")

    def _store(self, prefill: Prefill) -> None:
        request = prefill.request
        row = int(self.requests.arrays["row"][request.index])
        self._memory.store(row, request.tokens[: prefill.end], namespace=request.namespace, priority=request.priority)

    def _finish(self, index: int) -> None:
        row, num_tokens = (int(self.requests.arrays[name][index]) for name in ("row", "num_computed_tokens"))
        request = self.requests.forget(index)
        self._memory.finish(row, request.tokens[:num_tokens], namespace=request.namespace, priority=request.priority)
        self.free_rows.append(row)


def _whole(prefills: list[Prefill]) -> Int64Array:
    """Return the indices of those whose prompts are done with this step."""
    return np.array([prefill.request.index for prefill in prefills if not prefill.chunked], np.int64)
