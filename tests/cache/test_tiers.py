"""Test the tiers of one layer alone: what each operation leaves of the tokens, and what the host knows of them."""

from dataclasses import replace

import pytest
import torch

from hardkv.cache.storage.dense import DenseTier
from hardkv.cache.storage.ragged import Columns, RaggedTier
from hardkv.kernels.rows import Rows, cumulative

pytestmark = pytest.mark.usefixtures("poisoned_memory")

HEADS, CAPACITY = 2, 8
EVEN, UNEVEN = [6, 6, 6], [5, 2, 6]


def dense_tier(fills, capacity=CAPACITY):
    """A tier whose sequences hold the first columns; keys and values differ from slot to slot, in float64."""
    keys, values = (torch.randn(len(fills), HEADS, capacity, dim, dtype=torch.float64) for dim in (4, 3))
    positions = torch.arange(capacity, dtype=torch.int32).repeat(len(fills), 1)
    bound = max(fills)
    return DenseTier(keys, values, positions, torch.tensor(fills), bound, even=min(fills) == bound)


def held(tier):
    """Per sequence, `{position: (keys [H, D], values [H, Dv])}`."""
    return [
        {
            int(tier.positions[b, slot]): (tier.keys[b, :, slot].tolist(), tier.values[b, :, slot].tolist())
            for slot in range(fill)
        }
        for b, fill in enumerate(tier.fill.tolist())
    ]


def of(tokens, positions):
    return [{position: each[position] for position in some} for each, some in zip(tokens, positions, strict=True)]


def ragged_tier(lengths):
    """A tier whose rows have these lengths; every column tells tokens apart."""
    total = sum(lengths)
    keys, values = torch.randn(total, 4), torch.randn(total, 3)
    positions, misses = torch.arange(total, dtype=torch.int32), torch.arange(total, dtype=torch.uint8)
    columns = Columns(keys, values, positions, misses, torch.randn(total, 2).half())
    return RaggedTier(columns, Rows(cumulative(torch.tensor(lengths)), total, max(lengths)))


def rows_of(tier):
    """`[row][column][token]`."""
    parts = [column.split(tier.lengths.tolist()) for column in tier.columns]
    return [[part.tolist() for part in row] for row in zip(*parts, strict=True)]


@pytest.mark.parametrize("which", [[2, 0], [1], [3, 3, 1, 2], [0, 1, 2, 3], []])
def test_select_rows(which):
    tier = ragged_tier([3, 0, 5, 2])
    chosen = tier.select_rows(torch.tensor(which, dtype=torch.long))
    assert rows_of(chosen) == [rows_of(tier)[row] for row in which]
    lengths = [[3, 0, 5, 2][row] for row in which]
    assert (chosen.rows.total, chosen.rows.longest) == (sum(lengths), max(lengths, default=0))


@pytest.mark.parametrize("gone", [[0], [3, 4, 5, 6, 7], [2, 9], [*range(10)]])
def test_ragged_without(gone):
    tier, marked = ragged_tier([3, 0, 5, 2]), torch.zeros(10, dtype=torch.bool)
    marked[gone] = True
    without = tier.without(marked)
    assert without.positions.tolist() == [token for token in range(10) if token not in gone]
    stays = [[token for token in row[2] if token not in gone] for row in rows_of(tier)]
    assert [row[2] for row in rows_of(without)] == stays
    for name in ("keys", "values", "misses"):
        assert torch.equal(getattr(without, name), getattr(tier, name)[~marked])
    lengths = [len(row) for row in stays]
    assert (without.rows.total, without.rows.longest) == (sum(lengths), max(lengths))


def test_a_tier_that_loses_nothing_is_not_copied():
    tier = ragged_tier([3, 0, 5, 2])
    assert tier.without(torch.zeros(10, dtype=torch.bool)) is tier


def test_columns_are_mapped_alike():
    columns = ragged_tier([3, 1]).columns
    assert all(
        torch.equal(ours, column[1:]) for ours, column in zip(columns.map(lambda x: x[1:]), columns, strict=True)
    )
    mapped = columns.map_states(lambda x: x + 1)
    assert torch.equal(mapped.keys, columns.keys + 1)
    assert torch.equal(mapped.values, columns.values + 1)
    assert mapped[2:] == columns[2:]  # the very tensors


def test_an_empty_tier_has_the_columns_of_what_it_will_hold():
    keys, values = torch.ones(1, 2, 9, 4, dtype=torch.bfloat16), torch.ones(1, 2, 9, 3, dtype=torch.bfloat16)
    with torch.device("meta"):  # the device is that of keys, not the default one
        tier, coded = RaggedTier.empty(2, keys, values), RaggedTier.empty(2, keys, values, scales=2)
    shapes = [(0, 4), (0, 3), (0,), (0,), (0, 0)]
    assert [column.shape for column in tier.columns] == shapes
    assert [column.shape for column in coded.columns] == [*shapes[:4], (0, 2)]
    dtypes = [torch.bfloat16, torch.bfloat16, torch.int32, torch.uint8, torch.float16]
    assert [column.dtype for column in tier.columns] == dtypes
    assert {tensor.device for tensor in tier.tensors()} == {keys.device}
    assert (tier.cu_seqlens.tolist(), tier.cu_seqlens.dtype) == ([0, 0, 0], torch.int32)
    assert (tier.rows.total, tier.rows.longest) == (0, 0)


@pytest.mark.parametrize("fills", [EVEN, UNEVEN])
@pytest.mark.parametrize("first", [0, 1, 2])
@pytest.mark.parametrize("newest", [1, 3, 5, 7])
def test_ends(fills, first, newest):
    tier = dense_tier(fills)
    ends = tier.ends(first, newest, 9, min(fills))
    expected = [sorted({*range(min(first, fill)), *range(max(fill - newest, 0), fill)}) for fill in fills]
    assert held(ends) == of(held(tier), expected)
    assert ends.capacity == 9
    assert ends.bound == max(map(len, expected))
    assert ends.even == (len({*map(len, expected)}) == 1)
    assert ends.total is None


def test_ends_of_sequences_whose_fill_the_host_does_not_know():
    """A sequence may hold fewer tokens than the bound says, and the host is told the least."""
    ends = replace(dense_tier(UNEVEN), bound=CAPACITY).ends(1, 2, 4, 0)
    assert (ends.bound, ends.even) == (3, False)
    assert [sorted(tokens) for tokens in held(ends)] == [[0, 3, 4], [0, 1], [0, 4, 5]]


@pytest.mark.parametrize("fills", [EVEN, UNEVEN])
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("padded", [False, True])
def test_append(fills, count, padded):
    tier = dense_tier(fills).counted(fills)
    before, new = held(tier), dense_tier([count] * 3, count)
    valid = torch.tensor([[True] * count, [False] * count, [False] + [True] * (count - 1)]) if padded else None
    larger = tier.append(new.keys, new.values, valid, 20)
    pairs = zip([[True] * count] * 3 if valid is None else valid.tolist(), held(new), strict=True)
    added = [{20 + slot: tokens[slot] for slot in range(count) if row[slot]} for row, tokens in pairs]
    assert held(larger) == [one | two for one, two in zip(before, added, strict=True)]
    assert held(tier) == before
    # its buffers are shared as long as they have room
    assert (larger.keys.data_ptr() == tier.keys.data_ptr()) == (count == 2)
    assert larger.capacity == max(CAPACITY, 6 + count)
    assert larger.bound == 6 + count
    assert larger.even == (fills == EVEN and not padded)
    assert larger.total is None


@pytest.mark.parametrize(("fills", "even"), [(EVEN, True), (UNEVEN, False), ([5, 5, 5], False)])
def test_counted(fills, even):
    """Fills that are equal but below the bound are not even."""
    tier = replace(dense_tier(fills), bound=6).counted(fills)
    assert (tier.even, tier.total) == (even, sum(fills))


@pytest.mark.parametrize("fills", [EVEN, UNEVEN])
@pytest.mark.parametrize("length", [1, 2, 3, 6])
def test_cropped(fills, length):
    tier = dense_tier(fills)
    cropped = tier.cropped(length)
    expected = [min(fill, length) for fill in fills]
    assert held(cropped) == of(held(tier), map(range, expected))
    assert cropped.bound == max(expected)
    assert cropped.even == (len({*expected}) == 1)


@pytest.mark.parametrize("fills", [EVEN, UNEVEN])
@pytest.mark.parametrize("which", [[2, 0], [1, 1, 0, 2]])
def test_select_sequences(fills, which):
    tier = dense_tier(fills)
    chosen = tier.select_sequences(torch.tensor(which))
    assert held(chosen) == [held(tier)[b] for b in which]
    assert (chosen.capacity, chosen.bound, chosen.even) == (CAPACITY, tier.bound, tier.even)
    assert chosen.keys[:, :, chosen.bound :].isnan().all()  # nothing is copied from behind the bound


@pytest.mark.parametrize("gone", [[], [0], [0, 1, 2, 3, 4, 5], [3, 7]])
@pytest.mark.parametrize("fills", [EVEN, UNEVEN])
def test_without(fills, gone):
    tier, marked = dense_tier(fills), torch.zeros(3, CAPACITY, dtype=torch.bool)
    marked[0, gone] = True
    without = tier.without(marked)
    stays = [[slot for slot in range(fill) if b or slot not in gone] for b, fill in enumerate(fills)]
    assert held(without) == of(held(tier), stays)
    assert without.capacity == CAPACITY
    assert without.bound == max(map(len, stays))
    assert without.even == (len({*map(len, stays)}) == 1)


def test_a_view_of_a_models_own_tensors():
    keys, values = torch.randn(2, HEADS, 5, 4), torch.randn(2, HEADS, 5, 3)
    with torch.device("meta"):
        tier = DenseTier.view(keys, values)
    assert (tier.keys is keys, tier.values is values, tier.bound, tier.even) == (True, True, 5, True)
    assert tier.fill.tolist() == [5, 5]
    assert tier.positions.tolist() == [[0, 1, 2, 3, 4]] * 2
    assert (tier.positions.dtype, tier.fill.dtype) == (torch.int32, torch.int64)
    assert tier.nbytes == keys.nbytes + values.nbytes


def test_allocated_buffers_may_be_written_later():
    keys, values = torch.ones(2, HEADS, 1, 4), torch.ones(2, HEADS, 1, 3)
    with torch.inference_mode(), torch.device("meta"):
        tier = DenseTier.allocate(keys, values, 5)
    assert [tuple(tensor.shape) for tensor in tier.tensors()] == [(2, HEADS, 5, 4), (2, HEADS, 5, 3), (2, 5), (2,)]
    assert not any(tensor.is_inference() or tensor.is_meta for tensor in tier.tensors())
    assert [tensor.dtype for tensor in tier.tensors()[2:]] == [torch.int32, torch.int64]
    assert (tier.bound, tier.even, tier.fill.tolist()) == (0, True, [0, 0])


MARKED, ROWS = torch.zeros(3, CAPACITY, dtype=torch.bool), torch.tensor([2, 0])


@pytest.mark.parametrize(
    "operation",
    [
        lambda tier: tier.ends(0, 3, 5, 2),
        lambda tier: tier.ends(1, 3, 5, 2),
        lambda tier: tier.cropped(4),
        lambda tier: tier.without(MARKED),
        lambda tier: tier.grown(9),
        lambda tier: tier.select_sequences(ROWS),
        lambda tier: tier.append(tier.keys[:, :, :3], tier.values[:, :, :3], None, 20),
    ],
)
def test_the_default_device_plays_no_part(operation):
    tier = dense_tier(UNEVEN)
    expected = held(operation(tier))
    with torch.device("meta"):
        result = operation(tier)
    assert held(result) == expected
