"""The storage keeps what it is given where the allocator says, and says what is wrong with what it cannot keep."""

import numpy as np
import pytest

from pagedkv.errors import ConfigError
from pagedkv.kv_spec import LayerGroup

torch = pytest.importorskip("torch", reason="the runtime needs torch")

from pagedkv.kernels import KernelError, paged_attention
from pagedkv.runtime import PagedKVStorage, plan_storage
from pagedkv.runtime.storage import DTYPES, FP8

FULL = LayerGroup(kind="full", num_layers=1, num_kv_heads=2, key_dim=16, value_dim=16)
WINDOW = LayerGroup(kind="sliding_window", num_layers=1, num_kv_heads=2, key_dim=16, value_dim=16, window=8)
WIDE = LayerGroup(kind="full", num_layers=1, num_kv_heads=2, key_dim=32, value_dim=32)


def tokens(count: int, head_dim: int = 16, seed: int = 0) -> "torch.Tensor":
    return torch.randn(count, 2, head_dim, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
def test_what_is_written_is_read(dtype: str, kv_layout: str) -> None:
    scales = {"k_scale": 0.5, "v_scale": 2.0} if DTYPES[dtype] == FP8 else {}
    storage = PagedKVStorage(plan_storage([FULL] * 2, block_size=3), num_blocks=7, dtype=dtype, kv_layout=kv_layout, **scales)
    storage.pool(0).fill_(0)
    storage.pool(1).fill_(torch.nan)
    key, value = tokens(5), tokens(5, seed=1)
    given = (key, value) if scales else (key.to(storage.dtype), value.to(storage.dtype))
    slots = torch.tensor([20, 3, -1, 9, 11])
    storage.write(1, *given, slots)
    assert not storage.pool(0).float().any()
    assert int(torch.isfinite(storage.pool(1).float()).sum()) == 4 * 2 * 2 * 16
    for cache, new, scale in ((storage.keys(1), key, storage.k_scale), (storage.values(1), value, storage.v_scale)):
        nhd = cache.transpose(1, 2) if kv_layout == "HND" else cache
        kept = nhd.float().reshape(21, 2, 16)[slots[slots >= 0]] * scale
        torch.testing.assert_close(kept, new[slots >= 0], rtol=0.07 if scales else 0.01, atol=0.02 if scales else 0.01)


@pytest.mark.parametrize("kv_layout", ["NHD", "HND"])
def test_fp8_is_read_as_what_it_holds(kv_layout: str) -> None:
    storage = PagedKVStorage(
        plan_storage([FULL], block_size=4), num_blocks=9, dtype="fp8", kv_layout=kv_layout, k_scale=0.01, v_scale=0.02
    )
    storage.pool(0).fill_(torch.nan)
    table, seqlens = torch.tensor([[5, 2, -1], [7, 1, 3]], dtype=torch.int32), torch.tensor([6, 10], dtype=torch.int32)
    slots = [int(table[row, t // 4]) * 4 + t % 4 for row in range(2) for t in range(int(seqlens[row]))]
    storage.write(0, tokens(16), tokens(16, seed=1), torch.tensor(slots))
    q = tokens(2, seed=2)
    wide = storage.keys(0).float() * 0.01, storage.values(0).float() * 0.02
    expected = paged_attention(q, *wide, table, seqlens, kv_layout=kv_layout, backend="reference")
    torch.testing.assert_close(storage.attend(0, q, table, seqlens), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(KernelError, match="block 9: the pool has 9"):
        storage.attend(0, q, table + 2, seqlens)


def test_fp8_saturates_and_does_not_overflow() -> None:
    storage = PagedKVStorage(plan_storage([FULL], block_size=4), num_blocks=2, dtype="fp8")
    storage.write(0, tokens(1) * 1e6, tokens(1), torch.tensor([4]))
    assert storage.keys(0)[1, 0].float().abs().max() == 448


def test_layers_of_several_groups_share_blocks_and_not_slots() -> None:
    layers = [WINDOW, FULL, WINDOW, FULL]
    layout = plan_storage(layers, block_size=4, share_windows=True)
    assert layout.num_groups == 2
    assert len(layout.tensor_elements) == 2
    assert {(p.group, p.tensor) for p in layout.places} == {(0, 0), (0, 1), (1, 0), (1, 1)}
    assert all((place.window is None) == (layer is FULL) for place, layer in zip(layout.places, layers, strict=True))
    assert layout.places[0].group != layout.places[1].group
    storage = PagedKVStorage(layout, num_blocks=5)
    assert storage.pool(0).data_ptr() != storage.pool(2).data_ptr()


def test_layers_of_different_heads_lie_in_one_pool() -> None:
    storage = PagedKVStorage(plan_storage([FULL, WIDE], block_size=4), num_blocks=5)
    assert storage.block_bytes == (2 * 4 * 2 * 16 + 2 * 4 * 2 * 32) * 4
    storage.write(1, tokens(1, 32), tokens(1, 32), torch.tensor([19]))
    assert (storage.keys(1)[4, 3] == tokens(1, 32)[0]).all()
    wide = LayerGroup(kind="sliding_window", num_layers=1, num_kv_heads=2, key_dim=32, value_dim=32, window=8)
    layout = plan_storage([FULL, wide], block_size=4, share_windows=True)
    assert [place.block_size for place in layout.places] == [8, 4]  # pages of equal bytes
    assert layout.tensor_elements == (2 * 4 * 2 * 32,)


def test_copies_are_made_in_order() -> None:
    storage = PagedKVStorage(plan_storage([FULL] * 2, block_size=4), num_blocks=5)
    for layer in range(2):
        storage.write(layer, tokens(20, seed=layer), tokens(20, seed=9), torch.arange(20))
    expected = [tokens(20, seed=layer) for layer in range(2)]
    copies = np.array([[4, 8], [8, 12], [5, 12], [6, 4], [4, 19]])
    for source, destination in copies:
        for layer in range(2):
            expected[layer][destination] = expected[layer][source]
    storage.apply_copies(copies)
    for layer in range(2):
        assert (storage.keys(layer).reshape(20, 2, 16) == expected[layer]).all()
    two = PagedKVStorage(plan_storage([FULL, WINDOW], block_size=4, share_windows=True), num_blocks=5)
    with pytest.raises(KernelError, match="storage of one group"):
        two.apply_copies(copies)


@pytest.mark.parametrize("block_size", [0, 2.5, "16"])
def test_blocks_hold_whole_tokens(block_size: object) -> None:
    with pytest.raises(ConfigError, match="needs 1 or more of each, whole numbers"):
        plan_storage([FULL], block_size=block_size)


def test_a_budget_is_kept() -> None:
    layout = plan_storage([FULL] * 3, block_size=16)
    for budget in (99_999, 49_152, 24_576):
        storage = PagedKVStorage(layout, budget_bytes=budget)
        assert storage.num_bytes == storage.num_blocks * storage.block_bytes <= budget < storage.num_bytes + storage.block_bytes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget_bytes": 24_575}, "holds 1 blocks of 12288 bytes: needs 24576"),
        ({"budget_bytes": -5}, "needs 24576"),
        ({"num_blocks": 1}, "needs 2 or more"),
        ({}, "needs one of them"),
        ({"num_blocks": 9.0}, "num_blocks is 9.0: needs a whole number"),
        ({"budget_bytes": "1GiB"}, "budget_bytes is '1GiB': needs a whole number"),
        ({"budget_bytes": 10**15}, "bytes, which cpu does not give: take fewer"),
        ({"num_blocks": 4, "budget_bytes": 99_999}, "needs one of them"),
        ({"num_blocks": 4, "dtype": "int4"}, "float32"),
        ({"num_blocks": 4, "dtype": "float64"}, "bfloat16"),
        ({"num_blocks": 4, "dtype": torch.float64}, "bf16"),
        ({"num_blocks": 4, "kv_layout": "DHN"}, "'NHD' or 'HND'"),
        ({"num_blocks": 4, "k_scale": 2.0}, "fp8 needs positive"),
        ({"num_blocks": 4, "dtype": "fp8", "v_scale": 0.0}, "fp8 needs positive"),
    ],
)
def test_what_cannot_be_says_what_works(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PagedKVStorage(plan_storage([FULL] * 3, block_size=16), **options)


def test_wrong_shapes_types_slots_and_tables_are_refused() -> None:
    storage = PagedKVStorage(plan_storage([FULL], block_size=4), num_blocks=4)
    key, slots = tokens(2), torch.tensor([4, 5])
    for wrong, message in (
        ((key.half(), key.half(), slots), "convert it first"),
        ((tokens(2, 8), tokens(2, 8), slots), r"needs \[tokens, 2, 16\]"),
        ((key, key, torch.tensor([4, 16])), "the cache has 0 to 15"),
        ((key, key, torch.tensor([4, 4])), "more than once"),
        ((key, key, torch.tensor([4])), "one each"),
    ):
        with pytest.raises(KernelError, match=message):
            storage.write(0, *wrong)
    with pytest.raises(KernelError, match="block_table"):
        storage.attend(0, key, torch.tensor([[1], [4]], dtype=torch.int32), torch.tensor([2, 2], dtype=torch.int32))
    for strange in (
        LayerGroup(kind="mla", num_layers=1, num_kv_heads=1, key_dim=64),
        LayerGroup(kind="state", num_layers=1, state_bytes=9),
    ):
        with pytest.raises(ConfigError, match="layer 1 is 1 x"):
            plan_storage([FULL, strange])
