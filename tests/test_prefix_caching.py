"""Prefix caching in simulations: who finds what, by hand; flags and what they refuse; the same as the study of prefix caches."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedkv.errors import ConfigError, TraceFormatError
from pagedkv.paged_steps import PagedStepAllocator
from pagedkv.sims.cli import main
from pagedkv.sims.command import to_toml
from pagedkv.sims.config import LoadConfig, MeasurementConfig, ServingConfig, SimulationConfig
from pagedkv.sims.from_vllm import parse_vllm_command
from pagedkv.sims.load import TraceReplay
from pagedkv.sims.metrics import measure
from pagedkv.sims.prefix_replay import replay_block_pool
from pagedkv.sims.prompt_content import PromptContent
from pagedkv.sims.results import resolved_config, simulate
from pagedkv.sims.scenario import Scenario, resolve
from pagedkv.sims.simulation import Run, run
from pagedkv.sims.traces import read_trace

FIXED: dict[str, Any] = {"random_input_len": 100, "random_output_len": 20}
STATE_MODEL = "nemotron-3-nano-30b-a3b"


def scenario(load: dict[str, Any], serving: dict[str, Any] | None = None, **measurement: Any) -> Scenario:
    measurement = {"allocator": ("paged",)} | measurement
    return resolve(
        SimulationConfig(
            load=LoadConfig(**load),
            serving=ServingConfig(**({"hardware": "h100-80gb"} | (serving or {}))),
            measurement=MeasurementConfig(**measurement),
        )
    )


def figures(case: Scenario, allocator: str = "paged") -> dict[str, Any]:
    return measure(run(case, allocator, seed=0), case.goals)


def requests_of(done: Run) -> Any:
    scheduler = done.recorder._scheduler
    return scheduler.requests.arrays[: scheduler.requests.size]


# --- by hand --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("prefix_len", "found"), [(160, 160), (165, 160), (15, 0)])
def test_a_system_prompt_is_computed_once_and_found_in_whole_blocks(prefix_len: int, found: int) -> None:
    """20 requests, 5 s apart on average, each done within 1 s: all but the first find its full blocks of 16."""
    case = scenario({"request_rate": 0.2, "num_prompts": 20, "prefix_len": prefix_len, **FIXED})
    got = figures(case)
    assert (got["num_queried_tokens"], got["num_hit_tokens"]) == (20 * (prefix_len + 100), 19 * found)
    assert got["prefix_hit_rate"] == pytest.approx(19 * found / (20 * (prefix_len + 100)))
    assert got["resumed_hit_rate"] is None


def test_each_prefix_is_computed_once() -> None:
    case = scenario({"users": 12, "think_time": "5s", "prefix_len": 160, "num_prefixes": 3, **FIXED}, duration="200s", warmup="0s")
    done = run(case, "paged", seed=3)
    known = requests_of(done)
    scheduled = known[known["num_queried_tokens"] > 0]
    streams = done.recorder._scheduler.requests.segments["word_a"][scheduled["first_segment"]]
    assert len(set(streams.tolist())) == 3
    for stream in set(streams.tolist()):
        cached = scheduled["num_cached_tokens"][streams == stream]
        assert cached[0] == 0
        assert set(cached[1:].tolist()) == {160}


def test_those_who_come_in_the_same_step_share_as_well() -> None:
    """vLLM registers blocks when their slots are given: of requests that are admitted together, the second finds them already."""
    case = scenario({"request_rate": 1e6, "num_prompts": 10, "prefix_len": 160, **FIXED}, {"max_num_batched_tokens": 8192})
    done = run(case, "paged", seed=0)
    assert requests_of(done)["num_cached_tokens"].tolist() == [0] + [160] * 9


def test_prompts_with_nothing_in_common_hit_only_after_a_preemption() -> None:
    load = {"request_rate": 1e6, "num_prompts": 40, "random_input_len": 100, "random_output_len": 200}
    serving = {"num_gpu_blocks_override": 200, "max_model_len": 512}
    got = figures(scenario(load, serving))
    assert got["num_preemptions"] > 0
    assert got["num_hit_tokens"] == 0
    assert got["prefix_hit_rate"] == 0
    assert got["resumed_hit_rate"] > 0  # most of what a preempted request leaves is taken by those for whom it had to go
    without = figures(scenario(load, serving | {"enable_prefix_caching": False}))
    assert without["num_preemptions"] > 0
    assert {name: without[name] for name in ("num_hit_tokens", "prefix_hit_rate", "resumed_hit_rate")} == dict.fromkeys(
        ("num_hit_tokens", "prefix_hit_rate", "resumed_hit_rate")
    )
    assert without["kv"]["cached"] == 0 < got["kv"]["cached"]
    assert got["simulated_s"] < without["simulated_s"]  # less is computed twice


def test_where_nothing_is_preempted_private_prompts_take_the_same_time_with_a_cache_or_without() -> None:
    load = {"request_rate": 2, "num_prompts": 60}
    on, off = (run(scenario(load, {"enable_prefix_caching": on}), "paged", seed=1) for on in (True, False))
    np.testing.assert_array_equal(on.log.last_token_s, off.log.last_token_s)
    assert isinstance(on.allocator, PagedStepAllocator)
    assert on.recorder._scheduler.requests.segments.size == 0


def test_a_prefix_changes_nothing_else_of_the_load() -> None:
    load: dict[str, Any] = {"request_rate": 2, "num_prompts": 60}
    plain, behind = (run(scenario(load | more), "paged", seed=1) for more in ({}, {"prefix_len": 500, "num_prefixes": 4}))
    np.testing.assert_array_equal(plain.log.arrival_s, behind.log.arrival_s)
    np.testing.assert_array_equal(plain.log.prompt_tokens + 500, behind.log.prompt_tokens)
    np.testing.assert_array_equal(plain.log.output_tokens, behind.log.output_tokens)


@pytest.mark.parametrize(
    "load", [{"users": 20, "think_time": "1s"}, {"request_rate": 5.0}, {"request_rate": 5.0, "num_prompts": 80}]
)
def test_a_seed_is_a_seed_with_prefixes_too(load: dict[str, Any]) -> None:
    timed = {} if load.get("num_prompts") else {"duration": "20s", "warmup": "5s"}
    case = scenario(load | {"prefix_len": 333, "num_prefixes": 5}, {"num_gpu_blocks_override": 900, "max_model_len": 8192}, **timed)
    first, again, other = (measure(run(case, "paged", seed=seed), ()) for seed in (4, 4, 5))
    assert first == again
    assert first != other
    slow = measure(run(case, "paged", seed=4, step_by_step=True), ())
    assert first == slow


# --- what it does to the answer -------------------------------------------------------------------------------------


def test_an_unloaded_machine_has_its_cache_too() -> None:
    """Whoever finds his prompt is compared with what an unloaded machine would do with that prefix in its cache."""
    case = scenario({"users": 1, "think_time": "1s", "prefix_len": 8000, **FIXED}, {"hardware": "dgx-spark"}, duration="120s")
    result = simulate(case).by_allocator["paged"]
    assert result.figures["prefix_hit_rate"] > 0.9
    assert result.verdict.status == "stable"
    crowd = scenario({"users": 40, "think_time": "1s", "prefix_len": 8000, **FIXED}, {"hardware": "dgx-spark"}, duration="120s")
    assert simulate(crowd).by_allocator["paged"].verdict.status == "saturated"


def test_a_pool_full_of_cached_blocks_is_not_a_full_pool() -> None:
    case = scenario({"users": 4, "think_time": "1s"}, {"num_gpu_blocks_override": 2200, "max_model_len": 8192}, duration="600s")
    result = simulate(case).by_allocator["paged"]
    assert result.figures["kv"]["free"] < 0.05
    assert result.figures["kv"]["cached"] > 0.5
    assert result.verdict.binding != "kv_memory"


def test_the_others_do_without_and_the_answer_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--request-rate", "1", "--num-prompts", "20", "--prefix-len", "800", "--num-prefixes", "2", "--hardware", "h100-80gb"]
    main([*words, "--allocator", "paged,contiguous-max,radix"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "Only memory in blocks caches prefixes here: contiguous-max, radix compute every prompt whole." in shown
    assert "behind one of 2 prefixes of 800 tokens" in shown
    assert "prefix caching on" in shown
    assert "prefix hit rate" in shown
    main([*words, "--no-enable-prefix-caching", "--allocator", "paged,contiguous-max"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "prefix caching off" in shown
    assert "prefix hit rate" not in shown
    assert "Only memory in blocks" not in shown


def test_models_with_state_are_not_cached_and_the_answer_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--users", "2", "--duration", "20s", "--warmup", "0", "--model", STATE_MODEL, "--allocator", "paged"]
    for flag in ([], ["--enable-prefix-caching"]):
        main([*words, *flag])
        assert "Prefix caching is off: this model's layers with a state" in " ".join(capsys.readouterr().out.split())


# --- flags ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("load", "serving", "message"),
    [
        ({"users": 2, "prefix_len": -1}, {}, r"--prefix-len is -1: needs 0 to"),
        ({"users": 2, "num_prefixes": 3}, {}, r"--num-prefixes 3 goes with --prefix-len"),
        ({"users": 2, "prefix_len": 10, "num_prefixes": 0}, {}, r"--num-prefixes is 0: needs 1 to"),
        ({"users": 2, "prefix_len": 511}, {"max_model_len": 512}, r"at most 510, or a --max-model-len of 513"),
        ({"users": 2, "prefix_len": 450, **FIXED}, {"max_model_len": 512}, r"behind a prefix of 450 are longer .* 570 would hold"),
        ({"trace": "t.csv", "prefix_len": 10}, {}, r"--prefix-len goes with --users or --request-rate, not with --trace"),
    ],
)
def test_what_cannot_be_is_refused(load: dict[str, Any], serving: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        scenario(load, serving)


def test_a_prefix_of_nothing_is_none() -> None:
    case = scenario({"users": 2, "prefix_len": 0, "num_prefixes": 4}, {"enable_prefix_caching": True})
    assert case.config.load == LoadConfig(users=2)
    assert case.config.serving.enable_prefix_caching is None
    resolved = resolved_config(case)
    assert (resolved["prefix_len"], resolved["num_prefixes"], resolved["enable_prefix_caching"]) == (None, None, True)


@pytest.mark.parametrize("flags", [["--prefix-len", "200", "--num-prefixes", "3"], ["--no-enable-prefix-caching"]])
def test_a_kept_configuration_runs_again_to_the_same(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--users", "3", "--duration", "20s", "--allocator", "paged", *flags, "--json", "-"])
    first = json.loads(capsys.readouterr().out)
    (tmp_path / "config.toml").write_text(to_toml(first["config"]))
    main(["--config", str(tmp_path / "config.toml"), "--json", "-"])
    assert json.loads(capsys.readouterr().out) == first


@pytest.mark.parametrize("spelling", ["--no-enable-prefix-caching", "--no_enable_prefix_caching", "--enable-prefix-caching=false"])
def test_a_vllm_command_says_whether_prefixes_are_cached(spelling: str) -> None:
    base = ServingConfig()
    read = parse_vllm_command(f"vllm serve Qwen/Qwen3-8B {spelling}", base=base)
    assert read.serving == replace(base, model="Qwen/Qwen3-8B", enable_prefix_caching=False)
    assert not read.not_modelled + read.without_effect


# --- traces ---------------------------------------------------------------------------------------------------------


def mooncake(folder: Path, prompts: list[tuple[int, list[int]]], *, apart_ms: int = 60_000) -> Path:
    path = folder / "trace.jsonl"
    rows = (
        {"timestamp": apart_ms * i, "input_length": length, "output_length": 2, "hash_ids": ids}
        for i, (length, ids) in enumerate(prompts)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


TRIE = [(1100, [0, 1, 2]), (1536, [0, 1, 3]), (700, [0, 4]), (512, [0]), (1100, [0, 1, 2]), (1536, [7, 8, 9]), (1536, [7, 8, 9])]


def test_the_ids_of_a_trace_are_its_content(tmp_path: Path) -> None:
    """Blocks of 512, of 16, and of 100, which end inside the ids: a block that lies in two of them is known by the later one."""
    path = mooncake(tmp_path, TRIE)
    for block_size, expected in {
        512: [0, 1024, 512, 0, 1024, 0, 1024],
        16: [0, 1024, 512, 496, 1088, 0, 1520],
        100: [0, 1000, 500, 500, 1000, 0, 1500],
        1024: [0, 1024, 0, 0, 1024, 0, 1024],
    }.items():
        done = run(scenario({"trace": str(path)}, {"block_size": block_size}), "paged", seed=0)
        assert requests_of(done)["num_cached_tokens"].tolist() == expected, block_size


def test_ids_that_only_one_id_follows_need_no_segment_of_their_own(tmp_path: Path) -> None:
    trace = read_trace(mooncake(tmp_path, TRIE), with_content=True)
    assert trace.content is not None
    contents = trace.content.contents(trace.prompt_tokens)
    assert [contents.of(i)["end_token"].tolist() for i in range(len(TRIE))] == [
        *([512, 1024, 1100], [512, 1024, 1536], [512, 700], [512]),
        *([512, 1024, 1100], [1536], [1536]),
    ]


@st.composite
def tries(draw: st.DrawFn) -> PromptContent:
    """Prompts that are paths from the roots of a random forest."""
    parents = [draw(st.integers(-1, i - 1)) for i in range(draw(st.integers(1, 12)))]

    def path(node: int) -> list[int]:
        return [] if node < 0 else [*path(parents[node]), node]

    rows = [path(draw(st.integers(0, len(parents) - 1))) for _ in range(draw(st.integers(1, 12)))]
    offsets = np.concatenate(([0], np.cumsum([len(row) for row in rows])))
    return PromptContent(ids=np.concatenate(rows), offsets=offsets, tokens_per_id=8)


@given(prompts=tries(), data=st.data(), block_size=st.sampled_from([3, 4, 8, 16]))
@settings(max_examples=200)
def test_merged_or_not_the_same_blocks_are_the_same(prompts: PromptContent, data: st.DataObject, block_size: int) -> None:
    """Each block by the id of its last token and its place, as no merging would have it, against its key."""
    lengths = 8 * np.diff(prompts.offsets) - np.array([data.draw(st.integers(0, 7)) for _ in range(len(prompts))])
    contents = prompts.contents(lengths)
    plain, keyed = [], []
    for i in range(len(prompts)):
        segments = contents.of(i)
        assert segments["end_token"][-1] == lengths[i]
        for block in range(lengths[i] // block_size):
            last = (block + 1) * block_size - 1
            plain.append((int(prompts.of(i)[last // 8]), block))
            segment = segments[np.searchsorted(segments["end_token"], last, side="right")]
            keyed.append((int(segment["word_a"]) + block, int(segment["word_b"])))
    assert len(set(plain)) == len(set(keyed)) == len(set(zip(plain, keyed, strict=True)))


def test_a_real_trace_one_prompt_at_a_time_finds_what_the_study_of_prefix_caches_finds(shared_data: Path) -> None:
    """With blocks of the trace's own size and room for all of them."""
    path = shared_data / "mooncake_synthetic.jsonl.gz"
    case = scenario({"trace": str(path)}, {"block_size": 512, "max_model_len": 131_072})
    trace = read_trace(path, with_content=True)
    trace = trace.where(trace.prompt_tokens + trace.output_tokens <= 131_072).first(800)
    trace = replace(trace, arrival_s=1000.0 * np.arange(800))
    roomy = replace(case.deployment, pool=replace(case.deployment.pool, num_blocks=60_001))
    done = run(replace(case, deployment=roomy, load=TraceReplay(trace=trace)), "paged", seed=0)
    assert trace.content is not None
    assert done.recorder.running_max == 1
    _, tokens = replay_block_pool(trace.content, trace.prompt_tokens, 60_000, "lru")
    assert requests_of(done)["num_cached_tokens"].tolist() == tokens.tolist()
    assert measure(done, ())["prefix_hit_rate"] == pytest.approx(tokens.sum() / trace.prompt_tokens.sum())
    assert tokens.sum() > 1_000_000


def test_a_trace_without_ids_has_private_prompts(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text("".join(f'{{"timestamp": {i}, "input_length": 64, "output_length": 3}}\n' for i in range(5)))
    got = figures(scenario({"trace": str(path)}))
    assert (got["num_queried_tokens"], got["num_hit_tokens"]) == (320, 0)


def test_ids_are_looked_at_only_where_they_matter(tmp_path: Path) -> None:
    path = mooncake(tmp_path, [(1100, [0, 1, 2]), (1100, [0, 1])])
    with pytest.raises(TraceFormatError, match="2 ids for 1100 tokens"):
        scenario({"trace": str(path)})
    scenario({"trace": str(path)}, {"enable_prefix_caching": False})
