"""Ollama: llama.cpp's server with context x parallel cells reserved at load, one whole context for every server slot."""

from pagedkv.allocation import KVPoolSettings
from pagedkv.allocators import ALLOCATORS
from pagedkv.allocators.llama_cpp_split import SplitStreams


@ALLOCATORS.register("ollama")
def ollama(settings: KVPoolSettings) -> SplitStreams:
    """Return an allocator with as many server slots of max_model_len cells as the pool has room for, at most max_num_seqs.

    What is left of the pool stays unused: it is no part of usable_slots. Nothing is forked: Ollama gives one answer per request.
    """
    num_server_slots = min(settings.max_num_seqs, settings.num_slots // (settings.max_model_len + settings.state_slots))
    return SplitStreams("ollama", settings, num_server_slots=num_server_slots, stream_cells=settings.max_model_len)
