"""Over how many thread blocks a sequence's keys are split.

Decoding is bound by memory: a grid that leaves multiprocessors idle leaves bandwidth unused, and every further split costs a
partial result to write, read and merge.
"""

FILLED = 0.8
"""Share of the slots that is enough without splitting."""

CLOSE_TO_BEST = 0.85
"""Share of the best wave efficiency that is good enough."""


MAX_SPLITS = 128
"""Never more, whoever asks: merging so many takes a moment, and a grid has an end."""


def wave_efficiency(num_blocks: int, num_slots: int) -> float:
    """Return the busy share of the slots while `num_blocks` equal thread blocks run in waves of `num_slots`."""
    waves = -(-num_blocks // num_slots)
    return num_blocks / (waves * num_slots)


def num_splits_for(num_blocks: int, num_tiles: int, num_slots: int, *, max_splits: int = MAX_SPLITS) -> int:
    """Return the smallest number of splits whose wave efficiency is within 85 % of the best; 1 if 80 % of the slots are filled.

    A number that gives no split fewer tiles than the number before it is passed over.

    Source: num_splits_heuristic in FlashAttention's hopper/heuristics.h and csrc/flash_attn/flash_api.cpp.

    Args:
        num_blocks: Thread blocks without splitting: rows times KV heads.
        num_tiles: Tiles of keys of the longest row.
        num_slots: Thread blocks that run at once: multiprocessors times blocks per multiprocessor.
        max_splits: Never more than this.

    >>> num_splits_for(64 * 8, 128, 132)
    1
    >>> num_splits_for(8, 1024, 132)
    14
    """
    if num_blocks >= FILLED * num_slots or num_tiles <= 1 or num_blocks == 0:
        return 1
    most = min(max_splits, num_slots, num_tiles)
    eligible = [n for n in range(1, most + 1) if n == 1 or -(-num_tiles // n) < -(-num_tiles // (n - 1))]
    best = max(wave_efficiency(num_blocks * n, num_slots) for n in eligible)
    return next(n for n in eligible if wave_efficiency(num_blocks * n, num_slots) >= CLOSE_TO_BEST * best)
