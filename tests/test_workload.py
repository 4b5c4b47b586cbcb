"""Workloads: who joins which class, what is drawn, and what is reported by class."""

import csv
import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pagedkv.sims.cli import main
from pagedkv.sims.config import LoadConfig, MeasurementConfig, ServingConfig, SimulationConfig
from pagedkv.sims.length_names import load_lengths
from pagedkv.sims.max_users import max_users
from pagedkv.sims.records import RequestLog
from pagedkv.sims.results import simulate
from pagedkv.sims.scenario import resolve
from pagedkv.sims.simulation import run
from pagedkv.sims.token_lengths import LengthsOf, LognormalLengths, SameLength, TokenLengths, UniformLengths, sample_turns
from pagedkv.sims.workload import Workload, shares_of
from pagedkv.sims.workload_file import load_workload, workload_names

ROOT = Path(__file__).parents[1]
GOOD = (ROOT / "tests/two_classes.toml").read_text("utf-8")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "good.toml").write_text(GOOD)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def scenario(workload: str = "good.toml", users: int | None = 8, duration: str | None = "30s", **changes: Any) -> Any:
    serving = ServingConfig(**{k: v for k, v in changes.items() if k in ServingConfig.__slots__})
    load = {k: v for k, v in changes.items() if k in LoadConfig.__slots__}
    return resolve(
        SimulationConfig(
            load=LoadConfig(workload=workload, users=users, **load),
            serving=serving,
            measurement=MeasurementConfig(
                duration=duration, warmup=None if duration is None else "0", allocator=changes.get("allocator")
            ),
        )
    )


# --- lengths --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lengths", "mean", "deviation"),
    [
        (SameLength(tokens=7), 7.0, 0.0),
        (UniformLengths(least=10, most=30), 20.0, np.sqrt((21**2 - 1) / 12)),
        (LognormalLengths(mean=500, cv=0.5), 500.0, 250.0),
        (LognormalLengths(mean=500, cv=0), 500.0, 0.0),
        (LengthsOf(pairs=load_lengths("azure-conv"), part="output"), load_lengths("azure-conv").mean_output, 163.0),
    ],
)
def test_lengths_have_their_moments(lengths: TokenLengths, mean: float, deviation: float) -> None:
    drawn = lengths.sample(np.random.default_rng(1), 100_000)
    assert drawn.dtype == np.int64
    assert drawn.min() >= lengths.least >= 1
    assert drawn.mean() == pytest.approx(mean, rel=0.01)
    assert drawn.std() == pytest.approx(deviation, rel=0.03)


def test_both_parts_of_one_distribution_are_drawn_as_its_pairs() -> None:
    pairs = load_lengths("azure-conv")
    prompt, output = LengthsOf(pairs=pairs, part="prompt"), LengthsOf(pairs=load_lengths("azure-conv"), part="output")
    drawn = sample_turns(prompt, output, np.random.default_rng(3), 50)
    wanted = pairs.sample(np.random.default_rng(3), 50)
    assert [part.tolist() for part in drawn] == [part.tolist() for part in wanted]
    apart = sample_turns(prompt, replace(output, pairs=load_lengths("sharegpt")), np.random.default_rng(3), 50)
    assert apart[0].tolist() == wanted[0].tolist()
    assert apart[1].tolist() != wanted[1].tolist()


# --- shares ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shares", [[0.6, 0.2, 0.1, 0.1], [0.75, 0.25], [1.0], [1 / 3, 1 / 3, 1 / 3], [0.97, 0.02, 0.01]])
def test_people_join_by_their_shares_and_one_more_changes_nobody(shares: list[float]) -> None:
    joined = shares_of(1000, shares)
    for users in (1, 2, 10, 37, 100, 1000):
        assert shares_of(users, shares) == joined[:users]
        members = Counter(joined[:users])
        for place, share in enumerate(shares):
            assert abs(members[place] - share * users) <= 1.0
    assert shares_of(0, shares) == []


# --- what comes along ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", workload_names())
def test_what_comes_along_runs(name: str) -> None:
    done = run(scenario(name, users=5, duration=None if name == "batch" else "200s"), "paged", seed=0)
    assert len(done.log) > 3
    assert set(done.log.user_class.tolist()) <= set(range(len(load_workload(name))))


def test_a_batch_is_there_from_the_start_and_runs_to_its_end() -> None:
    asked = scenario("batch", users=40, duration=None)
    assert (asked.warmup_s, asked.duration_s, asked.load.num_requests) == (0.0, None, 40)
    results = simulate(replace(asked, allocators=("paged",)))
    result = results.by_allocator["paged"]
    assert result.figures["num_finished"] == result.figures["num_injected"] == 40
    assert set(result.runs[0].log.arrival_s.tolist()) == {0.0}
    assert result.verdict.status == "stable"  # that they wait for each other is what a batch does
    assert result.verdict.text.startswith("40 users of batch fit")


# --- figures --------------------------------------------------------------------------------------------------------


def test_classes_add_up_to_the_whole(capsys: pytest.CaptureFixture[str]) -> None:
    words = (
        "--workload good.toml --users 8 --duration 40s --warmup 5s --goodput ttft:400 tpot:90 --allocator paged,contiguous-oracle"
    )
    main([*words.split(), "--json", "r.json", "--out", "r"])
    shown = capsys.readouterr().out
    document = json.loads(Path("r.json").read_text("utf-8"))
    with Path("r/requests.csv").open(encoding="utf-8", newline="") as file:
        requests = [row for row in csv.DictReader(file) if row["measured"] == "1"]
    for result in document["results"]:
        classes = result["classes"]
        assert [row["name"] for row in classes] == ["chat", "agents"]
        for name in ("num_injected", "num_finished", "num_rejected", "num_failed", "num_unfinished"):
            assert sum(row[name] for row in classes) == result[name]
        for row in classes:
            mine = [r for r in requests if r["allocator"] == result["allocator"] and r["class"] == row["name"]]
            assert len(mine) == row["num_injected"] > 0
            scheduled = [r for r in mine if r["scheduled_s"]]
            found, known = (sum(int(r[key]) for r in scheduled) for key in ("num_cached_tokens", "prompt_tokens"))
            assert row["prefix_hit_rate"] == (found / known if result["allocator"] == "paged" else None)
        means = [row["ttft_s"]["mean"] * row["num_injected"] for row in classes]
        assert sum(means) == pytest.approx(result["ttft_s"]["mean"] * result["num_injected"])
        good = sum(row["goodput_share"] * row["num_injected"] for row in classes)
        assert good == pytest.approx(result["goodput_share"] * result["num_injected"])
    assert classes[0]["num_injected"] > classes[1]["num_injected"]
    assert "By class of users, paged" in shown
    assert "agents" in shown
    assert max(map(len, shown.partition("By class")[2].partition("Verdict")[0].splitlines())) <= 80


def test_one_class_is_the_whole(capsys: pytest.CaptureFixture[str]) -> None:
    main("--workload chat --users 3 --duration 20s --warmup 0 --allocator paged --json r.json --repeats 2".split())
    assert "By class" not in capsys.readouterr().out
    assert "classes" not in json.loads(Path("r.json").read_text("utf-8"))["results"][0]


def test_repeats_are_combined_class_by_class() -> None:
    main("--workload good.toml --users 8 --duration 20s --warmup 0 --repeats 2 --allocator paged --json both.json".split())
    parts = []
    for seed in (0, 1):
        main(f"--workload good.toml --users 8 --duration 20s --warmup 0 --seed {seed} --allocator paged --json {seed}.json".split())
        parts.append(json.loads(Path(f"{seed}.json").read_text("utf-8"))["results"][0]["classes"])
    both = json.loads(Path("both.json").read_text("utf-8"))["results"][0]["classes"]
    for i, row in enumerate(both):
        assert row["name"] == parts[0][i]["name"]
        assert row["num_injected"] == parts[0][i]["num_injected"] + parts[1][i]["num_injected"]
        assert row["e2e_s"]["p50"] == pytest.approx((parts[0][i]["e2e_s"]["p50"] + parts[1][i]["e2e_s"]["p50"]) / 2)


def same_log(a: RequestLog, b: RequestLog) -> None:
    for name in RequestLog.__slots__:
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


@pytest.mark.parametrize("blocks", [None, 300])
def test_the_compiled_loop_and_the_engine_step_by_step_come_to_the_same(blocks: int | None) -> None:
    asked = scenario(num_gpu_blocks_override=blocks, max_model_len=4096)
    same_log(run(asked, "paged", seed=2).log, run(asked, "paged", seed=2, step_by_step=True).log)


def test_a_seed_is_a_run() -> None:
    asked = scenario()
    same_log(run(asked, "paged", seed=2).log, run(asked, "paged", seed=2).log)
    a, b = (run(asked, "paged", seed=seed).log for seed in (2, 3))
    assert len(a) != len(b) or (a.prompt_tokens != b.prompt_tokens).any()


@pytest.mark.parametrize("engine", ["sglang", "tensorrt-llm", "llama-cpp", "ollama", "orca", "naive"])
def test_every_engine_serves_it_and_finds_what_it_can(engine: str) -> None:
    figures = simulate(scenario(engine=engine, duration="60s")).by_allocator.values()
    for result in figures:
        assert result.figures["num_rejected"] == result.figures["num_failed"] == 0
        rates = [row["prefix_hit_rate"] for row in result.figures["classes"]]
        assert (
            all(rate is None for rate in rates) if engine in ("orca", "naive") else max(rates) > 0.05
        )  # llama.cpp has four slots for eight people


def test_replicas_know_the_classes_too() -> None:
    done = run(scenario(replicas=2, fault=("10s:5s",)), "paged", seed=0)
    assert set(done.log.user_class.tolist()) == {0, 1}
    assert (done.log.user_class[done.log.outcome == 3] >= 0).any()


# --- elsewhere ------------------------------------------------------------------------------------------------------


def test_max_users_searches_a_workload() -> None:
    config = SimulationConfig(
        load=LoadConfig(workload="good.toml"),
        measurement=MeasurementConfig(duration="20s", warmup="0", goodput=("ttft:1500", "tpot:95")),
    )
    found = max_users(config, "paged", attain=0.9)
    assert found.value > 1
    assert found.interval[1] is not None


def test_a_run_can_be_repeated_from_its_folder(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main("--workload good.toml --users 5 --duration 10s --warmup 0 --allocator paged --out r".split())
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    main("--config ../r/config.toml --json again.json".split())
    first, again = (json.loads(Path(name).read_text("utf-8")) for name in ("../r/summary.json", "again.json"))
    for document in (first, again):
        document["results"][0].pop("verdict")  # its command has another path
    assert first["results"] == again["results"]
    capsys.readouterr()
    assert first["config"]["lengths"] is None


def test_a_workload_that_says_how_many_needs_no_users() -> None:
    Path("fixed.toml").write_text(
        GOOD.replace("share = 0.75", "users = 3").replace('share = 0.25\nthink_time = "3s"', "request_rate = 0.5")
    )
    asked = scenario("fixed.toml", users=None)
    assert isinstance(asked.load, Workload)
    assert asked.load.title == "the users of fixed.toml"
    assert asked.load.num_users == [3, 0]
    assert not asked.load.is_closed
    result = simulate(replace(asked, allocators=("paged",))).by_allocator["paged"]
    assert "--users" not in result.verdict.next_command
    assert set(result.runs[0].log.user_class.tolist()) == {0, 1}


def test_the_example_of_the_documentation_is_one(tmp_path: Path) -> None:
    page = (ROOT / "docs/workloads.md").read_text("utf-8")
    (example,) = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    (tmp_path / "team.toml").write_text(example)
    classes = load_workload("team.toml")
    assert len(classes) > 1
    assert len(run(scenario("team.toml", users=10), "paged", seed=0).log) > 0
    for name in workload_names():
        assert f"`{name}`" in page
