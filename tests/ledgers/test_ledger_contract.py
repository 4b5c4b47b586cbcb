"""What holds of every engine's ledger: parts that sum to what is visible, suggestions that fit, an equation that is true."""

import json
import re

import pytest
from asked_budgets import GIB, OWN, budget, suggestions
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedkv.catalogue import hardware_names, model_names
from pagedkv.errors import ConfigError
from pagedkv.ledgers import LEDGERS
from pagedkv.weight_format import WEIGHT_FORMATS

SHARES = {"vllm": "gpu_memory_utilization", "sglang": "mem_fraction_static", "tensorrt-llm": "free_gpu_memory_fraction"}


def test_ledgers_are_what_the_files_register() -> None:
    assert LEDGERS.names() == ("llama-cpp", "sglang", "tensorrt-llm", "transformers", "vllm")
    for name in LEDGERS.names():
        LEDGERS.load(name)
    assert sorted(LEDGERS._registered) == list(LEDGERS.names())


COMMON = st.fixed_dictionaries(
    {"model": st.sampled_from(model_names()), "hardware": st.sampled_from(hardware_names()), "max_model_len": st.integers(1, 2048)},
    optional={
        "quantization": st.sampled_from(sorted(WEIGHT_FORMATS)),
        "max_num_seqs": st.sampled_from([1, 64, 256]),
        "max_num_batched_tokens": st.sampled_from([512, 2048, 8192]),
        "enforce_eager": st.booleans(),
        "free_memory_bytes": st.integers(0, 23 * GIB),
        "os_reserve_bytes": st.integers(0, 12 * GIB),
        "other_programs_bytes": st.integers(0, 8 * GIB),
    },
)


@pytest.mark.parametrize("engine", LEDGERS.names())
@given(data=st.data())
@settings(max_examples=120)
def test_eight_parts_sum_to_what_is_visible_or_every_suggestion_fits(engine: str, data: st.DataObject) -> None:
    chosen = data.draw(COMMON) | data.draw(OWN[engine])
    try:
        divided = budget(engine, **chosen)
    except ConfigError as error:
        for suggestion in suggestions(error):
            assert budget(engine, **{**chosen, **suggestion}).usable_blocks > 0
        return
    assert sum(divided.parts.values()) == divided.visible
    assert all(size >= 0 for size in divided.parts.values())
    assert divided.usable_blocks * divided.block_size >= chosen["max_model_len"]
    assert divided.equation.startswith("KV cache = ")
    assert divided.equation.endswith(f" = {divided.kv_cache / GIB:,.2f} GiB")
    assert "GiB are free" in divided.gate
    for warning in divided.warnings:
        named = re.search(r"freeze \(.*\); --([a-z-]+) ([0-9.]+) leaves enough", warning)
        if named:
            changed = {named[1].replace("-", "_"): json.loads(named[2])}
            assert not budget(engine, **{**chosen, **changed}).warnings


@pytest.mark.parametrize("engine", sorted(SHARES))
@pytest.mark.parametrize("hardware", ["dgx-spark", "h100"])
def test_the_equation_is_true(engine: str, hardware: str) -> None:
    divided = budget(engine, "llama-3.1-8b", hardware)
    terms, result = re.fullmatch(r"KV cache = (.*) = ([0-9.]+) GiB", divided.equation).groups()  # type: ignore[union-attr]
    assert eval(terms.replace("×", "*").replace("−", "-")) == pytest.approx(float(result), abs=0.03)


@pytest.mark.parametrize("engine", sorted(SHARES))
@given(hundredths=st.integers(40, 85))
@settings(max_examples=30)
def test_a_larger_share_gives_more_blocks(engine: str, hundredths: int) -> None:
    budgets = [budget(engine, **{SHARES[engine]: h / 100}) for h in (hundredths, hundredths + 1)]
    whole = {
        "vllm": budgets[0].visible,
        "sglang": budgets[0].free_at_start - budgets[0].engine_overhead,
        "tensorrt-llm": budgets[0].free_at_start - budgets[0].weights - budgets[0].engine_overhead - budgets[0].activations,
    }[engine]
    gained = budgets[1].kv_cache - budgets[0].kv_cache
    assert gained == pytest.approx(whole / 100, abs=budgets[0].block_bytes + 1)


@pytest.mark.parametrize("engine", LEDGERS.names())
def test_one_device_is_supported(engine: str) -> None:
    with pytest.raises(ConfigError, match=r"--tensor-parallel-size 2: one device is supported so far"):
        budget(engine, tensor_parallel_size=2)


@pytest.mark.parametrize("engine", LEDGERS.names())
def test_a_model_that_is_too_large_is_refused_with_its_numbers(engine: str) -> None:
    with pytest.raises(
        ConfigError, match=r"Llama 3\.1 70B needs [0-9.]+ GiB on .*, but [0-9.]+ GiB .*: [0-9.]+ GiB of weights"
    ) as caught:
        budget(engine, "llama-3.1-70b")
    first, *_ = suggestions(caught.value)
    if engine == "vllm":
        assert first == {"quantization": "fp8"}
    else:  # they take more than leaves a Spark its floor
        narrower = "q8_0" if engine == "llama-cpp" else "fp8"
        assert re.search(rf"--quantization {narrower} holds it, but its start does not go well \(.* the host", str(caught.value))


@pytest.mark.parametrize("engine", LEDGERS.names())
def test_unified_memory_is_named_in_the_check_and_discrete_memory_is_not(engine: str) -> None:
    own = {"ctx_size": 4096} if engine == "llama-cpp" else {}
    unified = budget(engine, other_programs_bytes=GIB, **own)
    discrete = budget(engine, "qwen2.5-7b", "rtx-4090", **own)
    assert "121.69 visible less 4.00 of the operating system and 1.00 of other programs" in unified.gate
    assert "GiB stay free, and the machine's floor is 8.00 GiB" in unified.gate
    assert "23.52 visible less 0.00 of other programs" in discrete.gate
    assert "floor" not in discrete.gate
    known = budget(engine, free_memory_bytes=int(102.2 * GIB), **own)
    assert "102.20 GiB are free (--free-memory)" in known.gate
