"""Every engine as a preset: its own defaults, budget, flags, and its own way of failing when memory runs out."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pagedkv.catalogue import load_hardware
from pagedkv.errors import ConfigError
from pagedkv.scheduling.step import StepScheduler
from pagedkv.sims.config import LoadConfig, MeasurementConfig, ServingConfig, SimulationConfig
from pagedkv.sims.deployment import deploy
from pagedkv.sims.engine_flags import ENGINE_FLAGS, engine_names, of_one_engine
from pagedkv.sims.engines import ENGINES, load_engine
from pagedkv.sims.engines.ollama import default_context
from pagedkv.sims.fit import under_each_rule
from pagedkv.sims.results import simulate
from pagedkv.sims.run_texts import window_note
from pagedkv.sims.scenario import resolve
from pagedkv.step_batch import empty_batch
from pagedkv.units import GIB

SMALL = LoadConfig(users=6, think_time="2s", random_input_len=300, random_output_len=40, random_range_ratio=0.5, prefix_len=200)
BRIEF = MeasurementConfig(duration="30s", warmup="0s")


def config(engine: str, **serving: Any) -> SimulationConfig:
    return SimulationConfig(load=SMALL, serving=ServingConfig(engine=engine, **serving), measurement=BRIEF)


def scheduler(engine: str, *, num_blocks: int, max_num_seqs: int = 8, max_model_len: int = 128, **serving: Any) -> StepScheduler:
    """The scheduler of `engine` with its own settings, but over a pool of so many of its blocks."""
    deployment = deploy(ServingConfig(engine=engine, **serving))
    name = deployment.engine.allocators(deployment.config)[0]
    limits = replace(deployment.scheduler, max_num_seqs=max_num_seqs, max_model_len=max_model_len)
    pool = replace(
        deployment.pool_of(name), num_blocks=num_blocks, max_num_seqs=max_num_seqs, max_model_len=max_model_len, page_tokens=4
    )
    return deployment.engine.scheduler(deployment.config, limits, pool, name)


def run(one: StepScheduler, *, most: int = 5000) -> dict[str, list[Any]]:
    """Run until nobody is left; return who was preempted, who failed and who finished, each in order, and the steps."""
    seen: dict[str, list[Any]] = {"preempted": [], "failed": [], "finished": [], "batches": []}
    for _ in range(most):
        if not one.num_running + one.num_waiting:
            return seen
        step = one.schedule()
        seen["preempted"] += one.preempted.tolist()
        seen["failed"] += one.failed.tolist()
        one.check_integrity()
        if step.num_entries:
            seen["batches"].append(step.batch["request"][: step.num_entries].tolist())
            one.complete()
            seen["finished"] += one.finished.tolist()
        elif not one.failed.size:
            seen["failed"].append(one.drop_head())
    raise AssertionError(f"{most} steps, and {one.num_running} run, {one.num_waiting} wait")


@pytest.mark.parametrize("engine", ENGINES.names())
def test_every_engine_serves_and_accounts_for_its_memory(engine: str) -> None:
    results = simulate(resolve(config(engine)))
    document = results.document()
    budget = document["budget"]
    parts = ("weights", "engine_overhead", "activations", "cuda_graphs", "kv_cache", "os_reserve", "other_programs", "unassigned")
    assert sum(budget[part] for part in parts) == budget["visible"]
    for column in document["results"]:
        outcomes = sum(column[f"num_{outcome}"] for outcome in ("finished", "unfinished", "rejected", "failed"))
        assert outcomes == column["num_injected"] > 0
        assert column["num_finished"] > 0
        assert sum(column["kv"].values()) == pytest.approx(1.0, abs=1e-9)
        assert column["engine"] == engine
    for result in results.by_allocator.values():
        result.runs[0].allocator.check_integrity()
    assert simulate(resolve(config(engine))).document() == document


@pytest.mark.parametrize("engine", ENGINES.names())
def test_every_engine_says_what_it_does_and_what_happens_when_memory_runs_out(engine: str) -> None:
    deployment = deploy(ServingConfig(engine=engine))
    name = deployment.engine.allocators(deployment.config)[0]
    words = deployment.engine.in_words(deployment.config, deployment.scheduler, deployment.pool_of(name))
    assert words.endswith(".")
    assert not deployment.engine.at_exhaustion(deployment.config).endswith(".")


def test_vllm_preempts_who_came_last_and_lets_it_recompute() -> None:
    one = scheduler("vllm", num_blocks=9, scheduler_reserve_full_isl=True, enable_prefix_caching=False)
    assert [one.add(prompt_tokens=30, output_tokens=60) for _ in range(2)] == [0, 1]
    seen = run(one)
    assert set(seen["preempted"]) == {1}
    assert seen["failed"] == []
    assert seen["finished"] == [0, 1]


def test_sglang_retracts_the_one_with_the_fewest_outputs() -> None:
    one = scheduler("sglang", num_blocks=150, schedule_conservativeness=0.1, enable_prefix_caching=False)
    assert [one.add(prompt_tokens=length, output_tokens=60) for length in (40, 30)] == [0, 1]
    seen = run(one)
    assert seen["preempted"][:1] == [0]  # both have as many outputs: then the one with the longest prompt
    assert sorted(seen["finished"]) == [0, 1]


def test_sglang_computes_prompts_while_the_others_wait_unless_chunks_are_mixed() -> None:
    for mixed, together in ((None, False), (True, True)):
        one = scheduler("sglang", num_blocks=1000, enable_mixed_chunk=mixed)
        one.add(prompt_tokens=20, output_tokens=10)
        one.schedule()
        one.complete()
        one.add(prompt_tokens=20, output_tokens=10)
        step = one.schedule()
        assert (step.num_entries == 2) is together


def test_tensorrt_llm_starts_nobody_who_might_have_to_stop() -> None:
    one = scheduler("tensorrt-llm", num_blocks=4, enable_prefix_caching=False)  # of 32 tokens: one request of 96 needs 3
    assert [one.add(prompt_tokens=33, output_tokens=63) for _ in range(2)] == [0, 1]
    seen = run(one)
    assert seen["preempted"] == []
    assert seen["finished"] == [0, 1]
    assert all(len(batch) == 1 for batch in seen["batches"])


def test_tensorrt_llm_pauses_under_max_utilization() -> None:
    one = scheduler("tensorrt-llm", num_blocks=5, capacity_scheduler_policy="max_utilization", enable_prefix_caching=False)
    assert [one.add(prompt_tokens=33, output_tokens=63) for _ in range(2)] == [0, 1]
    seen = run(one)
    assert set(seen["preempted"]) == {1}
    assert sorted(seen["finished"]) == [0, 1]
    assert max(map(len, seen["batches"])) == 2


def test_tensorrt_llm_refuses_a_prompt_that_does_not_fit_into_one_step() -> None:
    for chunked, request in ((None, None), (True, 0)):
        one = scheduler("tensorrt-llm", num_blocks=999, max_model_len=20_000, enable_chunked_prefill=chunked)
        assert one.add(prompt_tokens=9000, output_tokens=10) == request


def test_llama_cpp_ends_everybody_with_an_error() -> None:
    one = scheduler("llama-cpp", num_blocks=120, max_num_seqs=2)
    assert [one.add(prompt_tokens=50, output_tokens=60) for _ in range(3)] == [0, 1, 2]
    seen = run(one)
    assert sorted(seen["failed"]) == [0, 1]
    assert seen["finished"] == [2]
    assert seen["preempted"] == []


def test_llama_cpp_with_a_stream_for_each_slot_never_runs_out() -> None:
    one = scheduler("llama-cpp", num_blocks=256, max_num_seqs=2, parallel=2)
    assert [one.add(prompt_tokens=50, output_tokens=60) for _ in range(4)] == [0, 1, 2, 3]
    seen = run(one)
    assert seen["failed"] == []
    assert len(seen["finished"]) == 4
    assert max(map(len, seen["batches"])) == 2


def test_ollama_turns_away_who_does_not_fit_into_the_queue() -> None:
    one = scheduler("ollama", num_blocks=128, max_num_seqs=1, max_queue=2)
    assert [one.add(prompt_tokens=10, output_tokens=5) for _ in range(5)] == [0, 1, 2, None, None]
    assert len(run(one)["finished"]) == 3


def test_orca_makes_requests_wait_for_a_piece_that_is_large_enough() -> None:
    deployment = deploy(ServingConfig(engine="orca"))
    for name, at_once in (("contiguous-max", 2), ("contiguous-oracle", 4)):
        pool = replace(deployment.pool_of(name), num_blocks=16, max_num_seqs=8, max_model_len=128)
        limits = replace(deployment.scheduler, max_num_seqs=8, max_model_len=128)
        one = deployment.engine.scheduler(deployment.config, limits, pool, name)
        for _ in range(6):
            one.add(prompt_tokens=33, output_tokens=31)
        seen = run(one)
        assert seen["preempted"] == seen["failed"] == []
        assert max(map(len, seen["batches"])) == at_once


def test_vattention_keeps_its_watermark_and_preempts_the_last() -> None:
    one = scheduler("vattention", num_blocks=8)
    assert [one.add(prompt_tokens=30, output_tokens=60) for _ in range(2)] == [0, 1]
    seen = run(one)
    assert set(seen["preempted"]) == {1}
    assert seen["finished"] == [0, 1]


def test_prefixes_are_shared_by_the_engines_that_share_them() -> None:
    hit = {name: simulate(resolve(config(name))).document()["results"][0]["prefix_hit_rate"] for name in ENGINES.names()}
    assert all(hit[name] > 0.3 for name in ("vllm", "sglang", "tensorrt-llm")), hit
    assert 0 < hit["llama-cpp"] <= 1, hit
    assert hit["orca"] is hit["vattention"] is None


def test_ollama_sizes_a_slot_by_the_memory() -> None:
    assert [default_context(int(gib * 2**30)) for gib in (121.69, 47, 46.9, 23.5, 22.9, 8)] == [
        262144,
        262144,
        32768,
        32768,
        4096,
        4096,
    ]
    spark = deploy(ServingConfig(engine="ollama"))
    assert (spark.scheduler.max_model_len, spark.scheduler.max_num_seqs) == (131072, 1)  # the model's own limit
    assert deploy(ServingConfig(engine="ollama", parallel=3, ctx_size=4096)).budget.num_blocks == 3 * 4096


def test_defaults_on_a_spark() -> None:
    limits = {name: deploy(ServingConfig(engine=name)).scheduler for name in ENGINES.names()}
    assert (limits["vllm"].max_num_seqs, limits["vllm"].max_num_batched_tokens) == (256, 2048)
    assert limits["sglang"].max_num_batched_tokens == 8192
    assert (limits["tensorrt-llm"].max_num_seqs, limits["tensorrt-llm"].max_num_batched_tokens) == (2048, 8192)
    assert (limits["llama-cpp"].max_num_seqs, limits["llama-cpp"].max_model_len) == (4, 131072)
    assert load_hardware("dgx-spark").visible_bytes > 47 * 2**30


@pytest.mark.parametrize(
    ("model", "published_tokens_per_s"),
    [("gpt-oss-120b", 58.72), ("gpt-oss-20b", 83.43)],  # rows f21 and 21 of docs/validation/rows.md, an empty context
)
def test_llama_cpp_loads_gpt_oss_as_its_gguf(model: str, published_tokens_per_s: float) -> None:
    """Beside the experts a GGUF is q8_0: decoding is as fast as published, where 16 bits would be a third slower."""
    for engine in ENGINES.names():
        served = deploy(ServingConfig(engine=engine, model=model, max_num_seqs=4, max_model_len=8192))
        assert served.weight_format.name == ("mxfp4+q8_0" if engine == "llama-cpp" else "mxfp4"), engine
    served = deploy(ServingConfig(engine="llama-cpp", model=model))
    assert (served.calibration.status, served.config.quantization) == ("validated", None)
    step = empty_batch(1)
    step["num_scheduled_tokens"][:], step["num_slots_needed"][:] = 1, 1
    assert 1 / served.step_time.cost(step, 1).total_s == pytest.approx(published_tokens_per_s, rel=0.05)
    asked = deploy(ServingConfig(engine="llama-cpp", model=model, quantization="mxfp4"))
    assert asked.weight_format.name == "mxfp4"
    assert asked.budget.weights > served.budget.weights


def test_other_rules_have_the_weights_that_their_engines_load() -> None:
    served = [deploy(ServingConfig(engine=name, model="gpt-oss-20b")) for name in ("vllm", "llama-cpp")]
    for deployment in served:
        (rule,) = [rule for rule in under_each_rule(deployment) if rule.engine == "tensorrt-llm"]
        assert rule.equation.split(" − ")[1] == f"{served[0].budget.weights / GIB:.2f}"
    assert deploy(ServingConfig(engine="llama-cpp")).weight_format.name == "bf16", "all else as the model has it"


def test_the_note_on_windows_is_of_the_engine() -> None:
    """Only vLLM gives back what a window has left behind, if nobody says otherwise."""
    for name in ENGINES.names():
        serving = ServingConfig(engine=name, model="gpt-oss-20b", max_num_seqs=4, max_model_len=8192)
        note = window_note(deploy(serving))
        if name == "vllm":
            assert note is None
            note = window_note(deploy(replace(serving, disable_hybrid_kv_cache_manager=True)))
        assert note is not None
        assert ("--allocator hybrid" in note) == (name == "vllm")
        assert ("--swa-full" in note) == (name in ("llama-cpp", "ollama"))


def test_the_note_on_windows_says_what_they_take_under_llama_cpp() -> None:
    def note(model: str, **asked: Any) -> str:
        return str(window_note(deploy(ServingConfig(engine="llama-cpp", model=model, **asked))))

    assert "cells of their own, 1,024 that take 0.04 GiB" in note("gpt-oss-120b")
    assert "keep all their tokens: --swa-full" in note("gpt-oss-120b", swa_full=True)
    assert "runs this model without it" in note("mistral-7b-v0.1")
    assert window_note(deploy(ServingConfig(engine="llama-cpp", model="qwen3-8b"))) is None
    with pytest.raises(ConfigError, match=r"--swa-full True: vllm has no such setting"):
        deploy(ServingConfig(engine="vllm", model="gpt-oss-120b", swa_full=True))


@pytest.mark.parametrize("engine", ["llama-cpp", "ollama"])
def test_windows_apart_leave_the_tokens_as_they_are(engine: str) -> None:
    """The cells of the other layers are what a request may be as long as."""
    lean, full = (deploy(ServingConfig(engine=engine, model="gpt-oss-20b", swa_full=swa_full)) for swa_full in (False, True))
    assert lean.pool == replace(full.pool, window_tokens=128, window_cells=lean.budget.window_cells)
    assert lean.scheduler == full.scheduler
    assert full.budget.kv_cache > 1.9 * lean.budget.kv_cache


@pytest.mark.parametrize(
    ("asked", "proposed"), [({"parallel": 3}, "--parallel 6"), ({"max_num_seqs": 3}, "--max-num-seqs 6"), ({}, "--max-num-seqs 8")]
)
def test_more_slots_are_proposed_by_the_flag_that_counts(asked: dict[str, Any], proposed: str) -> None:
    crowd = replace(config("llama-cpp", **asked), load=replace(SMALL, users=60))
    (result,) = simulate(resolve(crowd)).document()["results"]
    command = result["verdict"]["next_command"]
    assert proposed in command
    assert ("--parallel" in command, "--max-num-seqs" in command) == ("--parallel" in proposed, "--max-num-seqs" in proposed)


def test_llama_cpp_prices_every_micro_batch() -> None:
    """A prompt of 2,048 tokens is four forward passes of 512, each of which reads the weights."""
    few = simulate(resolve(replace(config("llama-cpp", ubatch_size=2048), load=replace(SMALL, random_input_len=2000))))
    many = simulate(resolve(replace(config("llama-cpp", ubatch_size=64), load=replace(SMALL, random_input_len=2000))))
    ttft = [results.document()["results"][0]["ttft_s"]["p50"] for results in (few, many)]
    assert ttft[1] > 1.5 * ttft[0]


@pytest.mark.parametrize(
    ("engine", "serving", "says"),
    [
        ("vllm", {"mem_fraction_static": 0.5}, "--mem-fraction-static 0.5: vllm has no such setting; it is for --engine sglang"),
        ("sglang", {"watermark": 0.1}, "it is for --engine vllm or vattention"),
        ("llama-cpp", {"block_size": 32}, "it is for --engine vllm or orca or vattention"),
        ("naive", {"enable_prefix_caching": True}, "has no such setting"),
        ("llama-cpp", {"enforce_eager": True}, "has no such setting"),
        ("sglang@0.4", {}, "sglang is modelled in one version; write --engine sglang"),
        ("sglnag", {}, "sglang"),
        ("sglang", {"schedule_policy": "best"}, "fcfs"),
        ("sglang", {"page_size": 0}, "page-size is 0: needs 1 or more"),
        ("sglang", {"page_size": 3, "max_num_batched_tokens": 1000, "mem_fraction_static": 0.8}, "999 would work"),
        ("tensorrt-llm", {"capacity_scheduler_policy": "hope"}, "guaranteed_no_evict"),
        ("tensorrt-llm", {"tokens_per_block": 10}, "power of two"),
        ("ollama", {"parallel": 0}, "parallel is 0: needs 1 or more"),
        ("llama-cpp", {"ctx_size": 4096, "max_model_len": 8192}, "use --ctx-size 8192"),
        ("ollama", {"max_queue": -1}, "max_queue is -1: needs 0 or more"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_with_what_would_work(engine: str, serving: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as error:
        simulate(resolve(config(engine, **serving)))
    assert says in str(error.value)


@pytest.mark.parametrize("engine", sorted(set(ENGINES.names()) - {"vllm"}))
def test_an_engine_runs_on_its_own_allocator_only(engine: str) -> None:
    with pytest.raises(ConfigError, match=f"--allocator paged: {engine} runs on "):
        simulate(resolve(replace(config(engine), measurement=replace(BRIEF, allocator=("paged",)))))


def test_every_flag_of_some_engines_is_a_setting_of_known_engines() -> None:
    settings = set(ServingConfig.__dataclass_fields__)
    assert set(ENGINE_FLAGS) <= settings
    assert {engine for engines in ENGINE_FLAGS.values() for engine in engines} <= set(ENGINES.names())


def test_one_engine_of_several_hears_only_of_its_own_settings() -> None:
    both = ServingConfig(engine="vllm, sglang,vllm", watermark=0.1, page_size=16, max_num_seqs=7)
    assert engine_names(both) == ("vllm", "sglang")
    assert of_one_engine(both, "vllm") == ServingConfig(engine="vllm", watermark=0.1, max_num_seqs=7)
    assert of_one_engine(both, "sglang") == ServingConfig(engine="sglang", page_size=16, max_num_seqs=7)
    assert load_engine("vllm@0.19").name == "vllm@0.19"


def test_engines_get_the_same_requests() -> None:
    logs = [
        simulate(
            resolve(
                replace(
                    config(name),
                    load=replace(SMALL, users=None, think_time=None, request_rate=1.0, num_prompts=20),
                    measurement=MeasurementConfig(),
                )
            )
        ).by_allocator
        for name in ("vllm", "sglang", "ollama")
    ]
    first, *others = [next(iter(each.values())).runs[0].log for each in logs]
    for other in others:
        assert np.array_equal(first.arrival_s, other.arrival_s)
        assert np.array_equal(first.prompt_tokens, other.prompt_tokens)
        assert np.array_equal(first.output_tokens, other.output_tokens)
