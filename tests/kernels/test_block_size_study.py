"""The study of block sizes counts waste as it is and times the same work."""

import json
from typing import Any

import numpy as np
import pytest

from pagedkv.kernels.block_size_study import BlockSizeStudy
from pagedkv.kernels.contract import KernelError
from pagedkv.kernels.dispatch import paged_attention_decode


def test_rows_have_the_waste_of_their_blocks_and_go_into_json() -> None:
    study = BlockSizeStudy(lengths=(1, 16, 17), block_sizes=(1, 16, 128), num_q_heads=2, num_kv_heads=1, head_dim=16, rounds=1)
    rows = json.loads(json.dumps(study.rows()))
    assert [row["block_size"] for row in rows] == [1, 16, 128]
    assert [row["table_entries"] for row in rows] == [34, 4, 3]
    assert [row["internal_waste"] for row in rows] == pytest.approx([0, 1 - 34 / 64, 1 - 34 / 384])
    for row in rows:
        assert row["kv_bytes_per_s"] == pytest.approx(2 * 34 * 16 * 4 / row["kernel_s"])


def test_each_block_size_is_timed_as_often_after_one_call_to_warm_up() -> None:
    seen: list[int] = []

    def decode(**arrays: Any) -> Any:
        seen.append(arrays["k_cache"].shape[1])
        return paged_attention_decode(**arrays, backend="reference")

    BlockSizeStudy(lengths=(5, 9), block_sizes=(4, 8), num_q_heads=2, num_kv_heads=1, head_dim=8, rounds=2).rows(decode)
    assert seen == [4, 8] * 3


def test_the_same_seed_gives_the_same_step() -> None:
    one, other = (BlockSizeStudy(lengths=(5, 9), dtype="bfloat16", head_dim=16).arrays(4) for _ in range(2))
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])
    assert one["k_cache"].dtype == np.uint16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lengths": ()}, "lengths are"),
        ({"lengths": (3, 0)}, "lengths are"),
        ({"block_sizes": (0,)}, "block sizes"),
        ({"dtype": "int8"}, "dtype is"),
    ],
)
def test_nothing_to_measure_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(KernelError, match=message):
        BlockSizeStudy(**{"lengths": (3,), **change}).rows()
