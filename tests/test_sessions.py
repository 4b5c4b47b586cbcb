"""Conversations that grow: turn k + 1 finds in a cache what turn k was asked and what it answered, in every engine that has one."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from itertools import count, islice
from typing import NamedTuple

import numpy as np
import pytest
import simpy
from hypothesis import event, given, settings
from hypothesis import strategies as st

from pagedkv.allocation import KVPoolSettings
from pagedkv.block_hash import BlockHashChain
from pagedkv.scheduling.content import Segments, shared_segments
from pagedkv.scheduling.scheduler import Scheduler
from pagedkv.scheduling.scheduler_settings import SchedulerSettings
from pagedkv.scheduling.step import StepScheduler
from pagedkv.sims.config import ServingConfig
from pagedkv.sims.deployment import deploy
from pagedkv.sims.records import Outcome
from pagedkv.sims.token_lengths import SameLength, UniformLengths
from pagedkv.sims.user_class import Turns, UserClass
from pagedkv.sims.workload import Workload
from pagedkv.step_allocation import step_allocator

MAX_MODEL_LEN = 400


class Sent(NamedTuple):
    at_s: float
    prompt: int
    output: int
    user_class: int
    content: Segments


class Notebook:
    """An engine that notes who sent what, and when; it answers after `service_s`, or not at all."""

    def __init__(
        self, env: simpy.Environment, *, service_s: float = 0.5, refuses: int | None = None, fails: int | None = None
    ) -> None:
        self.env, self.service_s, self.refuses, self.fails = env, service_s, refuses, fails
        self.by_sender: dict[object, list[Sent]] = defaultdict(list)
        self.all: list[Sent] = []

    def submit(
        self, prompt_tokens: int, output_tokens: int, *, content: Segments, user_class: int = 0, model: int = 0
    ) -> simpy.Event | None:
        sent = Sent(self.env.now, prompt_tokens, output_tokens, user_class, content)
        self.all.append(sent)
        self.by_sender[self.env.active_process].append(sent)
        if len(self.all) - 1 == self.refuses:
            return None
        return self.env.timeout(self.service_s, Outcome.FAILED if len(self.all) - 1 == self.fails else None)


def talker(**changes: object) -> UserClass:
    fields: dict[str, object] = {
        "name": "talkers",
        "prompt": SameLength(tokens=10),
        "output": SameLength(tokens=6),
        "follow_up": SameLength(tokens=5),
        "turns": Turns(mean=3),
        "think_time_s": 0.0,
        "share": 1.0,
    }
    return UserClass(**fields | changes)  # type: ignore[arg-type]


def sent(
    *classes: UserClass,
    users: int | None = 1,
    until_s: float = 100.0,
    seed: int = 0,
    num_prompts: int | None = None,
    max_model_len: int = MAX_MODEL_LEN,
    drops: bool = False,
    **engine: int | float,
) -> Notebook:
    env = simpy.Environment()
    book = Notebook(env, **engine)  # type: ignore[arg-type]
    load = Workload(
        name="test",
        classes=classes,
        users=users,
        num_requests_asked=num_prompts,
        max_model_len=max_model_len,
        drops_over_length=drops,
    )
    load.start(env, book, seed=seed)  # type: ignore[arg-type]
    env.run(until=until_s)
    return book


def lengths(book: Notebook) -> list[tuple[int, int]]:
    return [(each.prompt, each.output) for each in book.all]


def first_turns(book: Notebook) -> list[Sent]:
    """Return the requests that begin a stream of their own, or have none."""
    seen, first = set[int](), []
    for each in book.all:
        stream = int(each.content["word_b"][-1]) if each.content.size else None
        if stream not in seen:
            first.append(each)
        if stream is not None:
            seen.add(stream)
    return first


def served(scheduler: StepScheduler, prompt: int, output: int, content: Segments) -> int:
    """Serve a request alone, to its end, and return how many tokens of it were found."""
    request = scheduler.add(prompt_tokens=prompt, output_tokens=output, content=content)
    assert request is not None
    while scheduler.num_running + scheduler.num_waiting:
        scheduler.schedule()
        scheduler.complete()
    return int(scheduler.requests.arrays["num_cached_tokens"][request])  # type: ignore[attr-defined]


def paged(block_size: int) -> Scheduler:
    pool = KVPoolSettings(
        num_blocks=6000 // block_size,
        block_size=block_size,
        max_num_seqs=4,
        max_model_len=MAX_MODEL_LEN,
        enable_prefix_caching=True,
    )
    limits = SchedulerSettings(max_num_seqs=4, max_num_batched_tokens=512, max_model_len=MAX_MODEL_LEN)
    return Scheduler(limits, step_allocator("paged", pool))


# --- what is sent ---------------------------------------------------------------------------------------------------


def test_each_turn_resends_what_was_asked_and_answered() -> None:
    book = sent(talker(system_prompt_tokens=100), until_s=2.9)
    # Turn 1: 100 + 10. Turn 2: that, the answer of 6, and 5 more. Turn 3 likewise. Then a new session.
    assert lengths(book) == [(110, 6), (121, 6), (132, 6), (110, 6), (121, 6), (132, 6)]
    assert [each.at_s for each in book.all] == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]


def test_content_reaches_to_the_end_of_the_answer_and_a_new_session_is_a_new_stream() -> None:
    first, second, third, other = (each.content for each in sent(talker(system_prompt_tokens=100), until_s=1.9).all)
    assert [c["end_token"].tolist() for c in (first, second, third, other)] == [[100, 116], [100, 127], [100, 138], [100, 116]]
    streams = [list(zip(c["word_a"].tolist(), c["word_b"].tolist(), strict=True)) for c in (first, second, third, other)]
    assert streams[0] == streams[1] == streams[2]
    assert streams[3][0] == streams[0][0]
    assert streams[3][1] != streams[0][1]


def test_who_asks_once_shares_no_more_than_the_system_prompt() -> None:
    alone, behind = sent(talker(turns=Turns(mean=1))).all[0], sent(talker(turns=Turns(mean=1), system_prompt_tokens=9)).all[0]
    assert alone.content.size == 0
    assert behind.content["end_token"].tolist() == [9]


def test_a_session_ends_before_a_turn_that_would_not_fit() -> None:
    # 16, 27, 38, 49 tokens: the fourth turn would be longer than 48.
    book = sent(talker(turns=Turns(mean=9)), max_model_len=48, until_s=2.9)
    assert lengths(book) == [(10, 6), (21, 6), (32, 6)] * 2


@pytest.mark.parametrize("drops", [False, True])
def test_a_first_request_that_is_too_long_is_sent_or_left_out(drops: bool) -> None:
    long = talker(prompt=UniformLengths(least=1, most=60), turns=Turns(mean=1))
    book = sent(long, max_model_len=40, drops=drops, until_s=50.0)
    assert len(book.all) > 20
    assert any(prompt + output > 40 for prompt, output in lengths(book)) is not drops


@pytest.mark.parametrize("trouble", ["refuses", "fails"])
def test_an_error_ends_the_session_and_costs_a_second(trouble: str) -> None:
    book = sent(talker(), until_s=4.0, **{trouble: 1})
    assert lengths(book)[:4] == [(10, 6), (21, 6), (10, 6), (21, 6)]
    waited_s = 1.0 + (0.5 if trouble == "fails" else 0.0)
    assert book.all[2].at_s == book.all[1].at_s + waited_s


def test_a_session_is_the_same_whatever_became_of_those_before_it() -> None:
    varied = talker(
        prompt=UniformLengths(least=1, most=50), output=UniformLengths(least=1, most=50), turns=Turns(mean=3, varies=True)
    )
    smooth = sent(varied)
    cut_short = next(i for i, each in enumerate(smooth.all) if each.content.size)
    bumpy = sent(varied, refuses=cut_short, service_s=0.1)
    assert bumpy.all[cut_short + 1].content.size != 1 or bumpy.all[cut_short + 1].prompt < smooth.all[cut_short + 1].prompt
    starts = [[(each.prompt, each.output) for each in first_turns(book)] for book in (smooth, bumpy)]
    same = min(len(starts[0]), len(starts[1]))
    assert same > 20
    assert starts[0][:same] == starts[1][:same]


def test_a_tool_runs_between_turns_and_a_person_thinks_between_sessions() -> None:
    book = sent(talker(think_time_s=50.0, tool_time_s=2.0, turns=Turns(mean=4)), users=40, until_s=5000.0)
    pauses: dict[bool, list[float]] = {True: [], False: []}
    for requests in book.by_sender.values():
        for before, after in zip(requests, requests[1:], strict=False):
            pauses[after.prompt == 10].append(after.at_s - before.at_s - 0.5)
    assert np.mean(pauses[True]) == pytest.approx(50.0, rel=0.05)
    assert np.mean(pauses[False]) == pytest.approx(2.0, rel=0.05)
    assert talker(think_time_s=50.0, tool_time_s=2.0, turns=Turns(mean=4)).mean_pause_s == pytest.approx((50 + 3 * 2) / 4)


def test_the_number_of_turns_is_geometric() -> None:
    book = sent(talker(turns=Turns(mean=3, varies=True)), until_s=8000.0, max_model_len=10**6)
    starts = np.array([i for i, each in enumerate(book.all) if each.prompt == 10])
    turns = np.diff(starts)
    assert turns.mean() == pytest.approx(3.0, rel=0.04)
    assert turns.var() == pytest.approx(3 * (3 - 1), rel=0.12)  # (1 - p) / p²
    assert turns.min() == 1


def test_num_prompts_ends_it_all() -> None:
    assert len(sent(talker(), users=7, num_prompts=17, until_s=1e6).all) == 17
    arriving = talker(share=None, request_rate_per_s=2.0)
    assert len(sent(arriving, users=None, num_prompts=17, until_s=1e6).all) == 17


def test_sessions_that_arrive_bring_the_requests_per_second_that_were_asked_for() -> None:
    book = sent(talker(share=None, request_rate_per_s=3.0, think_time_s=4.0), users=None, until_s=4000.0)
    assert len(book.all) / 4000.0 == pytest.approx(3.0, rel=0.04)
    first_gaps = np.diff([each.at_s for each in book.all if each.prompt == 10])
    assert first_gaps.mean() == pytest.approx(1.0, rel=0.05)  # three turns each
    assert first_gaps.std() == pytest.approx(first_gaps.mean(), rel=0.07)  # Poisson


def two_classes() -> tuple[UserClass, UserClass]:
    varied = UniformLengths(least=1, most=50)
    one = talker(prompt=varied, output=varied, turns=Turns(mean=3, varies=True), think_time_s=2.0, share=0.7, num_system_prompts=3)
    return replace(one, system_prompt_tokens=9), replace(one, name="others", share=0.3, tool_time_s=0.1)


def test_users_ask_the_same_of_a_fast_and_of_a_slow_engine() -> None:
    fast, slow = (sent(*two_classes(), users=10, service_s=s) for s in (0.0, 2.0))
    assert len(fast.all) > 1.3 * len(slow.all) > 100
    by_first = [{tuple(r[0][1:4]): [each[1:4] for each in r] for r in book.by_sender.values()} for book in (fast, slow)]
    assert by_first[0].keys() == by_first[1].keys()
    for first, asked in by_first[1].items():
        same = min(len(asked), len(by_first[0][first]))
        assert asked[:same] == by_first[0][first][:same]


def test_one_more_user_does_not_change_the_others() -> None:
    ten, eleven = ([(*each[:4], each.content.tobytes()) for each in sent(*two_classes(), users=n).all] for n in (10, 11))
    assert set(ten) < set(eleven)
    assert {each[3] for each in ten} == {0, 1}


def test_a_seed_is_the_requests() -> None:
    first, again, other = ([each[:4] for each in sent(*two_classes(), users=5, seed=seed).all] for seed in (3, 3, 4))
    assert first == again
    assert not set(first) & set(other)


def test_no_two_sessions_are_one_stream() -> None:
    arriving = replace(two_classes()[0], name="arriving", share=None, request_rate_per_s=5.0)
    book = sent(*two_classes(), arriving, users=10)
    heads = [each.content for each in book.all if each.content.size and each.content["end_token"][-1] == each.prompt + each.output]
    first = Counter(int(each.content["word_b"][-1]) for each in first_turns(book) if each.content.size)
    assert len({int(content["word_b"][-1]) for content in heads}) > 50
    assert max(first.values()) == 1


# --- what is found --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (5, 12),  # 10 + 5 tokens, of which the last was never computed: three blocks of 4
        (6, 12),  # 16, and 15 computed: the fourth block is not full
        (7, 16),  # 17, and 16 computed: it is, and its last tokens are the answer's
        (30, 36),
    ],
)
def test_turn_two_finds_the_full_blocks_of_question_and_answer(answer: int, found: int) -> None:
    scheduler = paged(4)
    book = sent(talker(output=SameLength(tokens=answer), turns=Turns(mean=2)), until_s=0.9)
    hits = [served(scheduler, each.prompt, each.output, each.content) for each in book.all]
    assert hits == [0, found]


def test_without_session_content_only_the_system_prompt_is_found() -> None:
    scheduler, system_prompt = paged(4), shared_segments(np.array([1]), np.array([8]))
    assert [served(scheduler, prompt, 6, system_prompt) for prompt in (18, 29)] == [0, 8]


ENGINES = {
    # name of the allocator, its settings, tokens that are found together
    "vllm": ("paged", {"block_size": 16}, 16),
    "sglang": ("radix", {}, 1),
    "sglang pages": ("radix", {"page_size": 4}, 4),
    "tensorrt-llm": ("tensorrt-llm", {"tokens_per_block": 4}, 1),  # part of a block is copied
    "llama-cpp": ("llama-cpp-unified", {}, 1),
    "ollama": ("ollama", {}, 1),
}


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_with_a_cache_finds_the_history(engine: str) -> None:
    allocator, flags, unit = ENGINES[engine]
    scheduler = deploy(ServingConfig(engine=engine.partition(" ")[0], **flags)).scheduler_over(allocator)  # type: ignore[arg-type]
    book = sent(talker(output=SameLength(tokens=60)), until_s=1.4)
    hits = [served(scheduler, each.prompt, each.output, each.content) for each in book.all]
    assert hits == [0, (10 + 60 - 1) // unit * unit, (75 + 60 - 1) // unit * unit]


def test_who_has_no_cache_computes_the_history_again() -> None:
    scheduler = deploy(ServingConfig(engine="orca")).scheduler_over("contiguous-max")
    book = sent(talker(), until_s=1.4)
    assert [served(scheduler, each.prompt, each.output, each.content) for each in book.all] == [0, 0, 0]


LENGTHS = st.builds(lambda a, b: UniformLengths(least=min(a, b), most=max(a, b)), st.integers(1, 40), st.integers(1, 40))
CLASSES = st.builds(
    lambda prompt, output, follow_up, turns, tokens, number: talker(
        prompt=prompt,
        output=output,
        follow_up=follow_up,
        turns=Turns(mean=turns),
        system_prompt_tokens=tokens,
        num_system_prompts=number,
    ),
    LENGTHS,
    LENGTHS,
    LENGTHS,
    st.integers(1, 4),
    st.sampled_from([0, 7, 32]),
    st.sampled_from([1, 2]),
)


@given(user_class=CLASSES, users=st.integers(1, 4), seed=st.integers(0, 99), block_size=st.sampled_from([1, 4, 5, 16]))
@settings(max_examples=60)
def test_sessions_hit_as_hashes_of_their_tokens_do(user_class: UserClass, users: int, seed: int, block_size: int) -> None:
    book = sent(user_class, users=users, seed=seed, until_s=3.9)
    by_stream, by_token = paged(block_size), paged(block_size)
    fresh = count()
    texts = {id(each): text for requests in book.by_sender.values() for each, text in _texts(requests, user_class, fresh)}
    for each in book.all:
        chain = BlockHashChain(block_size=block_size)
        chain.extend(np.array(texts[id(each)][: each.prompt + each.output - 1]))
        mine = by_stream.add(prompt_tokens=each.prompt, output_tokens=each.output, content=each.content)
        assert mine == by_token.add(prompt_tokens=each.prompt, output_tokens=each.output, keys=chain.keys)
        for scheduler in (by_stream, by_token):
            scheduler.schedule()
            scheduler.complete()
        found = [int(s.requests.arrays["num_hit_tokens"].sum()) for s in (by_stream, by_token)]
        assert found[0] == found[1]
    while by_stream.num_running + by_stream.num_waiting:
        for scheduler in (by_stream, by_token):
            scheduler.schedule()
            scheduler.complete()
    event(f"something was found: {found[0] > 0}")
    np.testing.assert_array_equal(by_stream.allocator.pool.free_queue(), by_token.allocator.pool.free_queue())  # type: ignore[attr-defined]


def _texts(requests: list[Sent], user_class: UserClass, fresh: Iterator[int]) -> list[tuple[Sent, list[int]]]:
    """Return each request of one user with its token ids, prompt and answer: told by the order of the requests, not by content."""
    texts, turns, history = [], int(user_class.turns.mean), list[int]()
    for i, each in enumerate(requests):
        if i % turns == 0:
            tokens = user_class.system_prompt_tokens
            which = int(each.content["word_b"][0] % 2) if tokens else 0
            history = [-1 - 1000 * which - k for k in range(tokens)]
        history = history + list(islice(fresh, each.prompt + each.output - len(history)))
        texts.append((each, history))
    return texts
