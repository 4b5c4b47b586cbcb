"""What compiled code asks of a heap's arrays: a version of each function for each kind of heap, in the heap's own file."""

from typing import Any

from pagedkv.jit import by_kind

NO_ADDRESS = -1


@by_kind
def reserve_slots(heap: Any, size: int) -> Any:
    """Return the first slot of a free interval of `size` slots, now taken; NO_ADDRESS if there is none."""


@by_kind
def release_slots(heap: Any, address: int) -> Any:
    """Give back the interval that starts at `address`: there must be one."""


@by_kind
def rounded_size(heap: Any, size: int) -> Any:
    """Return the slots that a reservation of `size` really takes."""


@by_kind
def num_free_slots(heap: Any) -> Any:
    """Return the slots in free extents."""
