from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hardkv.kernels.rows import bucket_rows, count_per_row, cumulative, padded_index, row_ids

ROW_LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=12)
EDGES = [[0], [1], [0, 0, 0], [1, 1], [0, 5, 0, 1, 0], [7, 8, 9, 15, 16, 17]]


def bounds(lengths):
    result = [0]
    for length in lengths:
        result.append(result[-1] + length)
    return result


@settings(max_examples=50, deadline=None)
@given(ROW_LENGTHS)
def test_cumulative(lengths):
    cu_seqlens = cumulative(torch.tensor(lengths))
    assert cu_seqlens.dtype == torch.int32
    assert cu_seqlens.tolist() == bounds(lengths)


@settings(max_examples=50, deadline=None)
@given(ROW_LENGTHS)
def test_row_ids(lengths):
    rows = row_ids(torch.tensor(bounds(lengths), dtype=torch.int32), sum(lengths))
    assert rows.dtype == torch.int64
    assert rows.tolist() == [row for row, length in enumerate(lengths) for _ in range(length)]


@settings(max_examples=50, deadline=None)
@given(ROW_LENGTHS, st.data())
def test_count_per_row(lengths, data):
    mask = data.draw(st.lists(st.booleans(), min_size=sum(lengths), max_size=sum(lengths)))
    counts = count_per_row(torch.tensor(mask, dtype=torch.bool), torch.tensor(bounds(lengths), dtype=torch.int32))
    assert counts.dtype == torch.int64
    assert counts.tolist() == [sum(mask[a:b]) for a, b in pairwise(bounds(lengths))]


@settings(max_examples=50, deadline=None)
@given(ROW_LENGTHS, st.integers(0, 3))
def test_padded_index(lengths, extra):
    """The index is left-aligned, works for rows in any order, and is safe to gather with where invalid."""
    starts, width = bounds(lengths)[:-1], max(lengths) + extra
    order = list(range(len(lengths)))[::-1]
    index, valid = padded_index(
        torch.tensor([starts[row] for row in order], dtype=torch.int32),
        torch.tensor([lengths[row] for row in order]),
        width,
    )
    assert index.dtype == torch.int64
    assert index.shape == valid.shape == (len(lengths), width)
    for place, row in enumerate(order):
        assert valid[place].tolist() == [slot < lengths[row] for slot in range(width)]
        assert index[place, : lengths[row]].tolist() == list(range(starts[row], starts[row] + lengths[row]))
        assert torch.all(index[place, lengths[row] :] == 0)


class TestBucketRows:
    @settings(max_examples=80, deadline=None)
    @given(ROW_LENGTHS, st.sampled_from([1, 30, 1 << 18]))
    def test_every_token_once(self, lengths, limit):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("hardkv.kernels.rows.MAX_BUCKET_TOKENS", limit)
            buckets = bucket_rows(torch.tensor(bounds(lengths), dtype=torch.int32))
        tokens, rows = [], []
        for bucket in buckets:
            assert bucket.rows.dtype == bucket.starts.dtype == bucket.lengths.dtype == torch.int64
            assert bucket.width == int(bucket.lengths.max())
            assert bucket.lengths.tolist() == [lengths[row] for row in bucket.rows.tolist()]
            assert bucket.starts.tolist() == [bounds(lengths)[row] for row in bucket.rows.tolist()]
            index, valid = bucket.index()
            assert index.shape == (len(bucket.rows), bucket.width)
            tokens += index[valid].tolist()
            rows += bucket.rows.tolist()
            # padding at most doubles the work, and a bucket of several rows stays within the limit
            assert index.numel() < 2 * int(bucket.lengths.sum())
            assert len(bucket.rows) == 1 or index.numel() <= limit
        assert sorted(tokens) == list(range(sum(lengths)))
        assert sorted(rows) == [row for row, length in enumerate(lengths) if length]

    @pytest.mark.parametrize("lengths", EDGES, ids=str)
    def test_edges(self, lengths):
        buckets = bucket_rows(torch.tensor(bounds(lengths), dtype=torch.int32))
        assert sum(int(bucket.lengths.sum()) for bucket in buckets) == sum(lengths)
        assert bool(buckets) == (sum(lengths) > 0)

    def test_rows_of_one_length_share_a_bucket(self):
        (bucket,) = bucket_rows(torch.tensor([0, 6, 12, 12, 18], dtype=torch.int32))
        assert bucket.rows.tolist() == [0, 1, 3]
