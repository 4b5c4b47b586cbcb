"""Who asks, and when: the same requests for every engine, with the moments that were asked for."""

from collections import defaultdict
from collections.abc import Callable, Generator, Iterable
from pathlib import Path

import numpy as np
import pytest
import simpy

from pagedkv.arrays import Float64Array, Int64Array
from pagedkv.scheduling.content import Contents, Segments
from pagedkv.sims.config import LoadConfig, MeasurementConfig, SimulationConfig
from pagedkv.sims.length_names import load_lengths
from pagedkv.sims.lengths import FileLengths, FixedLengths
from pagedkv.sims.load import ClosedLoop, Load, OpenLoop
from pagedkv.sims.scenario import resolve

Requests = list[tuple[float, int, int]]


class Answering:
    """An engine that answers each request after a time; it notes who sent what, and when."""

    def __init__(self, env: simpy.Environment, service_s: Callable[[int], float | None]) -> None:
        self.env, self.service_s = env, service_s
        self.by_sender: dict[object, Requests] = defaultdict(list)
        self.answered_s: dict[object, list[float]] = defaultdict(list)

    def submit(
        self, prompt_tokens: int, output_tokens: int, *, content: Segments | None = None, user_class: int = 0, model: int = 0
    ) -> simpy.Event | None:
        del content, user_class, model
        sender = self.env.active_process
        self.by_sender[sender].append((self.env.now, prompt_tokens, output_tokens))
        seconds = self.service_s(output_tokens)
        self.answered_s[sender].append(self.env.now + (seconds or 0.0))
        return None if seconds is None else self.env.timeout(seconds)

    def submit_all(
        self,
        arrival_s: Float64Array,
        prompt_tokens: Int64Array,
        output_tokens: Int64Array,
        *,
        contents: Contents | None = None,
        models: Int64Array | None = None,
    ) -> None:
        del contents, models
        self.env.process(self._arrive(zip(arrival_s.tolist(), prompt_tokens.tolist(), output_tokens.tolist(), strict=True)))

    def _arrive(self, rows: Iterable[tuple[float, int, int]]) -> Generator[simpy.Event, None, None]:
        for arrival_s, prompt, output in rows:
            if arrival_s > self.env.now:
                yield self.env.timeout(arrival_s - self.env.now)
            self.submit(prompt, output)


def sent(load: Load, *, service_s: Callable[[int], float | None] = lambda output: 0.0, until_s: float, seed: int = 0) -> Answering:
    env = simpy.Environment(initial_time=0.0)
    engine = Answering(env, service_s)
    load.start(env, engine, seed=seed)  # type: ignore[arg-type]
    env.run(until=until_s)
    return engine


def everything(engine: Answering) -> Requests:
    return sorted(request for requests in engine.by_sender.values() for request in requests)


def pauses_s(engine: Answering, *, with_first: bool = True) -> list[list[float]]:
    """Return what each sender waited before each of its requests, since the answer before it."""
    return [
        [r[0] - before for r, before in zip(requests, [0.0, *engine.answered_s[sender]], strict=False)][0 if with_first else 1 :]
        for sender, requests in engine.by_sender.items()
    ]


LENGTHS = load_lengths("azure-conv")
TEN_USERS = ClosedLoop(users=10, think_time_s=5.0, lengths=LENGTHS)


def test_a_closed_loop_asks_the_same_of_a_fast_and_of_a_slow_engine() -> None:
    fast = sent(TEN_USERS, until_s=500)
    slow = sent(TEN_USERS, service_s=lambda output: 0.05 * output, until_s=500)
    assert len(everything(fast)) > 1.5 * len(everything(slow)) > 300
    for quick, slow_requests in zip(fast.by_sender.values(), slow.by_sender.values(), strict=True):
        same = min(len(quick), len(slow_requests))
        assert [r[1:] for r in quick[:same]] == [r[1:] for r in slow_requests[:same]]
    for a, b in zip(sorted(pauses_s(fast)), sorted(pauses_s(slow)), strict=True):
        assert a[: min(len(a), len(b))] == pytest.approx(b[: min(len(a), len(b))], abs=1e-9)


def test_users_have_nothing_in_common() -> None:
    engine = sent(TEN_USERS, until_s=300)
    assert len({r[1:] for r in everything(engine)}) > 0.95 * len(everything(engine))
    assert len(engine.by_sender) == 10


def test_one_more_user_does_not_change_the_others() -> None:
    ten, eleven = (sent(ClosedLoop(users=n, think_time_s=5.0, lengths=LENGTHS), until_s=100) for n in (10, 11))
    assert set(everything(ten)) < set(everything(eleven))


def test_thinking_is_exponential() -> None:
    engine = sent(
        ClosedLoop(users=50, think_time_s=4.0, lengths=FixedLengths(input_len=9, output_len=9)),
        service_s=lambda output: 1.0,
        until_s=1000,
    )
    pauses = np.array([pause for each in pauses_s(engine) for pause in each])
    assert pauses.size > 9000
    assert pauses.mean() == pytest.approx(4.0, rel=0.03)
    assert pauses.std() == pytest.approx(4.0, rel=0.05)
    assert np.quantile(pauses, 0.5) == pytest.approx(4.0 * np.log(2), rel=0.05)


def test_who_is_rejected_comes_back_a_second_and_a_thought_later() -> None:
    load = ClosedLoop(users=1, think_time_s=0.0, lengths=FixedLengths(input_len=9, output_len=9))
    assert [r[0] for r in everything(sent(load, service_s=lambda output: None, until_s=4.5))] == [0.0, 1.0, 2.0, 3.0, 4.0]


def open_loop(**changes: float | int | None) -> OpenLoop:
    settings = {"request_rate_per_s": 5.0, "burstiness": 1.0, "num_requests": None} | changes
    return OpenLoop(lengths=LENGTHS, **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_gaps_have_the_moments_of_a_gamma_distribution(burstiness: float) -> None:
    times_s = np.array([r[0] for r in everything(sent(open_loop(burstiness=burstiness), until_s=4000))])
    gaps_s = np.diff(times_s, prepend=0.0)
    assert gaps_s.mean() == pytest.approx(1 / 5.0, rel=0.04)
    assert gaps_s.var() == pytest.approx(1 / 5.0**2 / burstiness, rel=0.1)


def test_an_open_loop_does_not_wait_for_answers() -> None:
    fast, slow = (everything(sent(open_loop(), service_s=lambda output, s=s: s, until_s=60)) for s in (0.0, 1e3))
    assert fast == slow
    assert len(fast) > 200


def test_an_open_loop_ends_after_num_prompts() -> None:
    assert len(everything(sent(open_loop(num_requests=17), until_s=1e6))) == 17
    assert everything(sent(open_loop(num_requests=17), until_s=1e6)) == everything(sent(open_loop(), until_s=1e3))[:17]


@pytest.mark.parametrize("load", [TEN_USERS, open_loop()], ids=["closed", "open"])
def test_a_seed_is_the_requests(load: Load) -> None:
    first, again, other = (everything(sent(load, until_s=60, seed=seed)) for seed in (3, 3, 4))
    assert first == again
    assert not set(first) & set(other)


@pytest.mark.parametrize("number", [60, None])
@pytest.mark.parametrize("limit", [1, 3, 10_000])
def test_a_client_has_so_many_under_way_and_sends_the_next_as_soon_as_one_is_answered(limit: int, number: int | None) -> None:
    def service_s(output: int) -> float:
        return 0.01 * output

    free, limited = (
        sent(open_loop(num_requests=number, max_concurrency=most), service_s=service_s, until_s=1e3 if number else 60.0)
        for most in (None, limit)
    )
    queue = simulated_queue(everything(free), limit, service_s)
    ours = everything(limited)
    assert [r[1:] for r in ours] == [r[1:] for r in queue[: len(ours)]], "in the order in which they were to be sent"
    assert [r[0] for r in ours] == pytest.approx([r[0] for r in queue[: len(ours)]], abs=1e-9)
    assert len(ours) == (number or sum(r[0] < 60.0 for r in queue))
    held_s = max(late[0] - asked[0] for late, asked in zip(ours, everything(free), strict=False))
    assert (held_s > 1e-9) == (limit < 10_000), "it is the limit that holds requests back"


def test_who_is_turned_away_holds_no_place() -> None:
    free, limited = (everything(sent(open_loop(max_concurrency=n), service_s=lambda output: None, until_s=20)) for n in (None, 1))
    assert free == limited


def simulated_queue(requests: Requests, limit: int, service_s: Callable[[int], float]) -> Requests:
    """Return when a queue with `limit` servers, first come first served, begins each request."""
    free_at_s, begun = [0.0] * limit, []
    for at_s, prompt, output in requests:
        place = min(range(limit), key=free_at_s.__getitem__)
        begun.append((max(at_s, free_at_s[place]), prompt, output))
        free_at_s[place] = begun[-1][0] + service_s(output)
    return begun


def test_a_file_in_order() -> None:
    rows = FileLengths(name="x", prompt_tokens=np.array([1, 2, 3]), output_tokens=np.array([7, 8, 9]), in_order=True)
    load = OpenLoop(request_rate_per_s=5.0, burstiness=1.0, num_requests=7, lengths=rows)
    prompts = [r[1] for r in everything(sent(load, until_s=1e3))]
    assert prompts == [1, 2, 3, 1, 2, 3, 1]


# Times that are no multiples of each other, two at once, and lengths that name their row.
TRACE_TEXT = "arrival_s,input_tokens,output_tokens\n100.125,1,9\n100.125,2,9\n103.3,3,9\n110.7000001,4,9\n"


@pytest.mark.parametrize(("rate", "prompts"), [(None, 4), (2.0, 4), (0.1, 3)])
def test_a_trace_is_replayed_to_the_digit(rate: float | None, prompts: int, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(TRACE_TEXT)
    load = LoadConfig(trace=str(tmp_path / "t.csv"), trace_rate=rate, num_prompts=prompts)
    replay = resolve(SimulationConfig(load=load, measurement=MeasurementConfig())).load
    expected = [
        ((t - 100.125) / (rate or 1.0), prompt, 9) for t, prompt in ((100.125, 1), (100.125, 2), (103.3, 3), (110.7000001, 4))
    ]
    requests = everything(sent(replay, until_s=1e3))
    assert [r[1:] for r in requests] == [r[1:] for r in expected[:prompts]]
    assert [r[0] for r in requests] == pytest.approx([r[0] for r in expected[:prompts]], abs=1e-9)
    assert replay.num_requests == prompts
    assert requests == everything(sent(replay, until_s=1e3, seed=99))


def test_a_trace_keeps_what_fits_or_all(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(TRACE_TEXT + "120,90000,9\n")

    def replayed(over_length: str) -> Requests:
        load = LoadConfig(trace=str(tmp_path / "t.csv"), over_length=over_length)  # type: ignore[arg-type]
        return everything(sent(resolve(SimulationConfig(load=load)).load, until_s=1e3))

    assert len(replayed("reject")) == 5
    assert replayed("drop") == replayed("reject")[:4]


def test_titles() -> None:
    assert ClosedLoop(users=1, think_time_s=1.0, lengths=LENGTHS).title == "1 user"
    assert ClosedLoop(users=1200, think_time_s=1.0, lengths=LENGTHS).title == "1,200 users"
    assert open_loop().title == "5 requests/s"
    assert open_loop(max_concurrency=25).title == "5 requests/s, at most 25 at once"
