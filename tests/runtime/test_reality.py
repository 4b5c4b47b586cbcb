"""`reality`: a real engine whose steps take what the formula says is predicted to the last bit; the command on a small model."""

import json
import shlex
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the runtime needs torch")
pytest.importorskip("pagedkv.runtime")
transformers = pytest.importorskip("transformers", reason="the runtime's models are transformers'")

from tiny_models import COMMON, VOCAB, build

from pagedkv.allocation import KVPoolSettings
from pagedkv.catalogue import load_hardware, load_model
from pagedkv.runtime.engine import LLMEngine
from pagedkv.scheduling.scheduler_settings import SchedulerSettings
from pagedkv.sims import cli_calibrate
from pagedkv.sims.cli import main
from pagedkv.sims.reality.real_run import serve_timed
from pagedkv.sims.reality.step_fit import simulated, step_time
from pagedkv.sims.reality.timed_load import TimedLoad
from pagedkv.sims.step_constants import catalogue_constants


def test_what_the_formula_says_is_predicted_exactly() -> None:
    """The clock goes on by the formula's seconds while the real engine computes: all that is left to differ is decisions."""
    rng, spec, hardware = np.random.default_rng(5), load_model("llama-3.1-8b"), load_hardware("dgx-spark")
    steps = step_time(
        spec,
        hardware,
        catalogue_constants(hardware, spec.native_format),
        weight_format=spec.native_format,
        kv_cache_dtype="auto",
    )
    load = TimedLoad(
        name="test",
        words="",
        arrival_s=np.cumsum(rng.gamma(0.3, 1.0, 30)),
        prompt_tokens=rng.integers(2, 60, 30),
        output_tokens=rng.integers(1, 30, 30),
        max_num_seqs=6,
    )
    pool = KVPoolSettings(num_blocks=40, block_size=4, max_num_seqs=6, max_model_len=100, enable_prefix_caching=True)
    limits = SchedulerSettings(max_num_seqs=6, max_num_batched_tokens=48, max_model_len=100)
    engine = LLMEngine(build("llama"), num_blocks=40, block_size=4, max_num_batched_tokens=48, max_num_seqs=6, max_model_len=100)
    now_s, compute = 0.0, engine.models.runner.logits

    def logits(*given: Any) -> Any:
        nonlocal now_s
        batch = engine.scheduler._step.batch
        now_s += steps.cost(batch, engine.scheduler._step.num_entries).total_s
        return compute(*given)

    def sleep(seconds: float) -> None:
        nonlocal now_s
        now_s += seconds

    engine.models.runner.logits = logits  # type: ignore[method-assign]
    prompts = [rng.integers(2, VOCAB, size) for size in load.prompt_tokens.tolist()]
    real, log = serve_timed(
        engine,
        load,
        lambda number: engine.add_request(prompts[number], max_tokens=int(load.output_tokens[number])),
        now=lambda: now_s,
        sleep=sleep,
        told=lambda _: None,
    )
    ours = simulated(load, limits, pool, steps)
    for name in ("scheduled_s", "first_token_s", "last_token_s"):
        np.testing.assert_allclose(getattr(ours.log, name), getattr(real.log, name), rtol=0, atol=1e-9)
    np.testing.assert_array_equal(ours.log.num_preemptions, real.log.num_preemptions)
    assert real.log.num_preemptions.sum() > 0
    costs = [steps.cost(batch, batch.size).total_s for batch in log.batches]
    np.testing.assert_allclose(log.seconds, costs, rtol=0, atol=1e-9)
    assert ours.recorder.iterations == len(log.batches)


def test_the_command_compares_four_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    transformers.LlamaConfig(**COMMON | {"num_hidden_layers": 2}).save_pretrained("model")
    spark = load_hardware("dgx-spark")
    monkeypatch.setattr(cli_calibrate, "measured_hardware", lambda kind, **how: spark)  # measuring takes a minute
    with suppress(SystemExit):  # on a busy machine a small model is not predicted well
        main(
            shlex.split("reality --random-weights model --num-requests 8 --repeats 2 --num-gpu-blocks-override 200 --json out.json")
        )
    document = json.loads(Path("out.json").read_text(encoding="utf-8"))
    assert [section["name"] for section in document["sections"]] == ["ramp", "bursts", "lengths", "batch"]
    assert all(len(each["real"]) == 2 for section in document["sections"] for each in section["figures"].values())
    assert document["num_steps_fitted"] > 16
    assert all(value > 0 for value in document["constants"].values())
