"""What runs of the compiled loop and of the step-by-step engine are compared by."""

import numpy as np
from chats import records_agree
from hypothesis import strategies as st

from pagedkv.paged_steps import PagedStepAllocator
from pagedkv.sims.compiled_engine import CompiledEngine
from pagedkv.sims.simulation import Run

STEPS_AT_ONCE = st.sampled_from([3, CompiledEngine.steps_at_once])


def agree(compiled: Run, slow: Run) -> None:
    assert isinstance(compiled.allocator, PagedStepAllocator)
    assert isinstance(slow.allocator, PagedStepAllocator)
    compiled.allocator.check_integrity()
    for mine, other in zip(compiled.allocator.arrays, slow.allocator.arrays, strict=True):
        np.testing.assert_array_equal(mine, other)
    records_agree(compiled, slow)
