"""Engines, the memory that they run on, and who asks them: what the laws about ways to run steps draw from."""

from dataclasses import dataclass
from typing import Any

from chats import MAX_MODEL_LEN, QUESTIONS, Question, step_time, user
from hypothesis import strategies as st

from pagedkv.allocation import KVPoolSettings
from pagedkv.fuzzing import hybrid_layers
from pagedkv.scheduling.batch_scheduler import BatchScheduler
from pagedkv.scheduling.scheduler_settings import SchedulerSettings
from pagedkv.scheduling.step import StepScheduler
from pagedkv.sims.clock import Clock
from pagedkv.sims.compiled_engine import CompiledEngine
from pagedkv.sims.config import ServingConfig
from pagedkv.sims.engine import Engine
from pagedkv.sims.engines import load_engine
from pagedkv.sims.recorder import Recorder
from pagedkv.sims.simulation import Run

VARIANTS: dict[str, tuple[dict[str, Any], ...]] = {
    "sglang": (
        {},
        {"schedule_policy": "lpm"},
        {"enable_chunked_prefill": False, "radix_eviction_policy": "lfu"},
        {"enable_mixed_chunk": True, "schedule_conservativeness": 0.3},
    ),
    "tensorrt-llm": ({}, {"capacity_scheduler_policy": "max_utilization"}, {"enable_chunked_prefill": True}),
    "llama-cpp": ({}, {"ubatch_size": 3}),
    "ollama": ({}, {"max_queue": 2}),
    "naive": ({},),
    "orca": ({},),
    "vattention": ({},),
    "vllm": ({},),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """Who asks what, whom, with how much memory."""

    engine: str
    allocator: str
    variant: dict[str, Any]
    users: tuple[tuple[Question, ...], ...]
    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    state_slots: int = 0
    watermark: float = 0.0
    window: tuple[int, int, int] = (0, 0, 32)
    """Of server slots: tokens, cells and checkpoints of layers with a window."""

    def scheduler(self) -> StepScheduler:
        preset = load_engine(self.engine)
        limits = SchedulerSettings(
            max_num_seqs=self.max_num_seqs, max_num_batched_tokens=self.max_num_batched_tokens, max_model_len=MAX_MODEL_LEN
        )
        pool = KVPoolSettings(
            num_blocks=self.num_blocks * 8 // self.block_size,
            block_size=self.block_size,
            max_num_seqs=self.max_num_seqs,
            max_model_len=MAX_MODEL_LEN,
            state_slots=self.state_slots,
            watermark=self.watermark,
            page_tokens=8,
            offload_blocks=20,
            layer_groups=hybrid_layers(self.block_size),
            max_num_batched_tokens=self.max_num_batched_tokens,
            window_tokens=self.window[0],
            window_cells=self.window[1],
            context_checkpoints=self.window[2],
            ubatch_tokens=5,
            enable_prefix_caching=self.allocator in preset.caching_allocators,
        )
        return preset.scheduler(ServingConfig(engine=self.engine, **self.variant), limits, pool, self.allocator)


def served(case: Case, *, step_by_step: bool) -> Run:
    """Let everybody ask until all is answered, by the engine that runs steps as it can, or one by one."""
    env, scheduler = Clock(initial_time=0.0), case.scheduler()
    recorder = Recorder(scheduler, warmup_s=0.1, end_s=float("inf"))
    engine: Engine | CompiledEngine
    if isinstance(scheduler, BatchScheduler) and scheduler.compiled is not None and not step_by_step:
        engine = CompiledEngine(env, scheduler, step_time(), recorder)
    else:
        engine = Engine(env, scheduler, step_time(), recorder)
    for asker, questions in enumerate(case.users):
        env.process(user(env, engine, asker, questions))
    for at_s in (0.3, 1.1):  # somebody looks, in the middle of a step
        env.run(until=at_s)
        scheduler.check_integrity()
    env.run()
    engine.close()
    scheduler.check_integrity()
    recorder.close(env.now)
    return Run(allocator=scheduler.allocator, recorder=recorder, log=recorder.log(), end_s=env.now, warmup_s=0.1, drained=True)


def cases(engine: str, allocator: str) -> st.SearchStrategy[Case]:
    sizes = [16] if engine == "tensorrt-llm" else [1, 4] if engine == "sglang" else [8]
    return st.builds(
        Case,
        engine=st.just(engine),
        allocator=st.just(allocator),
        variant=st.sampled_from(VARIANTS[engine]),
        users=st.lists(QUESTIONS.map(tuple), min_size=1, max_size=6).map(tuple),
        num_blocks=st.sampled_from([16, 22, 60]),
        block_size=st.sampled_from(sizes),
        max_num_seqs=st.sampled_from([2, 6]),
        max_num_batched_tokens=st.sampled_from([96, 128]),
        state_slots=st.sampled_from([0, 9]),
        watermark=st.sampled_from([0.0, 0.1]),
        window=st.sampled_from(
            [(0, 0, 32), (4, 60, 32), (3, 24, 2), (9, 90, 0)] if engine in ("llama-cpp", "ollama") else [(0, 0, 32)]
        ),
    )


MEMORIES = [
    (name, allocator)
    for name in VARIANTS
    for allocator in (
        *load_engine(name).allocators(ServingConfig(engine=name)),
        *(("contiguous-growing", "tensorrt-llm") if name == "vllm" else ()),
    )
    if allocator not in ("paged", "hybrid")
]
"""(engine, allocator) whose steps are compiled, decisions and all; paged memory has laws of its own."""
