"""`--engine naive`: what its defaults are, what its memory is, and whole runs of it."""

from typing import Any

import numpy as np
import pytest

from pagedkv.catalogue import load_hardware, load_model
from pagedkv.errors import ConfigError
from pagedkv.ledgers.transformers import TransformersLedger, widest_tensor_bytes
from pagedkv.memory_budget import MemoryBudget, Shortage
from pagedkv.memory_plan import plan
from pagedkv.memory_request import MemoryRequest
from pagedkv.scheduling.naive_scheduler import NaiveScheduler
from pagedkv.sims.config import LoadConfig, MeasurementConfig, ServingConfig, SimulationConfig
from pagedkv.sims.deployment import deploy
from pagedkv.sims.engines import ENGINES, load_engine
from pagedkv.sims.metrics import measure
from pagedkv.sims.records import Outcome
from pagedkv.sims.scenario import resolve
from pagedkv.sims.simulation import Run, run

GIB = 2**30
CACHES = ("contiguous-growing", "contiguous-max")
LOAD = LoadConfig(request_rate=2.0, num_prompts=40, random_input_len=300, random_output_len=60, random_range_ratio=0.8)


def simulate(cache: str, load: LoadConfig = LOAD, *, step_by_step: bool = False, **serving: Any) -> Run:
    config = SimulationConfig(
        load=load,
        serving=ServingConfig(engine="naive", **{"hardware": "rtx-4090", "max_model_len": 4096, **serving}),
        measurement=MeasurementConfig(allocator=(cache,)),
    )
    return run(resolve(config), cache, seed=1, step_by_step=step_by_step)


# --- defaults


def test_one_request_at_a_time_up_to_the_length_that_the_model_allows() -> None:
    limits = deploy(ServingConfig(engine="naive")).scheduler
    assert (limits.max_num_seqs, limits.max_model_len, limits.max_num_batched_tokens) == (1, 32_768, 32_768)
    assert not limits.enable_chunked_prefill
    assert deploy(ServingConfig(engine="naive", model="llama-2-7b")).scheduler.max_model_len == 4096
    batched = deploy(ServingConfig(engine="naive", max_num_seqs=3, max_model_len=1000)).scheduler
    assert batched.max_num_batched_tokens == 3000  # a padded batch of the longest prompts is computed in one step


def test_kernels_are_launched_one_by_one() -> None:
    naive = deploy(ServingConfig(engine="naive", quantization="int8"))
    vllm = deploy(ServingConfig(enforce_eager=True, quantization="int8"))  # of which no rows tell
    assert naive.step_time.coefficients.model.step_overhead_s == vllm.step_time.coefficients.model.step_overhead_s
    assert naive.budget.cuda_graphs == 0


def test_it_runs_on_its_two_caches_and_no_others() -> None:
    deployment = deploy(ServingConfig(engine="naive"))
    assert load_engine("naive").allocators(deployment.config) == CACHES
    for cache in CACHES:
        scheduler = deployment.scheduler_over(cache)
        assert isinstance(scheduler, NaiveScheduler)
        assert scheduler.allocator.usable_slots == deployment.budget.num_blocks
        assert not scheduler.caches_prefixes
    for other in ("paged", "contiguous-oracle"):
        with pytest.raises(ConfigError, match="contiguous-growing and contiguous-max"):
            deployment.scheduler_over(other)


def test_a_static_cache_is_not_rounded_to_a_power_of_two() -> None:
    deployment = deploy(ServingConfig(engine="naive", max_num_seqs=2, max_model_len=1000))
    assert deployment.scheduler_over("contiguous-max").allocator.placement == "first-fit"


def test_its_words_have_its_numbers() -> None:
    alone, batched = deploy(ServingConfig(engine="naive")), deploy(ServingConfig(engine="naive", max_num_seqs=7))
    words = [each.engine.in_words(each.config, each.scheduler, each.pool) for each in (alone, batched)]
    assert words[0].startswith("One request at a time")
    assert words[1].startswith("Batches of 7 or fewer, padded to the longest prompt")
    assert all("32,768 tokens" in each for each in words)
    assert "all of the batch fails" in batched.engine.at_exhaustion(batched.config)


def test_there_is_one_version() -> None:
    assert ENGINES.load("naive").name == "naive"
    with pytest.raises(ConfigError, match="--engine naive"):
        load_engine("naive@4")


# --- memory


@pytest.mark.parametrize("model", ["llama-3.1-8b", "gemma-3-12b", "gpt-oss-20b"])
@pytest.mark.parametrize("hardware", ["dgx-spark", "h100"])
def test_the_cache_gets_all_that_is_free_and_room_to_enlarge_it(model: str, hardware: str) -> None:
    divided = deploy(ServingConfig(engine="naive", model=model, hardware=hardware)).budget
    spec = load_model(model).kv_spec("auto")
    assert (divided.block_size, divided.null_blocks, divided.block_bytes) == (1, 0, spec.bytes_per_token)
    copied = divided.num_blocks * widest_tensor_bytes(spec)
    assert divided.activations > copied
    assert 0 <= divided.unassigned < divided.block_bytes + widest_tensor_bytes(spec)
    assert f"enlarged, {widest_tensor_bytes(spec) / divided.block_bytes:.2%} of itself ({copied / GIB:.2f} GiB" in divided.gate
    terms, _, result = divided.equation.removeprefix("KV cache = ").removesuffix(" GiB").rpartition(" = ")
    assert eval(terms.replace("−", "-")) == pytest.approx(float(result), abs=0.03)


def test_the_tensor_that_is_copied_is_a_layers_keys_or_values() -> None:
    """docs/runtime.md, measured: one of the tensors of which the cache consists, two to a layer."""
    llama = load_model("llama-3.1-8b").kv_spec("auto")
    assert widest_tensor_bytes(llama) * 2 * 32 == llama.bytes_per_token
    for name in ("gemma-3-12b", "gpt-oss-20b", "qwen2.5-7b"):
        spec = load_model(name).kv_spec("auto")
        num_layers = sum(group.num_layers for group in spec.groups if group.kind != "state")
        assert spec.bytes_per_token / (2 * num_layers) <= widest_tensor_bytes(spec) <= spec.bytes_per_token / num_layers


def test_longer_prompts_leave_less_for_the_cache() -> None:
    short, long = (deploy(ServingConfig(engine="naive", max_model_len=length)).budget for length in (4096, 32_768))
    assert long.activations > short.activations
    assert long.kv_cache < short.kv_cache
    assert long.weights + long.activations + long.kv_cache == pytest.approx(
        short.weights + short.activations + short.kv_cache, abs=2 * (short.block_bytes + short.kv_bytes_per_token)
    )


def test_a_batch_whose_prompts_do_not_fit_is_refused_with_settings_that_do() -> None:
    with pytest.raises(ConfigError, match=r"--max-num-batched-tokens 524288 holds it, but its start") as caught:
        deploy(ServingConfig(engine="naive", max_num_seqs=32))
    assert "117.69 GiB are free" in str(caught.value)
    assert deploy(ServingConfig(engine="naive", max_num_seqs=32, max_num_batched_tokens=524_288)).budget.num_blocks > 32_768


def test_a_cache_stores_what_the_model_computes() -> None:
    with pytest.raises(ConfigError, match=r"--kv-cache-dtype fp8 is not for this engine: use auto, bfloat16"):
        deploy(ServingConfig(engine="naive", kv_cache_dtype="fp8"))


def test_the_rule_needs_room_for_one_request_and_its_copies() -> None:
    model, hardware = load_model("llama-3.1-8b"), load_hardware("rtx-4090")

    def ask(free: int) -> MemoryRequest:
        return MemoryRequest(
            model=model,
            hardware=hardware,
            engine="naive",
            ledger=TransformersLedger(),
            weight_format=model.native_format,
            max_model_len=1000,
            max_num_seqs=1,
            max_num_batched_tokens=1000,
            free_memory_bytes=free,
        )

    spec, divided = model.kv_spec("auto"), ask(22 * GIB).attempt()
    assert isinstance(divided, MemoryBudget)
    each = spec.bytes_per_token + widest_tensor_bytes(spec)
    fixed = 22 * GIB - divided.unassigned - divided.num_blocks * each
    assert plan(ask(fixed + 1000 * each)).num_blocks == 1000
    short = ask(fixed + 1000 * each - 1).attempt()
    assert isinstance(short, Shortage)
    assert short.kv_room == short.kv_cache - 1
    with pytest.raises(ConfigError, match=r"0\.12 GiB of KV cache for one request of --max-model-len 1000"):
        plan(ask(fixed + 1000 * each - 1))


# --- whole runs


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("seqs", [1, 6])
def test_every_request_is_answered_and_every_slot_is_counted(cache: str, seqs: int) -> None:
    done = simulate(cache, max_num_seqs=seqs)
    figures = measure(done, ())
    assert (figures["num_finished"], figures["num_failed"], figures["num_preemptions"]) == (40, 0, 0)
    assert sum(figures["kv"].values()) == pytest.approx(1)
    assert min(figures["kv"].values()) >= 0
    assert figures["kv"]["cached"] == 0
    assert 1 <= figures["running_max"] <= seqs
    assert (figures["kv"]["internal"] > 0) == (seqs > 1 or cache == "contiguous-max")
    done.allocator.check_integrity()
    assert done.allocator.free_slots == done.allocator.usable_slots


def test_one_at_a_time_is_first_come_first_served() -> None:
    done = simulate("contiguous-growing")
    assert measure(done, ())["running_max"] == 1
    log = done.log
    assert (log.scheduled_s[1:] >= log.last_token_s[:-1]).all()
    assert (log.scheduled_s[1:] == np.maximum(log.arrival_s[1:], log.last_token_s[:-1])).all()


@pytest.mark.parametrize("cache", CACHES)
def test_a_batch_is_answered_at_one_time(cache: str) -> None:
    """All that are there from the start end with their batch; E2E is equal within it."""
    load = LoadConfig(request_rate=1e6, num_prompts=24, random_input_len=200, random_output_len=40, random_range_ratio=0.9)
    log = simulate(cache, load, max_num_seqs=6).log
    batches = [np.flatnonzero(log.scheduled_s == start) for start in np.unique(log.scheduled_s)]
    assert [batch.size for batch in batches][1:-1] == [6] * (len(batches) - 2)
    for batch in batches:
        assert np.unique(log.last_token_s[batch]).size == 1
        assert np.ptp((log.last_token_s - log.arrival_s)[batch]) <= np.ptp(log.arrival_s[batch]) + 1e-12
        assert np.unique(log.first_token_s[batch]).size == 1
    assert max(batch.size for batch in batches) == 6
    assert sum(batch.size for batch in batches) == 24


def test_padding_costs_compute() -> None:
    """A short request in a batch with a long one has its first token when the long prompt is computed."""
    load = LoadConfig(request_rate=1e6, num_prompts=20, random_input_len=2000, random_output_len=20, random_range_ratio=0.9)
    padded = simulate("contiguous-growing", load, max_num_seqs=20, hardware="h100").log
    alone = simulate("contiguous-growing", load, hardware="h100").log
    batch = np.flatnonzero(padded.scheduled_s == padded.scheduled_s.max())
    prefill_s = padded.first_token_s[batch[0]] - padded.scheduled_s[batch[0]]
    apart_s = (alone.first_token_s - alone.scheduled_s)[batch]
    assert batch.size > 10
    assert prefill_s > apart_s.sum()  # fewer launches, but every row is as long as the longest
    assert prefill_s == pytest.approx(batch.size * apart_s.max(), rel=0.05)


def test_what_does_not_fit_fails_and_the_others_are_answered() -> None:
    load = LoadConfig(request_rate=20.0, num_prompts=60, random_input_len=1000, random_output_len=2000, random_range_ratio=0.9)
    done = simulate("contiguous-growing", load, max_num_seqs=16, max_model_len=6000, max_num_batched_tokens=24_000)
    log = done.log
    failed, finished = log.outcome == Outcome.FAILED, log.outcome == Outcome.FINISHED
    assert failed.any()
    assert finished.any()
    assert (failed | finished).all()
    assert not log.num_preemptions.any()
    assert done.allocator.free_slots == done.allocator.usable_slots
