"""Test where held tokens are stored, against a loop over rows."""

import random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hardkv.kernels.layout import assign_reference, layout_reference
from hardkv.kernels.rows import Rows, cumulative


def make_case(data):
    """Make arguments of `layout`, and its expected result, with loops."""
    rng = random.Random(data.draw(st.integers(0, 2**32)))
    batch, heads = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    capacity = data.draw(st.integers(1, 9))
    window, sinks = data.draw(st.integers(1, 6)), data.draw(st.integers(0, 3))
    pinned, front = data.draw(st.sampled_from([0, 0, 20])), data.draw(st.integers(0, 3))
    fill = [rng.randint(0, capacity) for _ in range(batch)]
    counts = data.draw(st.lists(st.integers(0, 12), min_size=batch * heads, max_size=batch * heads))
    held = [sorted(rng.sample(range(50), count)) for count in counts]
    misses = [[rng.randint(0, 3) for _ in row] for row in held]
    dense = [list(range(50, 50 + capacity)) for _ in range(batch)]
    flat = [(row, i) for row, tokens in enumerate(held) for i in range(len(tokens))]
    ordered = data.draw(st.booleans())
    if ordered:
        rng.shuffle(flat)
    place = {token: at for at, token in enumerate(flat)}
    order = [place[row, i] for row, tokens in enumerate(held) for i in range(len(tokens))]
    expected = []
    for row, tokens in enumerate(held):
        b = row // heads
        length = len(tokens) + fill[b]
        entries = [
            (dense[b][slot], 0, len(flat) + row * capacity + slot, slot < front or slot >= fill[b] - window)
            for slot in range(fill[b])
        ]
        ahead = min(front, fill[b])
        entries[ahead:ahead] = [(p, misses[row][i], place[row, i], False) for i, p in enumerate(tokens)]
        expected += [
            (*entry, i >= length - window, i >= length - window or i < sinks or entry[0] < pinned)
            for i, entry in enumerate(entries)
        ]
    total = torch.tensor([count + fill[row // heads] for row, count in enumerate(counts)])
    arguments = (
        Rows(cumulative(total), len(expected), int(total.max()) + data.draw(st.integers(0, 5))),
        cumulative(torch.tensor(counts)),
        torch.tensor(order, dtype=torch.int64) if ordered else None,
        torch.tensor([held[row][i] for row, i in flat], dtype=torch.int32),
        torch.tensor([misses[row][i] for row, i in flat], dtype=torch.uint8),
        torch.tensor(dense, dtype=torch.int32),
        torch.tensor(fill),
        *(capacity, window, sinks, pinned, front),
    )
    return arguments, expected


def assert_matches(function, data, device="cpu"):
    arguments, expected = make_case(data)
    rows, *rest = arguments
    moved = [a.to(device) if isinstance(a, torch.Tensor) else a for a in rest]
    found = function(Rows(rows.cu_seqlens.to(device), rows.total, rows.longest), *moved)
    assert [tensor.dtype for tensor in found] == [torch.int32, torch.uint8, torch.int64, *[torch.bool] * 3]
    assert list(zip(*(tensor.tolist() for tensor in found), strict=True)) == expected


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_against_a_loop(data):
    assert_matches(layout_reference, data)


def assert_assigns(function, data, device="cpu"):
    """Compare `assign` with a loop."""
    rng = random.Random(data.draw(st.integers(0, 2**32)))
    counts = data.draw(st.lists(st.integers(0, 30), min_size=1, max_size=6))
    patience = data.draw(st.sampled_from([0, 2, 254]))
    tokens = [
        (row, rng.random() < 0.5, rng.random() < 0.3, rng.randint(0, 254))
        for row, n in enumerate(counts)
        for _ in range(n)
    ]
    tokens = [(row, keep, keep and stays, misses) for row, keep, stays, misses in tokens]

    def column(at, dtype):
        return torch.tensor([token[at] for token in tokens], dtype=dtype, device=device)

    rows = Rows(cumulative(torch.tensor(counts, device=device)), len(tokens), max(counts) + 3)
    misses, condensed, sparse, lengths = function(
        column(1, torch.bool), column(2, torch.bool), column(3, torch.uint8), rows, patience
    )
    expected = [0 if keep else misses + 1 for _, keep, _, misses in tokens]
    assert misses.tolist() == expected
    assert condensed.tolist() == [keep and not stays for _, keep, stays, _ in tokens]
    assert sparse.tolist() == [not token[1] and n <= patience for token, n in zip(tokens, expected, strict=True)]
    for chosen, found in zip((condensed, sparse), lengths.tolist(), strict=True):
        assert found == [
            sum(c for c, token in zip(chosen.tolist(), tokens, strict=True) if token[0] == row)
            for row in range(len(counts))
        ]
    assert lengths.dtype == torch.int32


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_assignment_against_a_loop(data):
    assert_assigns(assign_reference, data)
