"""The rule for splitting against a search over all numbers of splits."""

from hypothesis import given
from hypothesis import strategies as st

from pagedkv.kernels.split_heuristic import num_splits_for, wave_efficiency

COUNTS = st.integers(1, 300)


@given(COUNTS, COUNTS, COUNTS)
def test_it_is_the_smallest_number_close_to_the_best(num_blocks: int, num_tiles: int, num_slots: int) -> None:
    splits = num_splits_for(num_blocks, num_tiles, num_slots)
    assert 1 <= splits <= max(1, min(num_tiles, num_slots, 128))
    if num_blocks >= 0.8 * num_slots:
        assert splits == 1
        return
    per_split = [-(-num_tiles // n) for n in range(1, min(num_tiles, num_slots, 128) + 1)]
    useful = [n for n, tiles in enumerate(per_split, 1) if tiles not in per_split[: n - 1]]
    best = max(wave_efficiency(num_blocks * n, num_slots) for n in useful)
    close = [n for n in useful if wave_efficiency(num_blocks * n, num_slots) >= 0.85 * best]
    assert splits == min(close)


@given(COUNTS, COUNTS)
def test_efficiency_is_the_busy_share(num_blocks: int, num_slots: int) -> None:
    full, rest = divmod(num_blocks, num_slots)
    busy = [num_slots] * full + [rest] * (rest > 0)
    assert wave_efficiency(num_blocks, num_slots) == sum(busy) / (len(busy) * num_slots)


def test_one_long_row_fills_the_machine() -> None:
    assert 8 * num_splits_for(8, 1024, 132) >= 0.8 * 132


def test_nothing_to_do() -> None:
    assert num_splits_for(0, 10, 132) == num_splits_for(4, 0, 132) == 1
