"""What becomes of a step's logits: tokens of texts, further texts of one prompt, the next beams of a search."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from pagedkv.runtime.beam_search import BeamSearch, held_beams
from pagedkv.runtime.model_pair import Computed
from pagedkv.runtime.sampling import Sampler, sample
from pagedkv.runtime.texts import LENGTH, STOP, NewToken, Text
from pagedkv.runtime.verification import verify


@dataclass(frozen=True, slots=True)
class Sibling:
    """A further text, which goes on from what the prompt's request has computed."""

    parent: int
    """That request."""
    place: int
    """Which of its owner's texts."""
    sampler: Sampler
    token: int
    """Its first one."""


@dataclass(slots=True)
class TokenChoice:
    """What a step has come to. Numbers are the scheduler's."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    """By request that gets some: its new tokens; of a beam one, which is not its own if another beam takes its place."""
    held: list[int] = field(default_factory=list)
    """Entries of beams that wait for the others of their search: they get none."""
    siblings: list[Sibling] = field(default_factory=list)
    searches: list[tuple[BeamSearch, list[int]]] = field(default_factory=list)
    """Searches that go on, and by beam which of the beams before it continues."""
    ending: list[int] = field(default_factory=list)
    """Requests that end now, though they were to have more tokens."""
    over: list[int] = field(default_factory=list)
    """Beams of searches that are over."""
    told: list[NewToken] = field(default_factory=list)
    """Tokens of texts that have no request: those that end with their first one, and what searches have found."""


def choose_tokens(texts: Sequence[Text], requests: Sequence[int], computed: Computed) -> TokenChoice:
    """Choose what follows each text whose known tokens are computed.

    Args:
        texts: By entry of the step.
        requests: By entry.
        computed: What its model said.
    """
    entries, drafts, logits = computed
    searches = [texts[i].search for i in entries]
    held = held_beams(searches)
    choice = TokenChoice(held=[i for i, waits in zip(entries, held, strict=True) if waits])
    plain = [k for k, search in enumerate(searches) if search is None]
    beams = [k for k, search in enumerate(searches) if search is not None and not held[k]]
    rows = logits if len(plain) == len(entries) else logits[plain]  # beams have no drafts, nor has anybody beside them
    verified = verify(rows, [drafts[k] for k in plain], [texts[entries[k]].sampler for k in plain])
    chosen: dict[int, list[int]] = {}
    row = 0
    for k, new in zip(plain, verified, strict=True):
        text, request = texts[entries[k]], requests[entries[k]]
        text.draft_lag = int(0 < len(drafts[k].tokens) == len(new) - 1)
        chosen[request] = _first_tokens(choice, text, request, new[0], rows[row]) if text.siblings else text.cut(new)
        if chosen[request][-1] in text.ends:
            choice.ending.append(request)
        row += len(drafts[k].tokens) + 1
    chosen |= _next_beams(choice, [(texts[entries[k]], requests[entries[k]], k) for k in beams], logits)
    choice.tokens = {requests[i]: chosen[requests[i]] for i in entries if requests[i] in chosen}
    return choice


def _first_tokens(choice: TokenChoice, text: Text, request: int, token: int, row: torch.Tensor) -> list[int]:
    """Choose the first tokens of all texts of a prompt; return that of the one which keeps the request."""
    siblings = [*text.siblings.values()]
    samplers = {text.place: text.sampler, **text.siblings}
    tokens = dict(zip(samplers, [token, *sample(row.expand(len(siblings), -1), siblings)], strict=True))
    text.siblings = {}
    reasons = {place: text.reason(each, text.chain.num_tokens + 1) for place, each in tokens.items()}
    kept = next((place for place, reason in reasons.items() if reason is None), text.place)
    text.place, text.sampler = kept, samplers[kept]
    for place, reason in reasons.items():
        if place == kept:
            continue
        if reason is None:
            choice.siblings.append(Sibling(request, place, samplers[place], tokens[place]))
        else:
            choice.told.append(NewToken(text.owner, tokens[place], reason, place))
    return [tokens[kept]]


def _next_beams(choice: TokenChoice, beams: list[tuple[Text, int, int]], logits: torch.Tensor) -> dict[int, list[int]]:
    """Let searches go on whose beams, (text, request, row of `logits`) each, are all there."""
    found: dict[int, dict[int, tuple[Text, int]]] = {}
    chosen: dict[int, list[int]] = {}
    for text, request, row in beams:
        found.setdefault(id(text.search), {})[request] = text, row
    for group in found.values():
        text = next(iter(group.values()))[0]
        search = text.search
        assert search is not None
        parents = search.advance(logits[[group[member][1] for member in search.members]])
        if parents is not None:
            choice.searches.append((search, parents))
        else:
            choice.over += search.members
            choice.ending += search.members
            for place, best in enumerate(search.finished[: text.num_results]):
                reason = STOP if best.tokens[-1] in search.ends else LENGTH
                choice.told += [NewToken(text.owner, token, None, place) for token in best.tokens[:-1]]
                choice.told.append(NewToken(text.owner, best.tokens[-1], reason, place, best.score))
        chosen |= {member: [0] for member in search.members}
    return chosen
