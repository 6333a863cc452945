"""Test the compaction of codes in place: a row's own codes move bit by bit, and states are quantised as in float64."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hardkv.kernels import codes
from hardkv.kernels.codes.gather_reference import compact_codes_reference
from tests.kernels.codes.test_gather import BITS, check_quantised, inputs

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"


@pytest.fixture(scope="module", params=["torch", "triton"])
def compact(request):
    if request.param == "torch":
        return lambda tokens, dense, centres, bits, cu, *chosen: compact_codes_reference(
            tokens, dense, centres, bits, *chosen
        )
    pytest.importorskip("triton")
    if not GPU and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs a GPU, or TRITON_INTERPRET=1")
    from hardkv.kernels.codes.triton_in_place import compact_codes

    return compact_codes


def draw(lengths, slots, capacity, newest, sinks=0):
    """Draw which of its own tokens and of its dense slots each row takes, as many as it has.

    Args:
        lengths: of the rows. slots: filled dense slots of every row, of `capacity`. newest: the least number of dense
            tokens that a row takes, if it has room. sinks: first dense slots, which come before a row's own tokens.

    Returns:
        address `[N]` of all tokens, and index `[n]`, which of them to take.
    """
    n, address, index, own = sum(lengths), [], [], 0
    for row, length in enumerate(lengths):
        dense = [n + row * capacity + slot for slot in range(slots)]
        candidates = length + slots - sinks
        taken = min(newest, length, slots - sinks)
        older = torch.randperm(candidates - taken)[: length - taken].sort().values.tolist()
        index += [len(address) + sinks + i for i in [*older, *range(candidates - taken, candidates)]]
        address += [*dense[:sinks], *range(own, own + length), *dense[sinks:]]
        own += length
    return (torch.tensor(each, dtype=torch.int64, device=DEVICE) for each in (address, index))


def check(compact, dims, bits, lengths, shape, slots, newest=0, sinks=0, **options):
    """Compact rows between guards, and compare tokens of the rows and of the dense tier each in its way."""
    (sources, scales, centres, _), _ = inputs(dims, bits, (sum(lengths), 0), shape, **options)
    (keys, values), _, dense = sources
    n, (address, index) = sum(lengths), draw(lengths, slots, shape[2], newest, sinks)
    positions = torch.randint(0, 1 << 30, address.shape, dtype=torch.int32, device=DEVICE)
    misses = torch.randint(0, 256, address.shape, device=DEVICE).byte()
    old = keys, values, positions.new_zeros(n), misses.new_zeros(n), scales[0]
    room = [torch.cat([column[:8], column, column[:8]]) if n >= 8 else column.clone() for column in old]
    tokens = [buffer[8:-8] if n >= 8 else buffer for buffer in room]
    guards = [(buffer[:8].clone(), buffer[-8:].clone()) for buffer in room]
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32, device=DEVICE)
    compact(tokens, dense, centres, bits, cu_seqlens, address, index, positions, misses)
    if n >= 8:
        for buffer, (before, after) in zip(room, guards, strict=True):
            assert torch.equal(buffer[:8].view(torch.uint8), before.view(torch.uint8))
            assert torch.equal(buffer[-8:].view(torch.uint8), after.view(torch.uint8))
    where = address[index]
    own, slot = where < n, where[where >= n] - n
    assert torch.equal(tokens[2], positions[index])
    assert torch.equal(tokens[3], misses[index])
    assert torch.equal(tokens[4][own], old[4][where[own]])
    for kind in (0, 1):
        assert torch.equal(tokens[kind][own], old[kind][where[own]])
        expected, made = dense[kind].flatten(0, 2)[slot], tokens[kind][~own]
        if bits[kind] == 16:
            assert torch.equal(made, expected)
        else:
            centre = centres[kind][slot // shape[2]]
            check_quantised(made, tokens[4][~own, kind], expected, centre, bits[kind])


@pytest.mark.parametrize("bits", BITS, ids=str)
@pytest.mark.parametrize("dims", [(8, 8), (80, 96), (128, 24), (256, 64)], ids=str)
def test_bits_and_dims(compact, bits, dims):
    check(compact, dims, bits, [60, 60, 60, 60], (2, 2, 30), 28, newest=10, sinks=3)


@pytest.mark.parametrize("lengths", [[300, 300], [0, 257], [0, 0], [1, 1], [700, 5]], ids=str)
@pytest.mark.parametrize("newest", [0, 40])
def test_lengths_around_tiles(compact, lengths, newest):
    """Tokens move within a tile, and between tiles, by a little and by much."""
    check(compact, (16, 24), (4, 8), lengths, (1, 2, 60), 60, newest, sinks=4)


@pytest.mark.parametrize("layout", ["transposed", "strided"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_layouts_of_the_dense_tier(compact, layout, dtype):
    check(compact, (64, 16), (3, 16), [20, 20, 20], (1, 3, 12), 9, 5, dtype=dtype, layout=layout)


@settings(max_examples=25, deadline=None)
@given(
    bits=st.sampled_from(BITS),
    dims=st.tuples(*[st.sampled_from([8, 16, 24, 40])] * 2),
    lengths=st.lists(st.integers(0, 300), min_size=2, max_size=2),
    slots=st.integers(0, 12),
    newest=st.integers(0, 12),
    sinks=st.integers(0, 4),
    dtype=st.sampled_from([torch.float16, torch.float32]),
    seed=st.integers(0, 99),
)
def test_any_rows(compact, bits, dims, lengths, slots, newest, sinks, dtype, seed):
    sinks = min(sinks, slots)
    check(compact, dims, bits, lengths, (1, 2, 12), slots, newest, sinks, dtype=dtype, seed=seed)


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs many programs at once")
@pytest.mark.parametrize("bits", BITS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(16, 8, 170), (1, 8, 170)], ids=str)
def test_much(bits, dtype, shape):
    """Use more tokens than a program can hold."""
    lengths = [1500] * (shape[0] * shape[1])
    check(codes.compact_codes, (128, 128), bits, lengths, shape, 164, 90, 4, dtype=dtype, layout="transposed")
