"""SGLang's scheduler as its tests make and use it."""

from typing import Any

import numpy as np
from steps import advance

from pagedkv.allocation import KVPoolSettings
from pagedkv.scheduling.content import Segments, shared_segments
from pagedkv.scheduling.radix_rows import RadixRows
from pagedkv.scheduling.sglang_request import SGLangRequest
from pagedkv.scheduling.sglang_scheduler import SGLangScheduler
from pagedkv.scheduling.sglang_settings import SGLangSettings


def scheduler(*, slots: int = 256, block_size: int = 1, rows: int = 8, caching: bool = True, **limits: Any) -> SGLangScheduler:
    """A scheduler over `slots` usable slots."""
    pool = KVPoolSettings(
        num_blocks=slots // block_size + 1,
        block_size=block_size,
        max_num_seqs=rows,
        max_model_len=256,
        enable_prefix_caching=caching,
    )
    chosen = SGLangSettings(**{"max_running_requests": rows, "max_model_len": 256, **limits})
    return SGLangScheduler(chosen, RadixRows(pool), permutation=lambda n: range(n)[::-1])


def text(stream: int, end: int) -> Segments:
    """A request begins with `end` tokens of a text."""
    return shared_segments(np.array([stream]), np.array([end]))


def run_out(one: SGLangScheduler) -> list[int]:
    """Run until nobody is left; return who finished, in order."""
    finished = list[int]()
    while one.num_running or one.num_waiting:
        assert advance(one)
        finished += one.finished.tolist()
    return finished


def waits(tokens: list[int], *, index: int = 0, **more: Any) -> SGLangRequest:
    known: dict[str, Any] = {"name": f"{index}", "num_prompt_tokens": len(tokens), "max_new_tokens": 8}
    return SGLangRequest(index=index, tokens=np.array(tokens, np.int32), **known | more)
