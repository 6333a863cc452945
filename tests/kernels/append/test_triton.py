"""Test the Triton append against a loop over tokens: it writes the right tokens and nothing else."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from hardkv.kernels.append import append_step_reference
from hardkv.kernels.append import triton as module
from hardkv.kernels.append.triton import append, append_step

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int16, torch.int64]
SENTINEL = 77

pytestmark = pytest.mark.skipif(
    not GPU and os.environ.get("TRITON_INTERPRET") != "1", reason="needs a GPU, or TRITON_INTERPRET=1"
)


def tokens(*shape, dtype=torch.float32):
    return (torch.randn(shape, device=DEVICE) * 100).to(dtype)


def buffers(batch, heads, capacity, dim, value_dim, dtype=torch.float32):
    """Return keys, values and positions of a dense tier, filled with sentinels."""
    shapes = ((batch, heads, capacity, dim), dtype), ((batch, heads, capacity, value_dim), dtype)
    return [
        torch.full(shape, SENTINEL, dtype=kind, device=DEVICE)
        for shape, kind in (*shapes, ((batch, capacity), torch.int32))
    ]


def definition(dense, fill, keys, values, start, valid=None):
    """Append token by token; return the new fill."""
    batch, _, q_len, _ = keys.shape
    fill, valid = fill.tolist(), None if valid is None else valid.tolist()
    for b in range(batch):
        for column in range(q_len):
            if valid is None or valid[b][column]:
                dense[0][b, :, fill[b]] = keys[b, :, column]
                dense[1][b, :, fill[b]] = values[b, :, column]
                dense[2][b, fill[b]] = start + column
                fill[b] += 1
    return torch.tensor(fill, device=DEVICE)


def check(dense, fill, keys, values, start, valid=None):
    """Compare with the definition; the old fill must not change."""
    expected = [tensor.clone() for tensor in dense]
    new_fill = definition(expected, fill, keys, values, start, valid)
    found, own = [tensor.clone(memory_format=torch.preserve_format) for tensor in dense], fill.clone()
    result = append(*found, own, keys, values, start, valid)
    assert result.dtype == torch.int64
    assert torch.equal(result, new_fill)
    assert torch.equal(own, fill)
    for held, wanted in zip(found, expected, strict=True):
        assert torch.equal(held, wanted)


def flags(batch, q_len):
    return torch.rand(batch, q_len, device=DEVICE) < 0.6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("dim", "value_dim"), [(3, 3), (64, 64), (80, 80), (96, 64), (64, 0)])
def test_padding_and_different_fills(dtype, dim, value_dim):
    dense = buffers(3, 2, 14, dim, value_dim, dtype)
    keys, values = tokens(3, 2, 7, dim, dtype=dtype), tokens(3, 2, 7, value_dim, dtype=dtype)
    check(dense, torch.tensor([0, 3, 7], device=DEVICE), keys, values, 40, flags(3, 7))


@pytest.mark.parametrize("with_valid", [False, True])
@pytest.mark.parametrize("q_len", [0, 1, 2, 5])
def test_a_step(with_valid, q_len):
    dense = buffers(2, 3, 8, 64, 80)
    keys, values = tokens(2, 3, q_len, 64), tokens(2, 3, q_len, 80)
    check(dense, torch.tensor([1, 3], device=DEVICE), keys, values, 9, flags(2, q_len) if with_valid else None)


@pytest.mark.parametrize("start", [0, 1, 16, (1 << 31) - 2])
def test_starts(start):
    check(buffers(1, 1, 4, 8, 8), torch.tensor([2], device=DEVICE), tokens(1, 1, 2, 8), tokens(1, 1, 2, 8), start)


@pytest.mark.parametrize("value", [False, True])
def test_all_flags_alike(value):
    keys, values, fill = tokens(2, 2, 5, 8), tokens(2, 2, 5, 8), torch.tensor([4, 0], device=DEVICE)
    check(buffers(2, 2, 9, 8, 8), fill, keys, values, 3, torch.full((2, 5), value, device=DEVICE))


@pytest.mark.parametrize("with_valid", [False, True])
@pytest.mark.parametrize("heads", [1, 5])
def test_many_programs_for_a_sequence(monkeypatch, with_valid, heads):
    """With several tiles of tokens and blocks of heads, the fill is right although others still read the old one."""
    fill, valid = torch.tensor([5, 0], device=DEVICE), flags(2, 11)
    keys, values = tokens(2, heads, 11, 16), tokens(2, heads, 11, 16)
    for size in (1, 256):
        monkeypatch.setattr(module, "TILE_BYTES", size)
        check(buffers(2, heads, 16, 16, 16), fill, keys, values, 11, valid if with_valid else None)


def test_flags_before_a_far_tile():
    """Use more flags than a program counts at a time."""
    q_len = 2500
    dense, valid = buffers(1, 1, q_len + 3, 3, 3), flags(1, q_len)
    check(dense, torch.tensor([3], device=DEVICE), tokens(1, 1, q_len, 3), tokens(1, 1, q_len, 3), 0, valid)


def test_strided_inputs():
    """Use keys and values from a projection, flags sliced from a longer mask, and buffers sliced from larger ones."""
    keys, values = tokens(2, 5, 3, 64).transpose(1, 2), tokens(2, 5, 3, 96)[..., 8:88].transpose(1, 2)
    valid = flags(5, 9).T[4:6, :]
    whole = buffers(2, 4, 20, 64, 80)
    dense = [whole[0][:, 1:, 4:15], whole[1][:, :3, 4:15], whole[2][:, 4:15]]
    fill = torch.tensor([6, 2], device=DEVICE)
    expected = [tensor.clone() for tensor in whole]
    views = [expected[0][:, 1:, 4:15], expected[1][:, :3, 4:15], expected[2][:, 4:15]]
    new_fill = definition(views, fill, keys, values, 30, valid)
    assert torch.equal(append(*dense, fill, keys, values, 30, valid), new_fill)
    for held, wanted in zip(whole, expected, strict=True):
        assert torch.equal(held, wanted)


def test_tokens_without_a_slot_are_dropped():
    """Check that they are not written into the next head or sequence."""
    dense = buffers(2, 2, 4, 8, 8)
    expected = [tensor.clone() for tensor in dense]
    keys, values, fill = tokens(2, 2, 3, 8), tokens(2, 2, 3, 8), torch.tensor([3, 1], device=DEVICE)
    definition([tensor[1:] for tensor in expected], fill[1:], keys[1:], values[1:], 0)
    definition([tensor[:1] for tensor in expected], fill[:1], keys[:1, :, :1], values[:1, :, :1], 0)
    append(*dense, fill, keys, values, 0)
    for held, wanted in zip(dense, expected, strict=True):
        assert torch.equal(held, wanted)


@settings(max_examples=15, deadline=None)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 7)),
    st.tuples(st.integers(1, 20), st.integers(1, 20)),
    st.sampled_from(DTYPES),
    st.sampled_from([1, 64, 16384]),
    st.booleans(),
    st.integers(0, 1000),
    st.data(),
)
def test_any_shape(shape, dims, dtype, size, with_valid, start, data):
    batch, heads, q_len = shape
    fill = torch.tensor(data.draw(st.lists(st.integers(0, 5), min_size=batch, max_size=batch)), device=DEVICE)
    dense = buffers(batch, heads, 5 + q_len, *dims, dtype)
    keys, values = (tokens(batch, heads, q_len, dim, dtype=dtype) for dim in dims)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "TILE_BYTES", size)
        check(dense, fill, keys, values, start, flags(batch, q_len) if with_valid else None)


def test_one_call_after_another():
    """Append a prompt and then some steps; the fill carries over."""
    dense, fill = buffers(2, 2, 16, 64, 80), torch.tensor([0, 2], device=DEVICE)
    expected, wanted, start = [tensor.clone() for tensor in dense], fill.clone(), 0
    for q_len in (6, 1, 1, 3):
        keys, values, valid = tokens(2, 2, q_len, 64), tokens(2, 2, q_len, 80), flags(2, q_len)
        wanted = definition(expected, wanted, keys, values, start, valid)
        fill = append(*dense, fill, keys, values, start, valid)
        start += q_len
    assert torch.equal(fill, wanted)
    for held, hoped in zip(dense, expected, strict=True):
        assert torch.equal(held, hoped)


def test_last_dimension_must_be_contiguous():
    fill = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match="values has strides .*: its last dimension must be contiguous"):
        append(*buffers(1, 1, 4, 3, 3), fill, tokens(1, 1, 2, 3), tokens(1, 1, 3, 2).transpose(2, 3), 0)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("dim", [80, 128, 256])
@pytest.mark.parametrize("heads", [8, 32])
@pytest.mark.parametrize("q_len", [1, 4, 700])
def test_large(dtype, dim, heads, q_len):
    dense = buffers(16, heads, 1000, dim, dim, dtype)
    keys, values = (tokens(16, q_len, heads, dim, dtype=dtype).transpose(1, 2) for _ in range(2))
    fill = torch.randint(0, 300, (16,), device=DEVICE)
    for valid in (None, flags(16, q_len)):
        check(dense, fill, keys, values, 123, valid)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
def test_more_elements_than_int32_counts():
    capacity = (1 << 24) + 5
    dense = [torch.empty(1, 2, capacity, 128, dtype=torch.float16, device=DEVICE) for _ in range(2)]
    dense.append(torch.empty(1, capacity, dtype=torch.int32, device=DEVICE))
    keys, values = (tokens(1, 2, 3, 128, dtype=torch.float16) for _ in range(2))
    append(*dense, torch.tensor([capacity - 3], device=DEVICE), keys, values, 7)
    assert torch.equal(dense[0][:, :, -3:], keys)
    assert torch.equal(dense[1][:, :, -3:], values)
    assert dense[2][0, -3:].tolist() == [7, 8, 9]


class TestStep:
    """Test `append_step` and its reference against a loop over sequences; values of latents have width 0."""

    @settings(max_examples=12, deadline=None)
    @given(
        *(st.integers(1, 3), st.integers(1, 3), st.integers(1, 5), st.sampled_from([3, 64, 80])),
        *(st.sampled_from([0, 3, 64, 80]), st.integers(1, 7), st.integers(0, 40), st.sampled_from(DTYPES)),
    )
    def test_any_shape(self, batch, heads, group, dim, value_dim, capacity, column, dtype):
        dense = buffers(batch, heads, 9, dim, value_dim, dtype)
        ring = tokens(batch, heads * group, capacity, dim).to(dtype)
        fill = torch.randint(0, 9, (batch,), device=DEVICE)
        query, keys = tokens(batch, heads * group, 1, dim).to(dtype), tokens(batch, heads, 1, dim).to(dtype)
        values = tokens(batch, 1, heads, value_dim).to(dtype).transpose(1, 2)
        right, right_ring = clones(dense), ring.clone()
        right_fill = definition(right, fill, keys, values, column)
        right_ring[:, :, column % capacity] = query[:, :, 0]
        for run in (append_step, append_step_reference):
            found, found_fill, found_ring = clones(dense), fill.clone(), ring.clone()
            run(*found, found_fill, found_ring, torch.tensor([column], device=DEVICE), query, keys, values)
            for held, wanted in zip((*found, found_fill, found_ring), (*right, right_fill, right_ring), strict=True):
                assert torch.equal(held, wanted)

    @pytest.mark.parametrize("heads", [1, 5, 24])
    def test_heads_in_several_blocks(self, monkeypatch, heads):
        monkeypatch.setattr(module, "TILE_BYTES", 256)
        dense, ring = buffers(2, heads, 4, 32, 16), tokens(2, 2 * heads, 3, 32)
        fill, column = torch.tensor([3, 0], device=DEVICE), torch.tensor([7], device=DEVICE)
        new = tokens(2, 2 * heads, 1, 32), tokens(2, heads, 1, 32), tokens(2, heads, 1, 16)
        found, right = [*clones(dense), fill.clone(), ring.clone()], [*clones(dense), fill.clone(), ring.clone()]
        append_step(*found, column, *new)
        append_step_reference(*right, column, *new)
        for held, wanted in zip(found, right, strict=True):
            assert torch.equal(held, wanted)


def clones(tensors):
    return [tensor.clone() for tensor in tensors]
