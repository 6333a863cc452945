"""Test selection against Python's sorted(): largest value, then newer position, then lower head."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hardkv.kernels.selection import keep_best, share_of_best, sort_rows

DTYPES = st.sampled_from([torch.float32, torch.float64])


@st.composite
def ragged(draw):
    """Draw `(rows, extra)`: rows of (value, eligible) with few distinct values, and slots beyond the longest row."""
    token = st.tuples(st.sampled_from([-2.0, -0.5, 0.0, 0.25, 3.0]), st.booleans())
    rows = draw(st.lists(st.lists(token, max_size=9), min_size=1, max_size=5))
    return rows, draw(st.integers(0, 3)) if any(rows) else 0


def flatten(rows, dtype):
    tokens = [token for row in rows for token in row]
    lengths = [len(row) for row in rows]
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    values = torch.tensor([value for value, _ in tokens], dtype=dtype)
    return values, torch.tensor([eligible for _, eligible in tokens], dtype=torch.bool), cu_seqlens


def best_first(row):
    """Return the eligible places of a row, best first."""
    places = [place for place, (_, eligible) in enumerate(row) if eligible]
    return sorted(places, key=lambda place: (-row[place][0], -place))


@settings(max_examples=100, deadline=None)
@given(ragged(), DTYPES)
def test_sort_rows(example, dtype):
    rows, extra = example
    values, eligible, cu_seqlens = flatten(rows, dtype)
    width = max(map(len, rows)) + extra
    ordered, token = sort_rows(values, eligible, cu_seqlens, width)
    assert ordered.dtype == dtype
    assert ordered.shape == token.shape == (len(rows), width)
    for r, row in enumerate(rows):
        best = best_first(row)
        assert token[r, : len(best)].tolist() == [int(cu_seqlens[r]) + place for place in best]
        assert ordered[r, : len(best)].tolist() == [row[place][0] for place in best]
        assert torch.all(ordered[r, len(best) :] == -torch.inf)


@settings(max_examples=60, deadline=None)
@given(ragged(), st.data())
def test_keep_best(example, data):
    rows, extra = example
    values, eligible, cu_seqlens = flatten(rows, torch.float32)
    _, token = sort_rows(values, eligible, cu_seqlens, max(map(len, rows)) + extra)
    counts = [data.draw(st.integers(0, len(best_first(row)))) for row in rows]
    keep = keep_best(token, torch.tensor(counts), len(values))
    expected = [place in best_first(row)[:n] for row, n in zip(rows, counts, strict=True) for place in range(len(row))]
    assert keep.tolist() == expected


@pytest.mark.parametrize("width", [0, 2])
def test_sort_rows_without_tokens(width):
    """`width` may exceed the longest row here too."""
    nothing = torch.zeros(0)
    ordered, token = sort_rows(nothing, nothing.bool(), torch.zeros(4, dtype=torch.int32), width)
    assert ordered.tolist() == [[-torch.inf] * width] * 3
    assert token.shape == (3, width)


def test_keep_nothing_of_nothing():
    assert keep_best(torch.zeros(3, 0, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), 0).shape == (0,)


class TestShareOfBest:
    @settings(max_examples=120, deadline=None)
    @given(st.data(), st.integers(1, 3), st.integers(1, 4), st.integers(0, 7), DTYPES)
    def test_oracle(self, data, batch, heads, width, dtype):
        """Use rows sorted as by `sort_rows`: descending, newer first among equals, -inf at the end; +inf is allowed."""
        choices = st.sampled_from([-1.0, 0.0, 0.5, 2.0, float("inf")])
        values, positions, expected, totals = [], [], [], []
        for _ in range(batch):
            total, pool = data.draw(st.integers(0, heads * width + 2)), []
            for h in range(heads):
                held = data.draw(st.integers(0, width))
                row = [
                    (data.draw(choices), position)
                    for position in data.draw(st.lists(st.integers(0, 30), min_size=held, max_size=held, unique=True))
                ]
                row.sort(key=lambda token: (-token[0], -token[1]))
                pool += [(-value, -position, h) for value, position in row]
                values.append([value for value, _ in row] + [-torch.inf] * (width - held))
                positions.append([position for _, position in row] + [99] * (width - held))
            chosen = [h for _, _, h in sorted(pool)[:total]]
            expected.append([chosen.count(h) for h in range(heads)])
            totals.append(total)
        counts = share_of_best(
            torch.tensor(values, dtype=dtype).reshape(batch, heads, width),
            torch.tensor(positions, dtype=torch.int32).reshape(batch, heads, width),
            torch.tensor(totals),
        )
        assert counts.dtype == torch.int64
        assert counts.tolist() == expected

    def test_sequences_have_their_own_total(self):
        values = torch.zeros(3, 2, 4)
        positions = torch.arange(4).flip(0).expand(3, 2, 4)
        assert share_of_best(values, positions, torch.tensor([0, 3, 99])).tolist() == [[0, 0], [2, 1], [4, 4]]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_long_plateau(self, dtype):
        """Sorting must be stable, at lengths where unstable sorts fail."""
        values = torch.zeros(1, 3, 5000, dtype=dtype)
        positions = torch.arange(5000).flip(0).expand(1, 3, 5000)
        assert share_of_best(values, positions, torch.tensor([10001])).tolist() == [[3334, 3334, 3333]]
