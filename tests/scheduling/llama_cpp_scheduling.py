"""The scheduler of llama.cpp's server as its tests make and use it."""

from typing import Any

import numpy as np
from steps import advance

from pagedkv.allocation import KVPoolSettings
from pagedkv.allocators import ALLOCATORS
from pagedkv.scheduling.content import shared_segments
from pagedkv.scheduling.llama_cpp_scheduler import LlamaCppScheduler, LlamaCppSettings


def server(
    *, cells: int, slots: int = 2, allocator: str = "llama-cpp-unified", context: int | None = None, **settings: Any
) -> LlamaCppScheduler:
    pool = KVPoolSettings(
        num_blocks=cells, block_size=1, max_num_seqs=slots, max_model_len=context or cells, enable_prefix_caching=True
    )
    return LlamaCppScheduler(LlamaCppSettings(**settings), ALLOCATORS.load(allocator)(pool))  # type: ignore[arg-type]


def chat(to: LlamaCppScheduler, stream: int, prompt: int, output: int, *, shared: int | None = None) -> int | None:
    """Add a request whose first `shared` tokens, all by default, are those of a conversation."""
    content = shared_segments(np.array([stream]), np.array([prompt + output if shared is None else shared]))
    return to.add(prompt_tokens=prompt, output_tokens=output, content=content)


def finish(one: LlamaCppScheduler) -> list[list[tuple[int, int]]]:
    """All steps until nobody is there; nobody may fail."""
    steps = []
    while one.num_running or one.num_waiting:
        steps.append(advance(one))
        assert not one.failed.size
    return steps
