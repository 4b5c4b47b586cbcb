"""What a reader of a memory timeline should know besides: what does not count on this machine, and what frees nothing."""

from pagedkv.memory_request import MemoryRequest
from pagedkv.start_up import StartOptions, StartUp
from pagedkv.units import gib


def notes(request: MemoryRequest, start: StartUp, options: StartOptions) -> tuple[str, ...]:
    """Return the notes, each a sentence or two."""
    hardware, tier = request.hardware, options.host_tier_bytes
    if not hardware.unified:
        found = ["This is the card's memory: page cache and compilers take the host's, and nothing of it."]
        if tier:
            found.append(f"The tier of {gib(tier)} in the host's memory is memory gained.")
        return tuple(found)
    found = []
    if tier:
        found.append(
            f'A tier of {gib(tier)} in "CPU" memory frees nothing here: it is the same memory. The KV cache could have '
            f"{tier // request.block_bytes:,} blocks more instead, and find them there without a copy."
        )
    if cache := options.host_cache(start):
        found.append(
            f"The server keeps up to {gib(cache)} of old prompts in the same memory in time; {start.host_cache_off} turns that off."
        )
    return (*found, *start.notes)
