"""A real block allocator for the KV cache, and what can be answered with it.

`pagedkv` itself needs only numpy and numba. The simulator is `pagedkv.sims`, the attention kernels are `pagedkv.kernels`.
"""

from pathlib import Path

__version__ = "0.1.0"

# In a checkout `sims/` and `kernels/` lie beside this folder; an installed package has them inside it.
if (Path(__file__).parent.parent / "sims" / "engines").is_dir():
    __path__.append(str(Path(__file__).parent.parent))
