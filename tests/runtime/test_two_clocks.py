"""One core, two clocks: a real run's arrivals and step times, given to the simulator, give the same run."""

import math
from collections.abc import Callable, Generator
from dataclasses import fields
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the runtime needs torch")
pytest.importorskip("pagedkv.runtime")
pytest.importorskip("transformers", reason="the runtime's models are transformers'")

from shadow import Ask, ragged_asks
from tiny_models import build, draft_of

from pagedkv.allocation import KVPoolSettings
from pagedkv.runtime.engine import LLMEngine
from pagedkv.scheduling.scheduler import Scheduler
from pagedkv.scheduling.step import Step
from pagedkv.sims.clock import Clock
from pagedkv.sims.engine import Engine
from pagedkv.sims.metrics import measure
from pagedkv.sims.real_clock import RealClock
from pagedkv.sims.recorder import Recorder
from pagedkv.sims.simulation import Run
from pagedkv.sims.step_time import StepCost
from pagedkv.step_allocation import step_allocator
from pagedkv.step_batch import StepBatch

TICK_S = 2.0**-10
LIMITS: dict[str, Any] = {"max_num_seqs": 12, "max_model_len": 120}


class Watching(RealClock):
    """A real clock that notes which drafts each step accepted."""

    def __init__(self, engine: LLMEngine, now: Callable[[], float]) -> None:
        super().__init__(engine.scheduler, now)
        self.accepted: list[list[int]] = []

    def computed(self, step: Step) -> None:
        self.accepted.append(step.batch["num_accepted_tokens"][: step.num_entries].tolist())
        super().computed(step)


def really(
    asks: list[Ask], arrival_s: list[float], *, family: str, caching: bool, drafts: int
) -> tuple[Run, list[float], list[list[int]], LLMEngine]:
    """Serve requests at these times, by a clock that goes on while the model computes.

    Return also what each step took and accepted.
    """
    model = build(family)
    speculation = {"speculative_model": draft_of(model), "num_speculative_tokens": drafts} if drafts else {}
    limits = LIMITS | speculation
    engine = LLMEngine(model, num_blocks=60, block_size=4, max_num_batched_tokens=48, enable_prefix_caching=caching, **limits)
    now_s, took_s, rng = 0.0, list[float](), np.random.default_rng(2)
    compute = engine.models.runner.logits

    def logits(*given: Any) -> Any:
        nonlocal now_s
        took_s.append(int(rng.integers(1, 40)) * TICK_S)
        now_s += took_s[-1]
        return compute(*given)

    engine.models.runner.logits = logits  # type: ignore[method-assign]
    engine.observer = clock = Watching(engine, lambda: now_s)
    arrived = 0
    while arrived < len(asks) or engine.num_unfinished:
        if not engine.num_unfinished:  # a pause
            now_s = max(now_s, arrival_s[arrived])
        while arrived < len(asks) and arrival_s[arrived] <= now_s:
            request = engine.add_request(asks[arrived].prompt, max_tokens=asks[arrived].max_tokens)
            clock.arrival(request, arrival_s[arrived])
            arrived += 1
        engine.step()
    return clock.close(), took_s, clock.accepted, engine


class Recorded:
    """Step times, as they were."""

    def __init__(self, took_s: list[float]) -> None:
        self.left = iter(took_s)

    def cost(self, batch: StepBatch, num_entries: int) -> StepCost:
        return StepCost(0.0, next(self.left), 0.0)


def simulated(asks: list[Ask], arrival_s: list[float], took_s: list[float], *, caching: bool, drafts: int, like: LLMEngine) -> Run:
    apart = like.models.layers if like.allocator.name == "hybrid" else ()
    pool = KVPoolSettings(
        num_blocks=60,
        block_size=4,
        enable_prefix_caching=caching,
        lookahead_slots=drafts,
        layer_groups=apart,
        max_num_batched_tokens=48,
        **LIMITS,
    )
    scheduler = Scheduler(like.scheduler.settings, step_allocator(like.allocator.name, pool))
    env, recorder = Clock(initial_time=0.0), Recorder(scheduler, warmup_s=0.0, end_s=math.inf)
    engine = Engine(env, scheduler, Recorded(took_s), recorder)

    def arrive() -> Generator[Any, Any, None]:
        for ask, at_s in zip(asks, arrival_s, strict=True):
            if at_s > env.now:
                yield env.timeout(at_s - env.now)
            engine.submit(len(ask.prompt), ask.max_tokens, content=ask.content)

    env.process(arrive())
    env.run()
    engine.close()
    recorder.close(env.now)
    return Run(allocator=scheduler.allocator, recorder=recorder, log=recorder.log(), end_s=env.now, warmup_s=0.0, drained=True)


@pytest.mark.parametrize(
    ("family", "caching", "drafts"),
    [("llama", False, 0), ("llama", True, 0), ("llama", True, 3), ("gpt_oss", False, 0), ("gpt_oss", True, 0)],
)
def test_a_real_run_and_its_simulation_are_the_same(
    monkeypatch: pytest.MonkeyPatch, *, family: str, caching: bool, drafts: int
) -> None:
    asks, rng = ragged_asks(64), np.random.default_rng(1)
    gaps = rng.integers(0, 16, 64) * (rng.random(64) < 0.6)
    ticks = np.cumsum(gaps) + 4000 * (np.cumsum(gaps) > 300)  # two bursts, and a pause
    arrival_s = (ticks * TICK_S + np.cumsum(gaps > 0) * TICK_S / 1024).tolist()  # nobody arrives when a step ends
    real, took_s, accepted, engine = really(asks, arrival_s, family=family, caching=caching, drafts=drafts)
    steps = iter(accepted)

    def accept_drafts(acceptance: object, batch: StepBatch, num_entries: int) -> None:
        batch["num_accepted_tokens"][:num_entries] = next(steps)

    monkeypatch.setattr("pagedkv.sims.engine.accept_drafts", accept_drafts)
    virtual = simulated(asks, arrival_s, took_s, caching=caching, drafts=drafts, like=engine)
    assert real.end_s == virtual.end_s
    for field in fields(real.log):
        np.testing.assert_array_equal(getattr(real.log, field.name), getattr(virtual.log, field.name), field.name)
    assert measure(real, ()) == measure(virtual, ())
    np.testing.assert_array_equal(real.recorder.integrals.gauges, virtual.recorder.integrals.gauges)
    for mine, its in zip(real.recorder.timeline.means(), virtual.recorder.timeline.means(), strict=True):
        np.testing.assert_array_equal(mine, its)
    assert real.recorder.num_preemptions > 3
    assert (sum(map(sum, accepted)) > 100) == (drafts > 0)
    assert (real.log.num_cached_tokens.sum() > 0) == caching
