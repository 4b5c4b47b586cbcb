"""Each status and each limit is reached by a small run, and what the verdict proposes can be run."""

import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from pagedkv.allocation import Grant
from pagedkv.allocators import ALLOCATORS
from pagedkv.allocators.paged import PagedAllocator
from pagedkv.kv_request import KVRequest
from pagedkv.sims.cli import main
from pagedkv.sims.config import LoadConfig, MeasurementConfig, ServingConfig, SimulationConfig
from pagedkv.sims.results import simulate
from pagedkv.sims.scenario import resolve
from pagedkv.step_allocation import RequestByRequest

WINDOW = "--duration 30s --warmup 10s --allocator paged"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    header = "arrival_s,input_tokens,output_tokens\n"
    (tmp_path / "one_too_long.csv").write_text(header + "0,400,10\n1,40000,10\n")
    (tmp_path / "longer_than_the_model.csv").write_text(header + "0,400,10\n1,400000,10\n")
    (tmp_path / "easy.csv").write_text(header + "".join(f"{t},400,10\n" for t in range(9)))
    return tmp_path


def run(arguments: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Return the first result of `arguments`."""
    main([*shlex.split(arguments), "--json", "-"])
    result: dict[str, Any] = json.loads(capsys.readouterr().out)["results"][0]
    return result


class Case(NamedTuple):
    arguments: str
    status: str
    binding: str
    proposal: str
    """What the next command changes."""


FIXED = "--random-input-len {} --random-output-len {}"
CASES = {
    "easy": Case(
        f"--users 20 --think-time 5s {FIXED.format(200, 20)} --hardware h100-80gb {WINDOW}", "stable", "bandwidth", "--users 40"
    ),
    "easy, long prompts": Case(
        f"--users 3 --think-time 5s {FIXED.format(9000, 2)} --hardware h100-80gb {WINDOW}", "stable", "prefill_compute", "--users 6"
    ),
    "few places": Case(
        f"--users 30 --think-time 5s {FIXED.format(200, 20)} --max-num-seqs 4 {WINDOW}",
        "saturated",
        "max_num_seqs",
        "--max-num-seqs 8",
    ),
    "little memory": Case(
        f"--users 30 --think-time 1s {FIXED.format(500, 500)} --kv-cache-memory-bytes 600MiB --max-model-len 1024 {WINDOW}",
        *("saturated", "kv_memory", "--kv-cache-dtype fp8"),
    ),
    "little memory, narrow cache": Case(
        f"--users 30 --think-time 1s {FIXED.format(500, 500)} --kv-cache-memory-bytes 300MiB --max-model-len 1024 "
        f"--kv-cache-dtype fp8 {WINDOW}",
        *("saturated", "kv_memory", "--users 15"),
    ),
    "few blocks": Case(
        f"--users 30 --think-time 1s {FIXED.format(500, 500)} --num-gpu-blocks-override 300 --max-model-len 1024 {WINDOW}",
        *("saturated", "kv_memory", "--num-gpu-blocks-override 600"),
    ),
    "much decoding": Case(
        f"--users 200 --think-time 1s {FIXED.format(20, 300)} --hardware h100-80gb {WINDOW}",
        "saturated",
        "bandwidth",
        "--quantization fp8",
    ),
    "much decoding, narrow weights": Case(
        f"--users 200 --think-time 1s {FIXED.format(20, 300)} --hardware h100-80gb --quantization fp8 {WINDOW}",
        *("saturated", "bandwidth", "--users 100"),
    ),
    "long prompts": Case(
        f"--users 100 --think-time 1s {FIXED.format(4000, 1)} {WINDOW}", "saturated", "prefill_compute", "--users 50"
    ),
    "open, long prompts": Case(
        f"--request-rate 10 {FIXED.format(4000, 1)} {WINDOW}", "saturated", "prefill_compute", "--request-rate 5.0"
    ),
    "open, easy": Case(f"--request-rate 1 {FIXED.format(200, 20)} {WINDOW}", "stable", "bandwidth", "--request-rate 2.0"),
    "trace, easy": Case("--trace easy.csv", "stable", "bandwidth", "--trace-rate 2.0"),
    "trace, one too long": Case("--trace one_too_long.csv", "rejecting", "max_model_len", "--max-model-len 40010"),
    # The buddy heap's largest interval, a power of two, is shorter than what contiguous-max reserves for everyone.
    "no interval": Case(
        "--users 9 --think-time 1s --max-model-len 33000 --num-gpu-blocks-override 2200 --allocator contiguous-max "
        "--duration 9s --warmup 0",
        *("rejecting", "kv_memory", "--num-gpu-blocks-override 4400"),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_load_is_judged_and_the_next_command_runs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    case = CASES[name]
    verdict = run(case.arguments, capsys)["verdict"]
    fits = case.status == "stable"
    assert (verdict["status"], verdict["binding"], verdict["fits"]) == (case.status, case.binding, fits)
    assert f"{'fit' if fits else 'do not fit'}: {case.status}" in verdict["text"]
    program, *words = shlex.split(verdict["next_command"])
    assert program == "simulate"
    assert case.proposal in verdict["next_command"]
    assert set(words) <= set(shlex.split(case.arguments)) | set(shlex.split(case.proposal))  # and nothing else
    run(shlex.join(words), capsys)


@pytest.mark.parametrize("seed", range(5))
def test_one_user_alone_always_fits(seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Nobody shares the machine: whatever lengths the user draws, they get all its throughput."""
    verdict = run(f"--users 1 --duration 100s --warmup 0 --allocator paged --seed {seed}", capsys)["verdict"]
    assert (verdict["status"], verdict["fits"]) == ("stable", True)


@pytest.mark.parametrize(("limit", "held_back"), [("", False), ("--max-concurrency 200", False), ("--max-concurrency 2", True)])
def test_a_client_that_its_limit_holds_back_says_how_much_it_sends(
    limit: str, held_back: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    load = "--request-rate 10 --num-prompts 60 --random-input-len 200 --random-output-len 50 --hardware h100-80gb --allocator paged"
    result = run(f"{load} {limit}", capsys)
    found = re.search(r"the client waits for answers, and sends ([0-9.]+) requests/s", result["verdict"]["text"])
    assert (found is not None) == held_back
    assert result["running_max"] <= (2 if held_back else 60)
    assert ("--max-concurrency 4" in result["verdict"]["next_command"]) == held_back, "a higher rate would change nothing"
    if found is not None:
        assert 0.5 * result["request_throughput_per_s"] < float(found.group(1)) < 9


def test_goals_decide_whether_a_stable_load_fits(capsys: pytest.CaptureFixture[str]) -> None:
    load = f"--users 20 --think-time 5s --random-input-len 200 --random-output-len 20 --hardware h100-80gb {WINDOW}"
    for goals, fits, words in (("ttft:500 e2el:2000", True, "100.0% of requests"), ("tpot:0.1", False, "0.0% of requests")):
        result = run(f"{load} --goodput {goals}", capsys)
        assert (result["verdict"]["status"], result["verdict"]["fits"]) == ("stable", fits)
        assert words in result["verdict"]["text"]
        assert result["goodput_share"] == pytest.approx(float(fits), abs=0.05)


def test_requests_that_are_all_sent_at_once_are_sent_at_no_rate(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, limit in ((1, 1), (3, 3)):
        (folder / "at_once.csv").write_text("arrival_s,input_tokens,output_tokens\n" + "0,400,10\n" * number)
        result = run(f"--trace at_once.csv --max-concurrency {limit} --warmup 0s --allocator paged", capsys)
        assert "requests/s" not in result["verdict"]["text"]


def test_what_fits_is_not_called_saturated_and_waiting_that_no_goal_sees_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    """Four slots: who has one gets tokens fast, and everybody else waits for one."""
    load = "--users 20 --think-time 1s --random-input-len 100 --random-output-len 50 --duration 60s --warmup 5s --engine llama-cpp"
    verdict = run(f"{load} --goodput tpot:1000", capsys)["verdict"]
    assert (verdict["status"], verdict["fits"]) == ("saturated", True)
    assert verdict["text"].startswith("20 users fit: within the goals, slower than alone (")
    assert "requests wait for server slots (--parallel) " in verdict["text"]
    assert "which no goal looks at: add ttft" in verdict["text"]
    seen = run(f"{load} --goodput tpot:1000 ttft:1000", capsys)["verdict"]
    assert not seen["fits"]
    assert "which no goal looks at" not in seen["text"]
    assert seen["text"].endswith("Limit: server slots (--parallel).")


def test_more_users_end_up_saturated(capsys: pytest.CaptureFixture[str]) -> None:
    load = "--think-time 5s --random-input-len 200 --random-output-len 100 --duration 60s --warmup 20s --allocator paged"
    statuses = [run(f"--users {users} {load}", capsys)["verdict"]["status"] for users in (1, 5, 50, 200, 400)]
    assert statuses == sorted(statuses, reverse=True)  # "stable" comes after "saturated"
    assert (statuses[0], statuses[-1]) == ("stable", "saturated")


# --- an allocator that breaks its promise ---------------------------------------------------------------------------


class NeverAgain(PagedAllocator):
    """Accepts every request at arrival, and never has room for a prompt of more than 300 tokens."""

    def allocate_slots(self, request: KVRequest, num_new_tokens: int, *, has_scheduled_reqs: bool = False) -> Grant | None:
        if request.num_tokens > 300:
            return None
        return super().allocate_slots(request, num_new_tokens, has_scheduled_reqs=has_scheduled_reqs)


@pytest.fixture
def broken() -> Iterator[str]:
    ALLOCATORS.register("never-again")(NeverAgain)
    yield "never-again"
    ALLOCATORS._registered.pop("never-again")


def test_a_request_given_up_is_a_failure(broken: str) -> None:
    config = SimulationConfig(
        load=LoadConfig(users=4, think_time="1s", random_input_len=300, random_output_len=9, random_range_ratio=0.1),
        serving=ServingConfig(hardware="h100-80gb"),
        measurement=MeasurementConfig(duration="20s", warmup="0", goodput=("e2el:60000",)),
    )
    scenario = replace(resolve(config), allocators=(broken,))
    result = simulate(scenario).by_allocator[broken]
    figures, verdict = result.figures, result.verdict
    stepped = result.runs[0].allocator
    assert isinstance(stepped, RequestByRequest)
    assert isinstance(stepped.allocator, NeverAgain)
    assert figures["num_failed"] > 0
    assert figures["num_finished"] > 0
    assert sum(figures[f"num_{outcome}"] for outcome in ("finished", "failed", "unfinished")) == figures["num_injected"]
    assert (verdict.status, verdict.fits) == ("failed", False)
    assert f"{figures['num_failed']} of {figures['num_injected']} requests were given up" in verdict.text
    assert figures["goodput_share"] == pytest.approx(figures["num_finished"] / figures["num_injected"])
    result.runs[0].allocator.check_integrity()


def test_nothing_can_be_given_up_by_a_pool_that_is_whole() -> None:
    """Law 11: what was accepted at arrival ends, however small the pool is."""
    for name in ("paged", "contiguous-max", "contiguous-oracle", "contiguous-pow2"):
        config = SimulationConfig(
            load=LoadConfig(users=9, think_time="100ms", random_input_len=60, random_output_len=60, random_range_ratio=0.9),
            serving=ServingConfig(hardware="h100-80gb", max_model_len=256, num_gpu_blocks_override=17),
            measurement=MeasurementConfig(duration="20s", warmup="0", allocator=(name,)),
        )
        figures = simulate(resolve(config)).by_allocator[name].figures
        assert figures["num_failed"] == 0
        assert figures["num_finished"] > 9


OUT_OF_CELLS = "--users 16 --think-time 0s --random-input-len 200 --random-output-len 300 --engine llama-cpp --quantization q4_k_m"


@pytest.mark.parametrize(
    ("flags", "proposal"),
    [
        ("--parallel 16 --kv-unified --ctx-size 4096", "--ctx-size 8192"),  # 16 x 500 in multiples of 256
        ("--ctx-size 1024", "--ctx-size 2048"),
        ("--parallel 16 --kv-unified --ctx-size 4096 --hardware rtx-4090 --other-programs 17.9GiB", "--parallel 8"),
    ],
)
def test_cells_that_run_out_are_named_and_the_proposal_has_enough(
    flags: str, proposal: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = f"{OUT_OF_CELLS} {flags} --duration 120s --warmup 5s"
    failing = run(arguments, capsys)
    verdict = failing["verdict"]
    assert failing["num_failed"] > 0
    assert (verdict["status"], verdict["binding"]) == ("failed", "ctx_size")
    assert "cells of the KV cache (--ctx-size)" in verdict["text"]
    assert proposal in verdict["next_command"]
    served = run(verdict["next_command"].removeprefix("simulate "), capsys)
    assert (served["num_failed"], served["num_finished"] > 0) == (0, True)
    assert served["output_tokens_per_s"] > failing["output_tokens_per_s"]


def test_twice_the_slots_come_with_cells_for_them(capsys: pytest.CaptureFixture[str]) -> None:
    """Slots that share cells which suffice for no more of them would fail their requests."""
    verdict = run(f"{OUT_OF_CELLS} --ctx-size 2048 --duration 30s --warmup 5s", capsys)["verdict"]
    assert (verdict["status"], verdict["binding"]) == ("saturated", "max_num_seqs")
    assert "--ctx-size 4096" in verdict["next_command"]
    assert run(verdict["next_command"].removeprefix("simulate "), capsys)["num_failed"] == 0


def test_prompts_longer_than_a_slot_get_a_longer_slot(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "mixed.csv").write_text("arrival_s,input_tokens,output_tokens\n0,400,10\n1,3000,20\n")
    load = "--trace mixed.csv --engine llama-cpp --quantization q4_k_m"
    verdict = run(f"{load} --parallel 4 --ctx-size 8192", capsys)["verdict"]
    assert (verdict["status"], verdict["binding"]) == ("rejecting", "max_model_len")
    assert "--ctx-size 12288" in verdict["next_command"]
    assert run(verdict["next_command"].removeprefix("simulate "), capsys)["num_rejected"] == 0


def test_settings_carry_over(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = f"--users 5 --lengths sharegpt --over-length drop --enforce-eager --watermark 0.02 --goodput ttft:9 tpot:9 {WINDOW}"
    main([*shlex.split(arguments), "--json", "-"])
    before = json.loads(capsys.readouterr().out)
    main([*shlex.split(before["results"][0]["verdict"]["next_command"])[1:], "--json", "-"])
    after = json.loads(capsys.readouterr().out)
    assert {name for name in before["config"] if before["config"][name] != after["config"][name]} in ({"users"}, {"quantization"})


# --- what was once judged wrongly ---------------------------------------------------------------------------------


def test_a_short_overload_is_seen(capsys: pytest.CaptureFixture[str]) -> None:
    result = run("--request-rate 100 --duration 2s --warmup 0 --allocator paged", capsys)
    assert result["num_finished"] == 0
    assert result["waiting_time_share"] > 0.5
    assert not result["verdict"]["fits"]


def test_a_batch_that_grows_without_end_is_seen(capsys: pytest.CaptureFixture[str]) -> None:
    load = f"--request-rate 4 {FIXED.format(100, 1000)} --max-num-seqs 1024"
    result = run(f"{load} --duration 60s --warmup 60s --allocator paged", capsys)
    assert result["num_finished"] == 0
    assert result["verdict"]["status"] == "saturated"


def test_a_short_window_does_not_make_a_load_fit(capsys: pytest.CaptureFixture[str]) -> None:
    load = f"--users 200 --think-time 1s {FIXED.format(20, 400)} --warmup 60s --allocator paged"
    long, short = (run(f"{load} --duration {seconds}s", capsys)["verdict"]["status"] for seconds in (300, 30))
    assert long == "saturated"
    assert short == "saturated"


def test_a_verdict_needs_requests(capsys: pytest.CaptureFixture[str]) -> None:
    result = run("--trace easy.csv --warmup 1h --allocator paged", capsys)
    assert result["num_injected"] == 0
    assert not result["verdict"]["fits"]


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ("--users 10 --duration 1ms", "no request arrived in the 0.001 s after the warm-up of 60 s; a longer --duration has some"),
        ("--request-rate 0.0001 --duration 1s", "no request arrived in the 1 s after"),
        ("--trace easy.csv --warmup 1h", "arrive in the warm-up of 3600 s, the last after"),
        ("--users 2 --num-prompts 3 --duration 1us", "the run ends after 1e-06 s, before the first request"),
        (
            "--users 1 --think-time 1s --random-input-len 100 --random-output-len 8000 --duration 10s",
            "everybody still waits for an earlier answer; --warmup 0s counts those",
        ),
    ],
)
def test_nothing_measured_names_no_limit_and_proposes_a_run_that_measures(
    arguments: str, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run(f"{arguments} --allocator paged", capsys)
    assert result["num_injected"] == 0
    verdict = result["verdict"]
    assert (verdict["status"], verdict["fits"], verdict["binding"]) == ("unmeasured", False, None)
    assert "nothing was measured" in verdict["text"]
    assert why in verdict["text"]
    assert "quantization" not in verdict["next_command"]
    assert run(verdict["next_command"].removeprefix("simulate "), capsys)["num_injected"] > 0


def test_no_more_load_is_proposed_than_can_be_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    result = run(f"--request-rate 1000000 --num-prompts 3 {FIXED.format(10, 2)} --allocator paged", capsys)
    assert result["verdict"]["fits"]
    proposal = shlex.split(result["verdict"]["next_command"])[1:]
    assert float(proposal[proposal.index("--request-rate") + 1]) == 1e6
    assert proposal[-2:] == ["--repeats", "5"]
    assert run(shlex.join(proposal), capsys)["num_injected"] > 0


def test_a_search_in_too_short_a_time_says_that_nothing_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["max-users", "--duration", "1ms", "--allocator", "paged"])
    assert "give a longer --duration" in capsys.readouterr().err


def test_a_longer_context_is_only_proposed_if_it_starts(capsys: pytest.CaptureFixture[str]) -> None:
    proposal = run("--trace one_too_long.csv --hardware rtx-4090 --allocator paged", capsys)["verdict"]["next_command"]
    run(proposal.removeprefix("simulate "), capsys)


def test_the_next_command_is_another_one(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--trace longer_than_the_model.csv --max-model-len 131072 --allocator paged"
    assert set(shlex.split(run(arguments, capsys)["verdict"]["next_command"])[1:]) != set(shlex.split(arguments))


def test_the_proposal_against_a_full_cache_makes_it_larger(capsys: pytest.CaptureFixture[str]) -> None:
    main([*shlex.split(CASES["little memory"].arguments), "--json", "-"])
    before = json.loads(capsys.readouterr().out)
    main([*shlex.split(before["results"][0]["verdict"]["next_command"])[1:], "--json", "-"])
    after = json.loads(capsys.readouterr().out)
    assert after["budget"]["num_blocks"] > before["budget"]["num_blocks"]


def test_one_user_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(f"--users 1 {WINDOW}", capsys)["verdict"]["text"].startswith("1 user fits: stable")


@pytest.mark.parametrize(
    ("flags", "proposal"),
    [("", "--max-num-seqs 8 --kv-unified"), ("--parallel 2", "--ctx-size 262144 --parallel 4"), ("--kv-unified", "--kv-unified")],
)
def test_more_slots_of_llama_cpp_do_not_shorten_the_longest_request(
    flags: str, proposal: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without --parallel four slots share all cells; a number of slots would split them."""
    load = "--users 20 --think-time 1s --random-input-len 100 --random-output-len 50 --duration 20s --warmup 5s"
    main([*f"{load} --engine llama-cpp --quantization q4_k_m {flags} --json -".split()])
    document = json.loads(capsys.readouterr().out)
    before, verdict = document["config"]["max_model_len"], document["results"][0]["verdict"]
    assert verdict["binding"] == "max_num_seqs"
    assert proposal in verdict["next_command"]
    program, *words = shlex.split(verdict["next_command"])
    main([*words, "--json", "-"])
    now = json.loads(capsys.readouterr().out)
    assert program == "simulate"
    assert now["config"]["max_model_len"] >= before
