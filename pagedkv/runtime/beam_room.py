"""Whether beams can be searched here: they must be able to run all at once."""

from pagedkv.errors import ConfigError
from pagedkv.pooled_memory import PooledMemory
from pagedkv.runtime.beam_search import BeamSearch
from pagedkv.runtime.model_pair import ModelPair
from pagedkv.runtime.sampling import SamplingParams
from pagedkv.scheduling.scheduler import Scheduler


def check_search(search: BeamSearch, scheduler: Scheduler, models: ModelPair, *, sampling: SamplingParams, n: int) -> None:
    """Refuse a search that this engine cannot do.

    Raises:
        ConfigError: With what would work.
    """
    width, limits = search.params.width, scheduler.settings
    if sampling.temperature:
        raise ConfigError(f"beam search with temperature {sampling.temperature}: it draws nothing; needs temperature 0")
    if n > width:
        raise ConfigError(f"{n} texts of {width} beams: a search finds no more texts than it has beams")
    if models.drafter is not None:
        raise ConfigError("beam search and a draft model: all beams are looked at before each token; use one of both")
    if limits.policy != "fcfs":
        raise ConfigError(f"beam search under policy {limits.policy}: beams must come back together; needs fcfs")
    for name in ("max_num_seqs", "max_num_batched_tokens"):
        if getattr(limits, name) < width:
            raise ConfigError(f"{width} beams run together: {name.replace('_', '-')} is {getattr(limits, name)}, needs {width}")
    if search.num_candidates > models.vocab_size:
        raise ConfigError(f"{width} beams look at {search.num_candidates} continuations: the model has {models.vocab_size} words")


def longest_beam(width: int, allocator: PooledMemory) -> int:
    """Return the most tokens, prompt included, of each of `width` beams of which none shares a block: as after a preemption."""
    blocks = allocator.usable_slots // allocator.unit_slots - allocator.watermark_blocks
    return allocator.most_tokens(blocks // width) + 1  # the last token needs no slot


def beams_fit(width: int, num_tokens: int, allocator: PooledMemory) -> bool:
    """Return whether the empty pool holds `width` beams of `num_tokens`, prompt included."""
    return num_tokens <= longest_beam(width, allocator)
