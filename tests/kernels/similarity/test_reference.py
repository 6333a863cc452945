"""Test R-KV's redundancy against its n x n definition, in float64 loops."""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from hardkv.kernels.rows import Rows
from hardkv.kernels.similarity import REACH, mean_cosine, reference


def run(rows, threshold=0.5, dtype=torch.float64, **options):
    """`rows`: arrays `[n, D]`."""
    cu_seqlens = torch.tensor([0, *np.cumsum([len(row) for row in rows])], dtype=torch.int32)
    keys = torch.tensor(np.concatenate(rows), dtype=dtype)
    return mean_cosine(keys, Rows.of(cu_seqlens), threshold=threshold, **options)


def expected(rows, threshold=0.5, reach=REACH):
    return torch.tensor([r for row in rows for r in definition(row, threshold, reach)], dtype=torch.float64)


def definition(keys, threshold, reach):
    """Take c_ij with a zero diagonal; per i zero the last j above the threshold, if in reach; average over i."""
    n = len(keys)
    cosine = [[0.0] * n for _ in range(n)]
    for i in range(n):
        for j in range(n):
            if i != j:
                norms = max(np.linalg.norm(keys[i]), 1e-8) * max(np.linalg.norm(keys[j]), 1e-8)
                cosine[i][j] = float(keys[i] @ keys[j]) / norms
        for j in reversed(range(n)):
            if cosine[i][j] > threshold:
                if j >= n - reach:
                    cosine[i][j] = 0.0
                break
    return [sum(cosine[i][j] for i in range(n)) / n for j in range(n)]


def random_rows(seed, lengths, dim=3):
    """Draw low-dimensional keys, so that many are similar."""
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(length, dim)) * rng.lognormal(size=(length, 1)) for length in lengths]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**32),
    st.lists(st.integers(0, 14), min_size=1, max_size=5),
    st.sampled_from([2, 3, 8]),
    st.sampled_from([0.5, 0.0, 0.9, 1.0]),
)
def test_ragged(seed, lengths, dim, threshold):
    rows = random_rows(seed, lengths, dim)
    found = run(rows, threshold)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected(rows, threshold), rtol=0, atol=1e-9)


@contextmanager
def tiles(cosines, block):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "CPU_COSINES", cosines)
        patch.setattr(reference, "BLOCK", block)
        patch.setattr(reference, "WIDE", 2 * block)
        yield


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 200), st.integers(1, 8), st.integers(1, 15))
def test_any_tiles_and_reach(seed, cosines, block, reach):
    """Search rows alone and together, with growing blocks and with tokens left unmatched at the end."""
    rows = random_rows(seed, [13, 9, 0, 1, 12, 10])
    with tiles(cosines, block):
        torch.testing.assert_close(run(rows, reach=reach), expected(rows, reach=reach), rtol=0, atol=1e-9)


@pytest.mark.parametrize("threshold", [0.0, 0.5, 0.95])
@pytest.mark.parametrize("reach", [1, 50, 299, 300, 301])
def test_long_rows(reach, threshold):
    rows = random_rows(6, [300, 40, 211], dim=4)
    with tiles(512, 16):
        found = run(rows, threshold, reach=reach)
    torch.testing.assert_close(found, expected(rows, threshold, reach), rtol=0, atol=1e-9)


def test_what_is_out_of_reach_is_not_spared():
    """Ten keys, 2 and 5 identical: neither is in a reach of 4, so each counts as a duplicate of the other."""
    keys = np.eye(10)
    keys[5] = keys[2]
    for reach, blamed in ((4, [0.1, 0.1]), (5, [0.1, 0.0]), (8, [0.0, 0.0])):
        assert run([keys], reach=reach)[[2, 5]].tolist() == pytest.approx(blamed)


def test_the_default_reach_covers_what_budgets_leave():
    """The result is exact up to 1,536 tokens per row: the default budget, an interval and some more."""
    assert REACH == 1536


def test_hundreds_of_tokens_to_nine_digits():
    rows = random_rows(1, [300, 257, 64], dim=4)
    torch.testing.assert_close(run(rows), expected(rows), rtol=0, atol=1e-9)


def test_newest_of_identical_keys_is_spared():
    """Six keys, 0, 2 and 5 identical: token 5 is spared by both duplicates, token 2 is penalised only by token 0."""
    keys = np.eye(6)
    keys[[2, 5]] = keys[0]
    # 0 and 2 spare 5; 5 spares 2
    assert run([keys]).tolist() == pytest.approx([2 / 6, 0, 1 / 6, 0, 0, 0])


def test_without_similar_keys_nothing_is_spared():
    """In particular, token 0 is not spared."""
    angle = np.deg2rad([0, 80, 160])
    keys = np.stack([np.cos(angle), np.sin(angle)], 1)
    cosine = keys @ keys.T - np.eye(3)
    assert run([keys]).tolist() == pytest.approx(list(cosine.sum(0) / 3))


def test_threshold_is_exclusive():
    """A cosine exactly at the threshold is no near-duplicate."""
    keys = np.array([[1.0, 0.0], [1.0, 0.0]])
    assert run([keys], threshold=1.0).tolist() == [0.5, 0.5]
    assert run([keys], threshold=0.999).tolist() == [0.0, 0.0]


def test_keys_of_norm_zero():
    rows = [np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0], [1.0, 0.1]]), np.zeros((3, 2))]
    found = run(rows)
    torch.testing.assert_close(found, expected(rows), rtol=0, atol=1e-12)
    assert found[[0, 2, 4, 5, 6]].tolist() == [0.0] * 5


def test_scale_of_keys_does_not_matter():
    rows = random_rows(2, [9, 6])
    scaled = [row * np.linspace(0.01, 100, len(row))[:, None] for row in rows]
    torch.testing.assert_close(run(scaled), run(rows), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_accumulates_in_float32(dtype):
    rows = [torch.tensor(row).to(dtype).double().numpy() for row in random_rows(3, [30, 1, 0, 17])]
    found = run(rows, dtype=dtype)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected(rows), rtol=0, atol=1e-5)


def test_a_row_that_overflowed_does_not_reach_the_others():
    rows = random_rows(4, [7, 5, 6, 4])
    clean = run(rows)
    rows[0][0] = np.inf
    torch.testing.assert_close(run(rows)[7:], clean[7:], rtol=0, atol=0)


def largest_made(rows, **options):
    """Return the number of elements of the largest tensor made during the call."""
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    with Watch():
        run(rows, **options)
    return largest


@pytest.mark.parametrize("lengths", [[600], [600, 500, 600], [60] * 10, [1] * 600], ids=str)
def test_tiles_are_no_larger_than_the_keys(lengths):
    """This holds for any limit on cosines per tile."""
    rows = random_rows(5, lengths, dim=16)
    assert largest_made(rows) <= 16 * sum(lengths)


def test_tiles_fit_the_cache():
    rows = random_rows(5, [600], dim=64)
    with tiles(4096, 16):
        assert largest_made(rows) == 600 * 64
        assert largest_made([row[:, :4] for row in rows]) <= 4096
