"""Where the memory goes when an engine starts, in eight parts; or why it does not start."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryBudget:
    """One machine's memory in eight parts that sum to `visible`. Sizes are in bytes."""

    visible: int
    """Memory that the engine sees."""
    utilization: float
    """The engine's own setting: vLLM's share of the visible memory, SGLang's of the free memory, TensorRT-LLM's of what is left;
    for llama.cpp, which has none, the share of the visible memory that it takes."""
    requested: int
    """What that setting allows the engine. A KV cache that the user sizes does not depend on it."""
    weights: int
    """Part 1: the model's weights."""
    engine_overhead: int
    """Part 2: libraries and buffers of the engine."""
    activations: int
    """Part 3: peak of a forward pass."""
    cuda_graphs: int
    """Part 4: captured graphs."""
    kv_cache: int
    """Part 5: `num_blocks * block_bytes`, sequence states that are set aside, and `window_bytes`."""
    os_reserve: int
    """Part 6: the operating system."""
    other_programs: int
    """Part 7: other programs."""
    unassigned: int
    """Part 8: the rest, with the bytes too few for one more block."""
    free_at_start: int
    """What the operating system and other programs leave to the engine."""
    block_size: int
    """Tokens per block, as asked for; blocks of a group of layers may be longer."""
    block_bytes: int
    """Bytes of one block as the engine counts them: in all layers that have blocks, or in those of one group."""
    kv_bytes_per_token: int
    """Bytes of one token in those layers."""
    num_blocks: int
    """Blocks of the pool as the engine counts them, null blocks included."""
    null_blocks: int = 1
    """Blocks that no request can hold: vLLM's null block, SGLang's page 0."""
    window_bytes: int = 0
    """Of the KV cache: that of layers with a window, where they have one of their own."""
    window_cells: int = 0
    """Tokens that it has room for."""
    window_tokens: int = 0
    """The window."""
    checkpoint_bytes: int = 0
    """Bytes of a copy of one sequence's window in the processor's memory, from which a server slot can go on."""
    equation: str = ""
    """The size of the KV cache as the engine computes it, with this machine's numbers."""
    gate: str = ""
    """What is checked when the engine starts, and what is not, with this machine's numbers."""
    warnings: tuple[str, ...] = ()
    """What will start but may go wrong."""

    @property
    def num_kv_tokens(self) -> int:
        """Slots of the pool, those of null blocks included; where a block is of one group of layers, slots in that group."""
        return self.num_blocks * self.block_size

    @property
    def usable_blocks(self) -> int:
        """Blocks that requests can hold."""
        return self.num_blocks - self.null_blocks

    def blocks_of(self, block_bytes: int) -> int:
        """Return how many blocks of `block_bytes` the bytes of these come to, null blocks included."""
        return self.num_blocks * self.block_bytes // block_bytes

    @property
    def parts(self) -> dict[str, int]:
        """The eight parts by name. They sum to `visible`."""
        engine = ("weights", "engine_overhead", "activations", "cuda_graphs", "kv_cache")
        return {name: getattr(self, name) for name in (*engine, "os_reserve", "other_programs", "unassigned")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shortage:
    """Why a request has no budget. Sizes are in bytes."""

    kind: Literal["gate", "share", "free", "request"]
    """`gate`: the engine refuses to start. `share`: its share of the memory leaves too little for one request. `free`: it needs
    more than is free. `request`: the KV cache that the user sized holds less than one request."""
    free_at_start: int
    """What the operating system and other programs leave to the engine."""
    available: int
    """What the engine may hold."""
    weights: int
    """The model's weights."""
    overheads: int
    """Everything else that counts against `available`: engine, activations, CUDA graphs."""
    kv_cache: int
    """The KV cache asked for, at least one request of `max_model_len` tokens."""

    @property
    def kv_room(self) -> int:
        """What remains for the KV cache; negative when the weights alone are too large."""
        return self.available - self.weights - self.overheads
