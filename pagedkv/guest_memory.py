"""What a second model takes beside an engine that serves a first one."""

from dataclasses import replace

from pagedkv.memory_budget import MemoryBudget
from pagedkv.memory_request import MemoryRequest
from pagedkv.model_spec import ModelSpec


def least_held_bytes(request: MemoryRequest, model: ModelSpec) -> int:
    """Return the least that `model` takes under the engine of `request`, in a process of its own.

    Its weights in the format that this engine has them in, the engine with its graphs, a largest step, and the KV cache of one
    request as long as those of `request`, or as long as the model goes. An engine takes more unless its KV cache is kept that
    small.
    """
    its = replace(
        request,
        model=model,
        weight_format=request.default_format(model),
        max_model_len=min(request.max_model_len, model.max_context),
        draft=None,
    )
    outcome = its.attempt()
    if isinstance(outcome, MemoryBudget):
        engine = outcome.engine_overhead + outcome.activations + outcome.cuda_graphs
    else:
        engine = outcome.overheads
    return outcome.weights + engine + its.blocks_for_one_request * its.block_bytes
