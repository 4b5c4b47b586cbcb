"""Which texts are being generated, and what the scheduler must know when they go on, fork or end."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from pagedkv.block_hash import BlockHashChain
from pagedkv.errors import ConfigError
from pagedkv.runtime.beam_search import BeamSearch
from pagedkv.runtime.step_observer import StepObserver
from pagedkv.runtime.texts import NewToken, Text
from pagedkv.runtime.token_choice import Sibling, TokenChoice
from pagedkv.scheduling.requests import NO_ROW
from pagedkv.scheduling.scheduler import Scheduler


class TextTable:
    """The texts of a scheduler's requests that are not done, by the scheduler's numbers."""

    def __init__(self, scheduler: Scheduler, fork_state: Callable[[int, int], None]) -> None:
        """Let `fork_state(row, child_row)` copy what a row of the running batch keeps besides blocks."""
        self._scheduler, self._fork_state = scheduler, fork_state
        self._texts: dict[int, Text] = {}

    def __len__(self) -> int:
        """Return how many there are; beams count as one each."""
        return len(self._texts)

    def __getitem__(self, request: int) -> Text:
        """Return the text of a request."""
        return self._texts[request]

    def add(self, request: int, text: Text) -> None:
        """Let `request`, which the scheduler has, generate `text`."""
        self._texts[request] = text

    def abort(self, owner: int, place: int | None = None) -> bool:
        """Take all texts of `owner` out, running or waiting, or the one at `place`; return whether there were any.

        O(texts + running + waiting).

        Raises:
            ConfigError: If that is one of a search, whose beams are no texts before it is over.
        """
        texts = {request: text for request, text in self._texts.items() if text.owner == owner}
        if place is not None:
            if any(text.search is not None for text in texts.values()):
                raise ConfigError(f"text {place} of request {owner} is one of a beam search: abort the request")
            for text in texts.values():  # one that has not forked yet stands for its siblings
                if text.siblings.pop(place, None) is not None:
                    return True
                if text.place == place and text.siblings:
                    text.become_sibling()
                    return True
        requests = [request for request, text in texts.items() if place in (None, text.place)]
        for request in requests:
            del self._texts[request]
            self._scheduler.abort(request)
        return bool(requests)

    def renumber(self, new: dict[int, int]) -> dict[int, int]:
        """Take the scheduler's new numbers by its old ones; return the owners' likewise. O(texts)."""
        owners: dict[int, int] = {}
        for old, text in self._texts.items():  # an owner whose own request is done gets the number of another of its texts
            if text.owner == old or text.owner not in owners:
                owners[text.owner] = new[old]
        for text in self._texts.values():
            text.owner = owners[text.owner]
        for search in self._searches():
            search.members = [new[old] for old in search.members]
        self._texts = {new[old]: text for old, text in self._texts.items()}
        return owners

    def apply(self, choice: TokenChoice, observer: StepObserver | None) -> list[NewToken]:
        """Let a step's tokens be known, once the scheduler has completed it, and fork what goes on in several ways."""
        new, prompts = choice.told, {}
        for each in choice.siblings:
            if each.parent not in prompts:
                prompts[each.parent] = self._texts[each.parent], self._texts[each.parent].chain.copy()
        for request, tokens in choice.tokens.items():
            if self._texts[request].search is None:
                new = new + self._append(request, tokens)
        new = new + [self._fork_sibling(each, *prompts[each.parent], observer) for each in choice.siblings]
        for request in choice.over:
            del self._texts[request]
        for search, parents in choice.searches:
            self._continue(search, parents, observer)
        return new

    def untangle(self) -> None:
        """Let all beams wait, search behind search: each lacks some that find no room, and those that run hold it for good.

        What is at the head of the queue then has the pool for itself, and is known to fit.
        """
        running = set(self._scheduler.arrays.running[: self._scheduler.num_running].tolist())
        for search in reversed(self._searches()):
            if not running.isdisjoint(search.members):
                self._scheduler.requeue(search.members)

    def _searches(self) -> list[BeamSearch]:
        """Return the searches, in order of their beginning."""
        return list({id(text.search): text.search for text in self._texts.values() if text.search is not None}.values())

    def _append(self, request: int, tokens: list[int]) -> list[NewToken]:
        text = self._texts[request]
        owner, place = text.owner, text.place
        reason = text.reason(tokens[-1], text.chain.num_tokens + len(tokens))
        if reason is None:
            self._extend(request, tokens)
        else:
            text.chain.extend(tokens)
            del self._texts[request]
        return [*(NewToken(owner, token, None, place) for token in tokens[:-1]), NewToken(owner, tokens[-1], reason, place)]

    def _extend(self, request: int, tokens: Sequence[int]) -> None:
        """Let `tokens` of a text that goes on be known; with them keys of blocks may be."""
        chain = self._texts[request].chain
        num_keys = len(chain.keys)
        chain.extend(tokens)
        if self._scheduler.caches_prefixes and len(chain.keys) > num_keys:
            self._scheduler.add_keys(request, chain.keys[num_keys:])

    def _fork_sibling(self, sibling: Sibling, text: Text, prompt: BlockHashChain, observer: StepObserver | None) -> NewToken:
        chain = prompt.copy()
        chain.extend([sibling.token])
        child = self._fork(sibling.parent, chain, None, observer)
        self._texts[child] = replace(text, place=sibling.place, chain=chain, sampler=sibling.sampler, siblings={})
        return NewToken(text.owner, sibling.token, None, sibling.place)

    def _fork(self, parent: int, chain: BlockHashChain, request: int | None, observer: StepObserver | None) -> int:
        """Let a new request, or `request`, a beam that is dropped, go on as `chain` from what `parent` has computed."""
        keys = chain.keys if self._scheduler.caches_prefixes else None
        if request is None:
            request = self._scheduler.fork(parent, keys=keys)
        else:
            self._scheduler.take_over(request, parent, keys=keys)
        rows = self._scheduler.requests.arrays["row"]
        if rows[request] != NO_ROW:  # who waits computes all anew
            self._fork_state(int(rows[parent]), int(rows[request]))
        if observer is not None:
            observer.forked(parent, request)
        return request

    def _continue(self, search: BeamSearch, parents: list[int], observer: StepObserver | None) -> None:
        """Let beams go on from beams `parents`: the first from each in its place, others in those of beams that are dropped."""
        before = search.members
        dropped = [member for beam, member in enumerate(before) if beam not in parents]
        copies = {beam: self._texts[before[parent]].chain.copy() for beam, parent in enumerate(parents) if parent in parents[:beam]}
        search.members = [before[parent] for parent in parents]
        for beam, parent in enumerate(parents):
            token = search.texts[beam][-1]
            if beam not in copies:
                self._extend(before[parent], [token])
                continue
            copies[beam].extend([token])
            member = self._fork(before[parent], copies[beam], dropped.pop() if dropped else None, observer)
            self._texts[member] = replace(self._texts[before[parent]], chain=copies[beam])
            search.members[beam] = member
