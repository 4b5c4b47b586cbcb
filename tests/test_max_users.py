"""The largest number of users, and the longest context: each fits when it is run, and the next does not."""

import io
import json
import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from pagedkv.sims.attainment import attained, terms
from pagedkv.sims.bisection import largest
from pagedkv.sims.capacity_answer import CapacityAnswer
from pagedkv.sims.cli import main
from pagedkv.sims.command import changed
from pagedkv.sims.config import ATTAIN, LoadConfig, MeasurementConfig, ServingConfig, SimulationConfig
from pagedkv.sims.console_capacity import show_max_users
from pagedkv.sims.max_context import max_context
from pagedkv.sims.max_users import max_users
from pagedkv.sims.probe import probe
from pagedkv.sims.results import simulate
from pagedkv.sims.scenario import resolve

TINY = SimulationConfig(
    load=LoadConfig(think_time="1s", random_input_len=400, random_output_len=60, random_range_ratio=0.5),
    serving=ServingConfig(hardware="rtx-4090", num_gpu_blocks_override=200, max_model_len=1024),
    measurement=MeasurementConfig(duration="20s", warmup="4s", goodput=("ttft:400", "tpot:40")),
)
FLAGS = (
    "--think-time 1s --random-input-len 400 --random-output-len 60 --random-range-ratio 0.5 --hardware rtx-4090 "
    "--num-gpu-blocks-override 200 --max-model-len 1024 --duration 20s --warmup 4s"
)
SAME_LENGTH = changed(TINY, random_input_len=None, random_output_len=60, random_range_ratio=None, max_model_len=None)


@cache
def answer(config: SimulationConfig, allocator: str) -> CapacityAnswer:
    """What `max_users` finds, found once."""
    return max_users(config, allocator, attain=ATTAIN)


# --- the search itself ----------------------------------------------------------------------------------------------


@given(first=st.integers(1, 9), most=st.integers(1, 5000), limit=st.integers(0, 6000))
def test_the_search_finds_the_limit_in_logarithmic_time(first: int, most: int, limit: int) -> None:
    if most < first:
        return
    tried: list[int] = []

    def passes(value: int) -> bool:
        tried.append(value)
        return value <= limit

    found = largest(passes, first=first, most=most)
    assert found.good == max(min(limit, most), first - 1)
    assert found.bad == (None if found.good == most else found.good + 1)
    assert all(first <= value <= most for value in tried)
    assert len(tried) <= 2 * most.bit_length() + 2


@given(limit=st.integers(1, 10**6), resolution=st.floats(0.001, 0.2))
def test_a_coarse_search_is_as_exact_as_it_says(limit: int, resolution: float) -> None:
    found = largest(lambda value: value <= limit, most=10**7, resolution=resolution)
    assert found.bad is not None
    assert found.good <= limit < found.bad
    assert found.bad - found.good <= max(1, resolution * found.good)


def test_what_passes_above_the_answer_is_reported() -> None:
    assert largest(lambda value: value <= 40 or value == 43, most=1000, guard=True).above == (43,)
    assert largest(lambda value: value <= 40, most=1000, guard=True).above == ()


# --- users ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("goals", [TINY.measurement.goodput, ()], ids=["goals", "no goals"])
@pytest.mark.parametrize("allocator", ["paged", "contiguous-max", "contiguous-oracle"])
def test_it_fits_by_the_verdict_and_one_more_does_not(allocator: str, goals: tuple[str, ...]) -> None:
    config = changed(TINY, goodput=goals)
    found = answer(config, allocator)
    assert found.value > 1
    assert found.interval == (found.value, found.value + 1)
    assert not found.anomalies
    low, high = found.calibration_interval
    assert high is not None
    assert low <= found.value <= high
    for off_by, most in ((1.0, low), (-1.0, high)):
        once = [probe(changed(config, users=users), allocator, attain=ATTAIN, off_by=off_by).fits for users in (most, most + 1)]
        assert once == [True, False]
    by_value = {row.value: row for row in found.tried}
    assert by_value[found.value].fits
    assert not by_value[found.value + 1].fits
    for users in (found.value, found.value + 1):
        result = simulate(resolve(changed(config, users=users, allocator=(allocator,)))).by_allocator[allocator]
        assert result.verdict.fits == by_value[users].fits
    assert found.binding == probe(changed(config, users=found.value + 1), allocator, attain=ATTAIN).verdict.binding


@pytest.mark.parametrize("repeats", [1, 3])
def test_the_share_is_the_one_the_verdict_judges_by(repeats: int) -> None:
    for users in (8, 10, 12):
        scenario = resolve(changed(TINY, users=users, allocator=("paged",), repeats=repeats))
        result = simulate(scenario).by_allocator["paged"]
        share = attained(result.runs, scenario.goals)
        assert share is not None
        assert f"{share:.1%} of requests meet the goals" in result.verdict.text
        assert (share >= ATTAIN) == result.verdict.fits
        assert share <= min(term.attained or 0.0 for term in terms(result.runs, scenario.goals, attain=ATTAIN))


@pytest.mark.parametrize("attain", [0.5, 0.9])
def test_the_verdict_judges_by_the_share_that_is_wanted(attain: float) -> None:
    probes = [probe(changed(TINY, users=users), "paged", attain=attain) for users in range(8, 16)]
    shares = [found.attained for found in probes]
    assert all(share is not None for share in shares)
    assert [found.verdict.fits for found in probes] == [share >= attain for share in shares if share is not None]
    assert any(share is not None and attain <= share < ATTAIN for share in shares)
    for found in probes:
        assert found.fits == found.verdict.fits == ("do not fit" not in found.verdict.text)


def test_paging_serves_more() -> None:
    paged, contiguous = (answer(TINY, name).value for name in ("paged", "contiguous-max"))
    assert paged > contiguous


def test_what_the_allocators_of_the_configuration_are_does_not_matter() -> None:
    other = changed(TINY, allocator=("contiguous-pow2",))
    assert max_users(other, "paged", attain=ATTAIN) == answer(TINY, "paged")


def test_a_lower_share_lets_more_in() -> None:
    values = [max_users(TINY, "paged", attain=attain).value for attain in (0.5, 0.9, 0.99, 1.0)]
    assert values == sorted(values, reverse=True)
    assert values[0] > values[-1]


def test_preemption_sets_in_where_it_says() -> None:
    found = answer(TINY, "paged")
    assert found.preemption_from is not None
    for row in found.tried:
        assert row.num_preemptions is not None
        assert (row.num_preemptions > 0) <= (row.value >= found.preemption_from)
    assert probe(changed(TINY, users=found.preemption_from), "paged", attain=ATTAIN).figures["num_preemptions"] > 0
    never = answer(TINY, "contiguous-max")
    assert (never.preemption_from, never.preemption_tried) == (None, 512)


@pytest.mark.parametrize("goals", [TINY.measurement.goodput, ()], ids=["goals", "no goals"])
def test_repeats_give_an_interval_around_the_answer(goals: tuple[str, ...]) -> None:
    found = max_users(changed(TINY, repeats=4, goodput=goals), "paged", attain=ATTAIN)
    low, high = found.interval
    assert high is not None
    assert low <= found.value <= high
    assert low < high < 20
    sure = probe(changed(TINY, repeats=4, goodput=goals, users=low), "paged", attain=ATTAIN)
    assert sure.surely_meets(ATTAIN)
    assert not probe(sure.config if low == high else changed(sure.config, users=high + 1), "paged", attain=ATTAIN).may_meet(ATTAIN)


def test_a_goal_that_nobody_meets_is_named_with_what_would() -> None:
    found = max_users(changed(TINY, goodput=("ttft:1", "tpot:40")), "paged", attain=ATTAIN)
    assert found.value == 0
    assert found.interval == (0, 1)
    (term,) = found.failing
    assert (term.metric, term.limit_s, term.attained) == ("ttft", 0.001, 0.0)
    assert term.reached_s is not None
    enough = changed(TINY, users=1, goodput=(f"ttft:{1e3 * term.reached_s + 0.001}", "tpot:40"))
    assert probe(enough, "paged", attain=ATTAIN).fits


def test_requests_that_can_never_run_do_not_fit() -> None:
    found = max_users(changed(TINY, random_input_len=None, random_output_len=None, random_range_ratio=None), "paged", attain=0.01)
    assert found.value == 0
    assert "turned away" in found.stops or "can never run" in found.stops


def test_a_machine_that_fits_everybody_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pagedkv.sims.max_users.MOST_USERS", 5)
    found = max_users(TINY, "paged", attain=ATTAIN)
    assert (found.value, found.interval) == (5, (5, None))
    assert found.binding is not None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("max-users --users 3", "--users contradicts"),
        ("max-users --request-rate 3", "--request-rate contradicts"),
        ("max-users --attain 1.2", "attain is 1.2"),
        ("max-users --attain 0", "attain is 0"),
        ("max-users --allocator ,", "no allocator given"),
        ("max-users --allocator pagd", "did you mean paged"),
        ("max-users --goodput tfft:9", "did you mean ttft"),
        ("max-users --model llama-3.1-70b", "GiB"),
        (f"max-users {FLAGS.replace('20s', '1ms')} --goodput ttft:9000", "longer --duration"),
        ("max-users --json /proc/none/x.json", "cannot write --json"),
        ("max-context", "--users N"),
        ("max-context --users 3 --lengths sharegpt", "--lengths contradicts"),
        ("max-context --users 3 --random-input-len 9", "--random-input-len contradicts"),
        ("max-context --users 3 --random-output-len 0", "random-output-len is 0"),
        ("max-context --users 3 --random-output-len 2000 --max-model-len 2000", "within 2000 tokens"),
    ],
)
def test_what_cannot_work_is_refused(flags: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(shlex.split(flags))
    out, err = capsys.readouterr()
    assert (exit.value.code, out) == (2, "")
    assert message in err


# --- the longest context --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("goals", [TINY.measurement.goodput, ()], ids=["goals", "no goals"])
def test_the_longest_context_fits_and_the_next_does_not(goals: tuple[str, ...]) -> None:
    config = changed(SAME_LENGTH, users=6, goodput=goals)
    answer = max_context(config, "paged", attain=ATTAIN)
    found = answer.found
    assert answer.prompt_len + answer.output_len == found.value
    assert found.value % config.serving.block_size == 0
    low, high = found.interval
    assert high is not None
    assert low == found.value < high <= found.value + max(16, found.value // 50)

    def fits(context: int) -> bool:
        one = changed(config, random_input_len=context - 60, max_model_len=context)
        tried = probe(one, "paged", attain=ATTAIN)
        return tried.fits and (bool(goals) or tried.figures["num_preemptions"] == 0)

    assert fits(low)
    assert not fits(high)


def test_more_users_have_less_context() -> None:
    few, many = (max_context(changed(SAME_LENGTH, users=users), "paged", attain=ATTAIN).found.value for users in (2, 8))
    assert few > many


def test_no_context_is_longer_than_the_model_or_what_is_given() -> None:
    roomy = changed(
        SAME_LENGTH, users=1, goodput=("e2el:900000",), num_gpu_blocks_override=800, model="llama-2-7b", quantization="int4"
    )
    assert max_context(roomy, "paged", attain=ATTAIN).found.value == 4096
    assert max_context(changed(roomy, max_model_len=1000), "paged", attain=ATTAIN).found.value == 992


def test_a_context_that_no_machine_starts_with_does_not_fit() -> None:
    found = max_context(changed(SAME_LENGTH, users=1, goodput=("e2el:900000",)), "paged", attain=ATTAIN).found
    assert found.value <= 200 * 16
    assert any(row.status == "does not start" for row in found.tried)


# --- commands -------------------------------------------------------------------------------------------------------


def answers(capsys: pytest.CaptureFixture[str], command: str) -> Any:
    main(shlex.split(f"{command} --json -"))
    return json.loads(capsys.readouterr().out)


def test_the_commands_answer_as_the_functions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = f"max-users {FLAGS} --goodput ttft:400 tpot:40"
    document = answers(capsys, command)
    found = answer(TINY, "paged")
    assert document["answers"] == json.loads(json.dumps([found.document()]))
    main(shlex.split(f"{command} --json {tmp_path}/x.json"))
    assert json.loads((tmp_path / "x.json").read_text()) == document
    both = answers(capsys, f"{command} --allocator contiguous-max,paged")["answers"]
    assert [each["allocator"] for each in both] == ["contiguous-max", "paged"]
    three = "--allocator paged,contiguous-max,contiguous-oracle"  # the default of simulate, but typed
    assert len(answers(capsys, f"{command} {three}")["answers"]) == 3


@pytest.mark.parametrize("width", [36, 40, 50, 60, 80, 120])
def test_every_number_of_users_that_was_tried_is_whole_on_a_narrow_terminal(width: int) -> None:
    found = answer(TINY, "paged")
    file = io.StringIO()
    show_max_users([found], Console(file=file, width=width), attain=ATTAIN)
    shown = [line.split() for line in file.getvalue().splitlines() if re.match(r" *[0-9,]+ +(yes|no) ", line)]
    assert [int(row[0].replace(",", "")) for row in shown] == [row.value for row in found.tried]
    assert [row[2] for row in shown] == [row.status for row in found.tried]
    assert [row[-1] for row in shown] == [
        "–" if row.output_tokens_per_s is None else f"{row.output_tokens_per_s:,.0f}" for row in found.tried
    ]
    assert "…" not in file.getvalue()


def test_the_terminal_says_it_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    main(shlex.split(f"max-users {FLAGS} --goodput ttft:1 tpot:40"))
    out = capsys.readouterr().out
    assert "not even one user fits" in out
    assert "ttft fails: 0.0% within 1 ms" in out
    main(shlex.split(f"max-users {FLAGS}"))
    out = capsys.readouterr().out
    assert "paged: 7 users" in out
    assert "limit: memory bandwidth" in out
    context = "--users 6 --think-time 1s --random-output-len 60 --hardware rtx-4090 --num-gpu-blocks-override 200"
    main(shlex.split(f"max-context {context} --duration 20s --warmup 4s"))
    assert "tokens for 6 users: prompts of" in capsys.readouterr().out
