"""The step-time model: its laws, its parts against brute force, and measured steps."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pagedkv.catalogue import load_hardware, load_model
from pagedkv.model_spec import ModelSpec
from pagedkv.sims.step_constants import EAGER_S_PER_LAYER
from pagedkv.sims.step_time import RooflineStepTime, StepCost
from pagedkv.step_batch import empty_batch
from pagedkv.weight_format import load_weight_format

Entry = tuple[int, int]
"""(tokens computed in the step, context including them)."""


def roofline(
    model: ModelSpec, hardware: str = "dgx-spark", quantization: str | None = None, *, eager: bool = False
) -> RooflineStepTime:
    return RooflineStepTime(
        model,
        load_hardware(hardware),
        weight_format=load_weight_format(quantization) if quantization else model.native_format,
        kv_spec=model.kv_spec("auto"),
        enforce_eager=eager,
    )


def set_coefficients(step_time: RooflineStepTime, **changes: Any) -> None:
    step_time.coefficients = step_time.coefficients._replace(model=step_time.coefficients.model._replace(**changes))


def cost(step_time: RooflineStepTime, entries: list[Entry]) -> StepCost:
    batch = empty_batch(len(entries) + 1)
    batch["num_scheduled_tokens"][:], batch["num_slots_needed"][:] = 10**6, 10**6  # what lies beyond the entries must not count
    for i, (new, context) in enumerate(entries):
        batch["num_scheduled_tokens"][i], batch["num_slots_needed"][i] = new, context
    return step_time.cost(batch, len(entries))


LLAMA, MOE = load_model("llama-3.1-8b"), load_model("gpt-oss-20b")
UNWINDOWED = replace(MOE, layer_groups=tuple(replace(group, kind="full", window=None) for group in MOE.layer_groups))
STEP_TIMES = {name: roofline(load_model(name)) for name in ("llama-3.1-8b", "gpt-oss-20b", "qwen2.5-7b")}
ENTRY = st.tuples(st.integers(1, 2048), st.integers(0, 30_000)).map(lambda e: (e[0], e[0] + e[1]))
ENTRIES = st.lists(ENTRY | st.integers(1, 30_000).map(lambda context: (1, context)), min_size=1, max_size=40)


@given(entries=ENTRIES, name=st.sampled_from(sorted(STEP_TIMES)), more=st.integers(1, 2000), where=st.integers(0, 39))
def test_more_work_never_takes_less_time(entries: list[Entry], name: str, more: int, where: int) -> None:
    step_time, i = STEP_TIMES[name], where % len(entries)
    before, (new, context) = cost(step_time, entries).total_s, entries[i]
    more_tokens = [*entries[:i], (new + more, context + more), *entries[i + 1 :]]
    longer_context = [*entries[:i], (new, context + more), *entries[i + 1 :]]
    one_more = [*entries, (1, more)]
    for heavier in (more_tokens, longer_context, one_more):
        assert cost(step_time, heavier).total_s >= before * (1 - 1e-12)
    assert cost(step_time, entries[::-1]).total_s == pytest.approx(before)


@given(entries=ENTRIES, name=st.sampled_from(sorted(STEP_TIMES)), factor=st.floats(0.2, 5.0), more=st.floats(1.0, 3.0))
def test_all_of_a_step_is_slower_by_a_factor_and_one_half_by_no_more(
    entries: list[Entry], name: str, factor: float, more: float
) -> None:
    step_time = STEP_TIMES[name]
    took = cost(step_time, entries)
    slow = cost(step_time.slower(decode_factor=factor, prefill_factor=factor), entries)
    assert slow.total_s == pytest.approx(factor * took.total_s)
    assert slow[:3] == pytest.approx([factor * each for each in took[:3]])
    for decode, prefill in ((factor, factor * more), (factor * more, factor)):
        between = cost(step_time.slower(decode_factor=decode, prefill_factor=prefill), entries).total_s
        assert slow.total_s * (1 - 1e-9) <= between <= more * slow.total_s * (1 + 1e-9)


@given(entries=ENTRIES)
def test_a_window_never_costs_more_than_full_attention(entries: list[Entry]) -> None:
    windowed, full = (cost(roofline(model), entries).total_s for model in (MOE, UNWINDOWED))
    assert windowed <= full * (1 + 1e-12)
    if all(context <= 128 for _, context in entries):
        assert windowed == pytest.approx(full)


def test_a_long_context_costs_less_through_windows() -> None:
    windowed, full = (cost(roofline(model), [(1, 100_000)]).memory_s for model in (MOE, UNWINDOWED))
    group_bytes = MOE.kv_spec("auto").group_bytes_per_token
    saved = next(b for b, group in zip(group_bytes, MOE.layer_groups, strict=True) if group.window)
    assert full - windowed == pytest.approx(saved * (99_999 - 128) / load_hardware("dgx-spark").kv_read_bandwidth_bytes_per_s)


@given(new=st.integers(1, 300), before=st.integers(0, 300), window=st.integers(1, 400))
def test_query_key_pairs_by_counting(new: int, before: int, window: int) -> None:
    step_time = roofline(LLAMA)
    set_coefficients(
        step_time,
        dense_weight_s=0.0,
        linear_s_per_token=0.0,
        head_s_per_sequence=0.0,
        windows=np.array([window]),
        kv_s_per_token=np.zeros(1),
        attention_s_per_pair=np.ones(1),
    )
    # Query j sees itself and the keys before it, of these the last `window`.
    pairs = sum(key <= query and query - key < window for query in range(before, before + new) for key in range(before + new))
    assert cost(step_time, [(new, before + new)]).compute_s == pairs


def test_kv_bytes_of_a_step() -> None:
    """A step reads the context's keys and values, and writes and reads its own."""
    hardware, per_token = load_hardware("dgx-spark"), LLAMA.kv_spec("auto").bytes_per_token
    short, long = (cost(roofline(LLAMA), [(1, context)]).memory_s for context in (1, 5001))
    assert long - short == pytest.approx(5000 * per_token / hardware.kv_read_bandwidth_bytes_per_s)
    weights_s = LLAMA.dense_streamed_bytes(LLAMA.native_format) / hardware.read_bandwidth_bytes_per_s
    assert short == pytest.approx(weights_s + 2 * per_token / hardware.kv_read_bandwidth_bytes_per_s)


def test_a_prompt_is_bound_by_arithmetic() -> None:
    """2 x parameters per token without the input table, the head once per sequence, and the triangle of attention."""
    n, hardware = 2048, load_hardware("dgx-spark")
    linear = n * 2.0 * (LLAMA.params_total - LLAMA.embedding_params - LLAMA.head_params) + 2.0 * LLAMA.head_params
    attention = n * (n + 1) / 2 * 2 * LLAMA.num_layers * LLAMA.num_attention_heads * (128 + 128)
    whole = cost(roofline(LLAMA), [(n, n)])
    assert whole.memory_s == 0.0
    assert whole.compute_s == pytest.approx((linear + attention) / hardware.reached_flops["bf16"].value, rel=1e-3)


def test_a_mixture_reads_few_experts_for_one_token_and_all_for_many() -> None:
    hardware, fmt = load_hardware("dgx-spark"), MOE.native_format

    def weights_s(tokens: int) -> float:
        step_time = roofline(MOE)
        groups = step_time.coefficients.model.windows.size
        nothing = dict.fromkeys(("kv_s_per_token", "attention_s_per_pair"), np.zeros(groups))
        set_coefficients(step_time, linear_s_per_token=0.0, head_s_per_sequence=0.0, **nothing)
        return cost(step_time, [(tokens, tokens)]).memory_s

    def expected_s(share: float) -> float:
        return (MOE.dense_streamed_bytes(fmt) + share * MOE.expert_bytes(fmt)) / hardware.read_bandwidth_bytes_per_s

    assert MOE.num_experts > MOE.experts_per_token > 0
    assert weights_s(1) == pytest.approx(expected_s(MOE.experts_per_token / MOE.num_experts))
    assert weights_s(2000) == pytest.approx(expected_s(1.0))
    one, two, four = weights_s(1), weights_s(2), weights_s(4)
    assert 0 < four - two < 2 * (two - one)  # the more tokens, the more experts they share


def test_overheads() -> None:
    hardware = load_hardware("dgx-spark")
    assert cost(roofline(LLAMA), [(1, 9)] * 7).overhead_s == pytest.approx(
        hardware.step_overhead_s + 7 * hardware.sequence_overhead_s
    )
    eager, graphs = (cost(roofline(LLAMA, eager=eager), [(1, 9)]).overhead_s for eager in (True, False))
    assert eager - graphs == pytest.approx(LLAMA.num_layers * EAGER_S_PER_LAYER)


@given(prompt=st.integers(1, 9000), output=st.integers(1, 300), budget=st.sampled_from([512, 2048, 8192]))
def test_an_unloaded_request_is_its_steps_one_after_the_other(prompt: int, output: int, budget: int) -> None:
    step_time = STEP_TIMES["llama-3.1-8b"]
    chunks = [min(budget, prompt - start) for start in range(0, prompt, budget)]
    steps = [(chunk, sum(chunks[: i + 1])) for i, chunk in enumerate(chunks)] + [(1, prompt + j) for j in range(1, output)]
    exact_s = sum(cost(step_time, [entry]).total_s for entry in steps)
    assert step_time.unloaded_e2e_s(prompt, output, max_num_batched_tokens=budget) == pytest.approx(exact_s, rel=1e-4)


def test_a_measured_decode_step_of_an_rtx_4090() -> None:
    """vLLM 0.19, Llama-3.1-8B bf16: steps without prefill take 24.9 ms at 32 requests and 5.31 GB of KV."""
    context = round(5.31e9 / LLAMA.kv_spec("auto").bytes_per_token / 32)
    assert cost(roofline(LLAMA, "rtx-4090"), [(1, context)] * 32).total_s == pytest.approx(24.9e-3, rel=0.15)


def test_measured_prefill_of_an_rtx_4090() -> None:
    """The same run: full steps of 2,048 tokens take 198.5 ms."""
    assert cost(roofline(LLAMA, "rtx-4090"), [(256, 256)] * 8).total_s == pytest.approx(198.5e-3, rel=0.1)


def test_one_user_of_a_spark() -> None:
    """Llama-3.1-8B in bf16 streams 15 GB of weights per token: 12 to 15 tokens/s are what owners report."""
    assert 65e-3 < cost(roofline(LLAMA), [(1, 1000)]).total_s < 85e-3
    assert cost(roofline(LLAMA, quantization="nvfp4"), [(1, 1000)]).total_s < 30e-3


@pytest.mark.parametrize("hardware", ["dgx-spark", "rtx-4090", "a100-80gb", "h100-80gb"])
def test_narrower_weights_decode_faster(hardware: str) -> None:
    by_format = [cost(roofline(LLAMA, hardware, fmt), [(1, 1000)]).total_s for fmt in ("fp32", "bf16", "fp8", "nvfp4")]
    assert by_format == sorted(by_format, reverse=True)
