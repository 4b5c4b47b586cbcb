"""`simulate fit` says what a real allocator holds when it is filled request by request."""

import json
import re
import shlex
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pagedkv.allocators.hybrid import HybridAllocator
from pagedkv.errors import ConfigError
from pagedkv.heaps import HEAPS
from pagedkv.kv_request import KVRequest
from pagedkv.layer_groups import plan_layer_groups
from pagedkv.sims.cli import main
from pagedkv.sims.config import ServingConfig
from pagedkv.sims.deployment import Deployment, deploy, memory_request
from pagedkv.sims.fit import CONTEXTS, fit, under_each_rule
from pagedkv.step_allocation import step_allocator
from pagedkv.step_batch import empty_batch

PLAIN: dict[str, Any] = {"model": "qwen2.5-0.5b", "hardware": "rtx-4090"}
WITH_STATE: dict[str, Any] = {"model": "qwen3.5-27b", "hardware": "dgx-spark"}


def filled(deployment: Deployment, allocator: str, context: int, *, most: int | None = None) -> int:
    """Return how many requests of `context` tokens a real allocator admits one after the other, `most` at most."""
    pool = deployment.pool_of(allocator)
    if most is None:
        most = min(pool.num_slots // (pool.state_slots + 1) + 1, pool.num_blocks if allocator == "hybrid" else pool.num_slots)
    one = step_allocator(allocator, replace(pool, max_num_seqs=most, watermark=0.0))
    slots = one.admission_slots(context, 1)
    if slots is None:
        return 0
    batch = empty_batch(most)
    batch["row"][:] = range(most)
    batch["num_slots_needed"][:] = batch["num_known_tokens"][:] = batch["num_scheduled_tokens"][:] = context
    batch["admission_slots"][:] = slots
    number = one.allocate_slots(batch, 0, most, 0)
    one.check_integrity()
    return number


@st.composite
def deployments(draw: st.DrawFn) -> Deployment:
    """Small pools, so that they are filled in no time; some just hold one request."""
    state = draw(st.booleans())
    block_size, max_model_len = draw(st.sampled_from([1, 8, 16, 48])), draw(st.integers(1, 1100))
    serving = ServingConfig(
        **(WITH_STATE if state else PLAIN),
        block_size=block_size,
        max_model_len=max_model_len,
        disable_hybrid_kv_cache_manager=draw(st.booleans()),
        contiguous_heap=draw(st.sampled_from(HEAPS.names())),
        watermark=draw(st.sampled_from([0.0, 0.3])),
    )
    request = memory_request(serving)
    more = draw(st.integers(0, 20_000 if state else 1500)) * request.kv_bytes_per_token // request.block_bytes
    return deploy(replace(serving, num_gpu_blocks_override=request.blocks_for_one_request + more))


@given(deployment=deployments(), share=st.floats(0, 1))
@settings(max_examples=60)
def test_rows_are_what_real_allocators_hold(deployment: Deployment, share: float) -> None:
    longest = deployment.scheduler.max_model_len
    answer = fit(deployment, context=max(round(share * longest), 1))
    assert answer.at_context is not None
    assert answer.at_context.context == max(round(share * longest), 1)
    for row in (*answer.rows, answer.at_context):
        assert row.paged == filled(deployment, deployment.own_allocator, row.context)
        assert row.contiguous_max == filled(deployment, "contiguous-max", row.context)


@given(deployment=deployments(), users=st.integers(1, 60))
@settings(max_examples=60)
def test_so_many_users_can_have_the_longest_context_and_no_longer_one(deployment: Deployment, users: int) -> None:
    answer = fit(deployment, users=users)
    assert answer.longest_context is not None
    assert answer.longest_context <= deployment.scheduler.max_model_len
    if answer.longest_context:
        assert filled(deployment, deployment.own_allocator, answer.longest_context, most=users) == users
    if answer.longest_context < deployment.scheduler.max_model_len:
        assert filled(deployment, deployment.own_allocator, answer.longest_context + 1, most=users) < users


@pytest.mark.parametrize("names", [{}, WITH_STATE], ids=["llama-3.1-8b", "qwen3.5-27b"])
def test_a_whole_machine(names: dict[str, Any]) -> None:
    deployment = deploy(ServingConfig(**names))
    answer = fit(deployment)
    budget, longest = deployment.budget, deployment.scheduler.max_model_len
    assert [row.context for row in answer.rows] == [*(context for context in CONTEXTS if context < longest), longest]
    spec = deployment.model.kv_spec("auto")
    if deployment.own_allocator == "paged":
        assert answer.kv_tokens == (budget.num_blocks - 1) * 16  # without vLLM's null block
    else:
        assert answer.kv_tokens == pytest.approx(answer.rows[-1].paged * longest, rel=0.03)
    assert answer.formula_users == pytest.approx(budget.kv_cache / longest / spec.bytes_per_token)
    assert answer.rows[-1].paged <= answer.formula_users
    for row in answer.rows:
        assert row.paged == filled(deployment, deployment.own_allocator, row.context, most=1000)
    size = plan_layer_groups(deployment.model.layer_groups, block_size=16).block_size
    each = size * -(-answer.rows[0].context // size) * spec.bytes_per_token + spec.state_bytes_per_sequence
    assert answer.rows[0].paged == pytest.approx(budget.kv_cache / each, rel=0.01)  # by bytes, without any block
    assert (answer.users, answer.longest_context, answer.at_context) == (None, None, None)


@pytest.mark.parametrize("model", ["gpt-oss-20b", "gemma-3-12b", "llama-4-scout"])
def test_where_windows_give_blocks_back_all_fit_while_all_are_at_their_peak(model: str) -> None:
    serving = ServingConfig(model=model, hardware="b200", quantization="nvfp4", kv_cache_memory_bytes="6GiB", max_model_len=16_384)
    deployment, context, chunk = deploy(replace(serving, max_num_batched_tokens=512)), 12_345, 512
    answer = fit(deployment, context=context)
    assert answer.at_context is not None
    allocator = HybridAllocator(replace(deployment.pool_of("hybrid"), enable_prefix_caching=False, max_num_seqs=1000))
    requests = [KVRequest(request_id=i, num_tokens=context) for i in range(answer.at_context.paged)]
    for computed in range(0, context, chunk):
        for request in requests:
            assert allocator.allocate_slots(request, min(chunk, context - computed)) is not None
            request.num_computed_tokens = min(computed + chunk, context)


@example(users=1, context=1)
@given(users=st.integers(-3, 2), context=st.integers(-3, 40_000))
@settings(max_examples=30)
def test_what_nobody_can_mean_is_refused(users: int, context: int) -> None:
    deployment = deploy(ServingConfig())
    if users >= 1 and 1 <= context <= 32_768:
        fit(deployment, users=users, context=context)
    else:
        with pytest.raises(ConfigError, match="needs 1"):
            fit(deployment, users=users, context=context)


@pytest.mark.parametrize("machine", [{}, {"other_programs": "12GiB"}, {"free_memory": "105GiB"}, {"os_reserve": "9GiB"}])
def test_every_memory_rule_is_about_this_machine(machine: dict[str, Any]) -> None:
    deployment = deploy(ServingConfig(**machine))
    rules = {other.engine: other for other in under_each_rule(deployment)}
    assert set(rules) == {"vllm", "sglang", "tensorrt-llm", "llama-cpp", "ollama", "naive"}
    assert rules["vllm"].kv_tokens == fit(deployment).kv_tokens  # here its defaults are what is deployed
    assert rules["vllm"].equation == deployment.budget.equation
    free = deployment.budget.free_at_start
    for name, rule in rules.items():
        assert rule.kv_cache_bytes is not None
        assert rule.kv_tokens is not None
        assert rule.kv_cache_bytes == pytest.approx(rule.kv_tokens * 131_072, rel=0.001), name
        assert rule.kv_cache_bytes < free - deployment.budget.weights
    whole = next(other for other in under_each_rule(deploy(ServingConfig())) if other.engine == "sglang")
    assert (rules["sglang"].kv_tokens != whole.kv_tokens) == bool(machine)  # its share is of the memory that is free


@pytest.mark.parametrize("asked", ["vllm", "llama-cpp"])
@pytest.mark.parametrize("model", ["llama-3.1-8b", "gpt-oss-20b"])
def test_each_rule_gives_what_its_engine_starts_with_whichever_is_asked_about(asked: str, model: str) -> None:
    rules = under_each_rule(deploy(ServingConfig(model=model, engine=asked)))
    for rule in rules:
        serving = ServingConfig(model=model, engine=rule.engine)
        if rule.kv_tokens is None:
            with pytest.raises(ConfigError) as refused:
                deploy(serving)
            assert str(refused.value).startswith(rule.equation)
        else:
            deployment = deploy(serving)
            budget, apart = deployment.budget, deployment.own_allocator == "hybrid"
            tokens = fit(deployment).kv_tokens if apart else budget.usable_blocks * budget.block_size
            assert (rule.kv_tokens, rule.equation) == (tokens, budget.equation)
    assert rules == under_each_rule(deploy(ServingConfig(model=model)))


def test_a_rule_under_which_the_engine_does_not_start_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    (sglang,) = [other for other in under_each_rule(deploy(ServingConfig(model="gpt-oss-120b"))) if other.engine == "sglang"]
    assert (sglang.kv_tokens, sglang.kv_cache_bytes) == (None, None)
    assert "--mem-fraction-static" in sglang.equation
    main(shlex.split("fit --model gpt-oss-120b"))
    assert "sglang: does not start" in capsys.readouterr().out


def document(arguments: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    main(shlex.split(f"fit {arguments} --json -"))
    read: dict[str, Any] = json.loads(capsys.readouterr().out)
    return read


def test_one_json_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--model qwen3.5-27b --users 40 --context 1000 --block-size 32"
    read = document(arguments, capsys)
    deployment = deploy(ServingConfig(model="qwen3.5-27b", block_size=32))
    expected = asdict(fit(deployment, users=40, context=1000))
    expected["engines"] = [asdict(other) for other in under_each_rule(deployment)]
    assert read == json.loads(json.dumps(expected))
    main(shlex.split(f"fit {arguments} --json {tmp_path}/new/fit.json"))
    assert capsys.readouterr().out == ""
    assert json.loads((tmp_path / "new" / "fit.json").read_text("utf-8")) == read


def test_people_read_the_same_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--model qwen3.5-27b --users 40 --context 1000"
    read = document(arguments, capsys)
    main(shlex.split(f"fit {arguments}"))
    text = capsys.readouterr().out
    rows = re.findall(r"^ *([0-9,]+) +([0-9,]+) +([0-9,]+) *$", text, re.MULTILINE)
    assert [[int(cell.replace(",", "")) for cell in row] for row in rows] == [list(row.values()) for row in read["rows"]]
    words = " ".join(text.split())
    assert f"claims {read['formula_users']:.1f} users" in words
    assert f"40 requests at once can have {read['longest_context']:,} tokens each" in words
    assert f"At 1,000 tokens each, {read['at_context']['paged']:,} requests fit at once" in words
    assert "max-num-seqs" not in words


@pytest.mark.parametrize("arguments", ["", "--max-num-seqs 40 --max-model-len 131072 --context 8000", "--max-num-seqs 1 --users 2"])
def test_more_requests_than_max_num_seqs_do_not_run_at_once(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(shlex.split(f"fit {arguments}"))
    limit = re.search(r"max-num-seqs, ([0-9,]+) run at once", " ".join(capsys.readouterr().out.split()))
    assert limit
    assert int(limit[1]) == (40 if "40" in arguments else 1 if arguments else 256)


BAD_INPUT = {
    "--users 0": ("--users is 0", "1 or more"),
    "--users -5": ("-5",),
    "--users 2.5": ("2.5",),
    "--context 0": ("--context is 0", "32768"),
    "--context 32769": ("--context is 32769", "needs 1 to max-model-len, 32768"),
    "--context 2049 --max-model-len 2048": ("2049", "2048"),
    "--model llama-3.1-70b --quantization bf16": ("What fits: ",),
    "--request-rate 5": ("--request-rate",),
    "--json ''": ("--json is ''",),
}


@pytest.mark.parametrize("arguments", BAD_INPUT)
def test_bad_input_is_explained(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(shlex.split(f"fit {arguments}"))
    out, err = capsys.readouterr()
    assert (exit.value.code, out) == (2, "")
    assert err.startswith("error: ")
    assert all(part in err for part in BAD_INPUT[arguments])
