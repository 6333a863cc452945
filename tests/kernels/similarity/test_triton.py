"""Test R-KV's redundancy in Triton against its definition in float64."""

import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from hardkv.kernels.rows import cumulative
from hardkv.kernels.similarity import REACH
from hardkv.kernels.similarity import triton as module
from hardkv.kernels.similarity.triton import mean_cosine
from tests.kernels.poison import poisoned

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-5, torch.bfloat16: 3e-3}
# The interpreter multiplies bfloat16 numbers as integers.
DTYPES = [dtype for dtype in TOLERANCE if GPU or dtype != torch.bfloat16]
LENGTHS = [[0], [1], [2], [0, 1, 0], [63, 64, 65], [0, 130, 1, 127, 128, 129, 0], [1] * 9]

pytestmark = pytest.mark.skipif(
    not GPU and os.environ.get("TRITON_INTERPRET") != "1", reason="needs a GPU, or TRITON_INTERPRET=1"
)


def random_rows(seed, lengths, dim, dtype=torch.float32, directions=40):
    """Draw keys `[N, D]` around a few directions and their opposites, so that no cosine is near 0.5, and `cu_seqlens`.

    Some directions are rare, so the last match of a key may be far, or missing.
    """
    rng = np.random.default_rng(seed)
    total, directions = sum(lengths), min(directions, dim)
    direction = (directions * rng.random(total) ** 2).astype(int)
    keys = np.eye(directions, dim)[direction] * rng.choice([-1, 1], (total, 1))
    keys += rng.uniform(-1, 1, (total, dim)) * 0.25 / np.sqrt(dim)
    keys *= rng.lognormal(size=(total, 1))
    lengths = torch.tensor(lengths, dtype=torch.int64, device=DEVICE)
    return torch.tensor(keys, dtype=dtype, device=DEVICE), cumulative(lengths)


def definition(keys, cu_seqlens, threshold=0.5, reach=REACH, margin=1e-4):
    """Take c_ij with a zero diagonal; per i zero the last j above the threshold, if in reach; average over i."""
    result = torch.empty(keys.shape[0], dtype=torch.float64, device=keys.device)
    for start, stop in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        n = stop - start
        unit = keys[start:stop].double()
        unit = unit / unit.norm(dim=1, keepdim=True).clamp_min(1e-8)
        cosine = (unit @ unit.T).fill_diagonal_(0)
        assert not bool(((cosine - threshold).abs() < margin).any()), "rounding would decide"
        match = (cosine > threshold).fill_diagonal_(False)
        last = torch.where(match, torch.arange(n, device=keys.device), -1).amax(1) if n else cosine.sum(1).long()
        found = (last >= max(n - reach, 0)).nonzero()[:, 0]
        cosine[found, last[found]] = 0
        result[start:stop] = cosine.sum(0) / n
    return result


def run(keys, cu_seqlens, longest=None, **options):
    """Run in poisoned memory, which must be overwritten completely."""
    longest = int(cu_seqlens.diff().max()) if longest is None else longest
    with poisoned():
        return mean_cosine(keys, cu_seqlens, longest, **options)


def check(keys, cu_seqlens, longest=None, **options):
    found, expected = run(keys, cu_seqlens, longest, **options).double(), definition(keys, cu_seqlens, **options)
    assert bool(found.isfinite().all())
    assert float((found - expected).norm()) <= TOLERANCE[keys.dtype] * float(expected.norm()) + 1e-7


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [3, 64, 80, 96])
def test_dtypes_and_dims(dtype, dim):
    check(*random_rows(dim, [70, 0, 1, 200, 33], dim, dtype))


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lengths_around_a_tile(lengths, dtype):
    check(*random_rows(1, lengths, 16, dtype))


@pytest.mark.parametrize("directions", [1, 3, 64])
def test_giant_row(directions):
    """Searches end at once, after some tiles, or at the row's front; sums come from many programs."""
    check(*random_rows(2, [1, 1100, 0], 64, directions=directions))


@pytest.mark.parametrize("longest", [200, 201, 1000, 20000])
def test_longest_is_only_a_bound(longest):
    check(*random_rows(3, [200, 7, 64], 8), longest)


@pytest.mark.parametrize("threshold", [0.5, 0.3, -0.5, 1.5])
def test_thresholds(threshold):
    """Include a threshold that only opposite keys miss, and one that nothing exceeds."""
    check(*random_rows(4, [90, 70], 24), threshold=threshold)


@pytest.mark.parametrize("reach", [1, 63, 64, 65, 128, 200, 299, 300, 1000])
def test_reach(reach):
    """Use reaches around a tile and around the longest row; other rows are shorter than the reach."""
    check(*random_rows(13, [300, 0, 1, 130, 64], 24, directions=12), reach=reach)


def test_what_is_out_of_reach_is_not_spared():
    """Ten keys, 2 and 5 identical: neither is in a reach of 4, so each counts as a duplicate of the other."""
    keys = torch.eye(10, device=DEVICE)
    keys[5] = keys[2].clone()
    cu_seqlens = torch.tensor([0, 10], dtype=torch.int32, device=DEVICE)
    for reach, blamed in ((4, [0.1, 0.1]), (5, [0.1, 0.0]), (8, [0.0, 0.0])):
        found = run(keys, cu_seqlens, reach=reach)
        assert found[[2, 5]].tolist() == pytest.approx(blamed)


def test_threshold_is_exclusive():
    """A cosine exactly at the threshold is no near-duplicate."""
    keys = torch.tensor([[1.0, 0.0], [1.0, 0.0]], device=DEVICE)
    cu_seqlens = torch.tensor([0, 2], dtype=torch.int32, device=DEVICE)
    assert run(keys, cu_seqlens, threshold=1.0).tolist() == [0.5, 0.5]
    assert run(keys, cu_seqlens, threshold=0.999).tolist() == [0.0, 0.0]


def test_newest_of_identical_keys_is_spared():
    """Six keys, 0, 2 and 5 identical: token 5 is spared by both duplicates, token 2 is penalised only by token 0."""
    keys = torch.eye(6, device=DEVICE)
    keys[[2, 5]] = keys[0].clone()
    cu_seqlens = torch.tensor([0, 6], dtype=torch.int32, device=DEVICE)
    assert run(keys, cu_seqlens).tolist() == pytest.approx([2 / 6, 0, 1 / 6, 0, 0, 0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keys_of_norm_zero(dtype):
    keys, cu_seqlens = random_rows(5, [40, 3, 20], 16, dtype)
    keys[[0, 7, 39]] = 0
    keys[40:43] = 0
    check(keys, cu_seqlens)
    assert run(keys, cu_seqlens)[[0, 7, 39, 40, 41, 42]].tolist() == [0.0] * 6


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, from the interpreter
def test_a_row_that_overflowed_does_not_reach_the_others():
    keys, cu_seqlens = random_rows(6, [70, 65, 30], 16)
    clean = run(keys, cu_seqlens)
    keys[80] = float("inf")
    found = run(keys, cu_seqlens)
    assert torch.equal(found[:70], clean[:70])
    assert torch.equal(found[135:], clean[135:])


def test_the_same_bits_every_time():
    """Spared cosines are summed as integers, so the order of the programs does not matter."""
    keys, cu_seqlens = random_rows(7, [300, 150], 16)
    first = run(keys, cu_seqlens)
    for _ in range(3):
        assert torch.equal(run(keys, cu_seqlens), first)


def test_nothing_behind_the_rows_is_touched():
    keys, cu_seqlens = random_rows(8, [40, 30, 9], 16)
    found = run(keys, cu_seqlens[:-1])
    assert torch.equal(found[:70], run(keys, cu_seqlens)[:70])
    assert bool(found[70:].isnan().all())


@pytest.mark.parametrize("rows", [0, 2])
def test_no_tokens(rows):
    cu_seqlens = torch.zeros(rows + 1, dtype=torch.int32, device=DEVICE)
    found = mean_cosine(torch.zeros(0, 64, device=DEVICE), cu_seqlens, 0)
    assert found.shape == (0,)
    assert found.dtype == torch.float32


@settings(max_examples=20, deadline=None)
@given(
    st.integers(0, 2**32),
    st.lists(st.integers(0, 40), min_size=1, max_size=5),
    st.sampled_from([2, 3, 8, 20]),
    st.sampled_from(DTYPES),
    st.integers(0, 100),
    st.sampled_from([4, 16, 128]),
    st.integers(1, 45),
)
def test_any_rows(seed, lengths, dim, dtype, surplus, chunk, reach):
    """Use any rows, any number of programs per sum, and any reach."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "MIN_CHUNK", chunk)
        check(*random_rows(seed, lengths, dim, dtype), max(lengths) + surplus, reach=reach)


class TestErrors:
    def test_strided_keys(self):
        with pytest.raises(ValueError, match="keys .* must be contiguous"):
            mean_cosine(torch.zeros(4, 3, device=DEVICE).T, torch.zeros(2, dtype=torch.int32, device=DEVICE), 3)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dim", [80, 128, 256])
@pytest.mark.parametrize("directions", [1, 8, 80])
@pytest.mark.parametrize("reach", [REACH, 1000, 20000])
def test_large(dtype, dim, directions, reach):
    check(*random_rows(dim, [5000, 0, 1, 12345, 700, 64], dim, dtype, directions), reach=reach)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
def test_more_elements_than_int32_counts():
    rows, length = (1 << 18) + 1, 64
    keys = torch.zeros(rows * length, 128, dtype=torch.bfloat16, device=DEVICE)
    last, cu_seqlens = random_rows(10, [length], 128, torch.bfloat16)
    keys[-length:] = last
    everywhere = torch.arange(rows + 1, dtype=torch.int32, device=DEVICE) * length
    found = run(keys, everywhere, length)
    assert torch.equal(found[-length:], run(last, cu_seqlens))
    assert not bool(found[:-length].any())


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
def test_in_a_captured_graph():
    """A replay uses the contents of keys and row bounds at replay, within the bound on the longest row."""
    keys, cu_seqlens = random_rows(11, [300, 200, 12], 128, torch.bfloat16)
    mean_cosine(keys, cu_seqlens, 400)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = mean_cosine(keys, cu_seqlens, 400)
    others, bounds = random_rows(12, [100, 12, 400], 128, torch.bfloat16)
    keys.copy_(others)
    cu_seqlens.copy_(bounds)
    graph.replay()
    assert torch.equal(found, run(others, bounds, 400))
