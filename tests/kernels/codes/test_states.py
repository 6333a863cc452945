"""Test the decoding gather against plain decoding of every token in float64, as `reference.pack` lays codes out."""

import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hardkv.kernels import codes
from hardkv.kernels.codes import code_width
from hardkv.kernels.codes.gather_reference import gather_states_reference
from hardkv.kernels.codes.reference import LEVELS
from hardkv.kernels.codes.rotation import rotation
from hardkv.kernels.rows import Rows, cumulative
from tests.kernels.poison import poisoned

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
BITS = [8, 4, 3, 2]


@pytest.fixture(scope="module", params=["torch", "triton"])
def gather(request):
    if request.param == "torch":
        return gather_states_reference
    pytest.importorskip("triton")
    if not GPU and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs a GPU, or TRITON_INTERPRET=1")
    from hardkv.kernels.codes.triton_decode import gather_states

    return gather_states


def unpacked(packed, bits, dim):
    """Return the codes, int `[N, dim]`, of packed bytes `[N, W]`: one coordinate after the other, by bits."""
    packed = packed.astype(int)
    if bits == 8:
        return packed
    low = 4 if bits == 4 else 2
    width = dim * low // 8
    found = np.zeros((packed.shape[0], dim), int)
    for d in range(dim):
        field, byte = divmod(d, width)
        found[:, d] = packed[:, byte] >> (low * field) & (2**low - 1)
        if bits == 3:
            eighth = dim // 8
            bit = 4 * (field // 2) + field % 2 + 2 * (byte // eighth)
            found[:, d] += (packed[:, width + byte % eighth] >> bit & 1) << 2
    return found


def plain(packed, scale, centre, bits):
    """Return the states of N tokens in float64: `[N, D]`, from codes, scales `[N]` and centres `[N, D]`."""
    dim = centre.shape[1]
    code = unpacked(packed.cpu().numpy(), bits, dim)
    if bits == 8:
        level = code - 128
    else:
        half = 2 ** (bits - 1)
        size = np.array(LEVELS[bits])[code % half]
        level = np.where(code < half, size, -size)
    matrix = rotation(dim, torch.device("cpu"), torch.float64).numpy()
    states = (level / 64 * scale.double().cpu().numpy()[:, None]) @ matrix.T + centre.double().cpu().numpy()
    return torch.tensor(states, device=DEVICE)


def inputs(dim, bits, lengths, sizes=(20, 9), batch=1, capacity=7, dtype=torch.float32, layout="contiguous", seed=0):
    """Draw two tiers with random codes, a dense tier, and rows of these lengths of any of their tokens.

    Returns:
        The arguments of `gather_states` up to rows.
    """
    torch.manual_seed(seed)
    heads = len(lengths) // batch
    held = [torch.randint(0, 256, (size, code_width(dim, bits)), device=DEVICE).byte() for size in sizes]
    if layout == "transposed":  # the layout of a projection's output
        dense = torch.randn(batch, capacity, heads, dim, device=DEVICE).transpose(1, 2)
    elif layout == "strided":
        dense = torch.randn(batch, heads, dim, capacity, device=DEVICE).mT
    else:
        dense = torch.randn(batch, heads, capacity, dim, device=DEVICE)
    scales = [torch.randn(size, 2, device=DEVICE).exp().half() for size in sizes]
    centre = torch.randn(batch * heads, dim, device=DEVICE).to(dtype)
    total = sum(sizes) + batch * heads * capacity
    rows = Rows.of(cumulative(torch.tensor(lengths, device=DEVICE)))
    address = torch.randint(0, max(total, 1), (rows.total if total else 0,), device=DEVICE)
    return [*held, dense.to(dtype)], scales, centre, seed % 2, bits, address, rows


def check(gather, arguments):
    """Gather between guards, into poisoned memory, and compare decoded tokens with the plain ones, others exactly."""
    (*held, dense), scales, centre, kind, bits, address, rows = arguments
    dim = dense.shape[-1]
    with poisoned():
        whole = dense.new_empty(rows.total + 2, dim)
    guards = whole[[0, -1]].clone()
    out = whole[1:-1]
    gather(*arguments, out)
    assert torch.equal(whole[[0, -1]].view(torch.uint8), guards.view(torch.uint8))
    ragged = sum(each.shape[0] for each in held)
    coded = address < ragged
    assert torch.equal(out[~coded], dense.flatten(0, 2)[address[~coded] - ragged])
    chosen, row = address[coded], torch.repeat_interleave(rows.lengths)[coded]
    expected = plain(torch.cat(held)[chosen], torch.cat(scales)[chosen, kind], centre[row], bits)
    # float32 in between, and one rounding at the end
    size = (expected - centre[row].double()).abs().amax() if len(chosen) else 0
    tolerance = {"rtol": torch.finfo(dense.dtype).eps, "atol": 2e-6 * float(size) + 1e-6}
    torch.testing.assert_close(out[coded].double(), expected, **tolerance)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", [8, 16, 24, 64, 80, 96, 128, 256, 512])
def test_bits_and_dims(gather, bits, dim):
    check(gather, inputs(dim, bits, [40, 0, 1, 140]))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dim", [16, 40, 128])
def test_every_coordinate_by_itself(gather, bits, dim):
    """One coordinate of a large code among small ones: a wrong row or sign of the rotation shows."""
    arguments = inputs(dim, bits, [dim], sizes=(dim, 0), seed=1)
    single = torch.full((dim, dim), 128 if bits == 8 else 0, dtype=torch.uint8, device=DEVICE)
    single += torch.eye(dim, dtype=torch.uint8, device=DEVICE) * (100 if bits == 8 else 2**bits - 1)
    arguments[0][0] = codes.reference.pack(single, bits)
    arguments = (*arguments[:5], torch.arange(dim, device=DEVICE), arguments[6])
    check(gather, arguments)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided"])
@pytest.mark.parametrize("seed", [0, 1])
def test_dtypes_and_layouts_of_the_dense_tier(gather, dtype, layout, seed):
    check(gather, inputs(64, 4, [5, 70, 20, 9], batch=2, dtype=dtype, layout=layout, seed=seed))


@pytest.mark.parametrize("sizes", [(0, 0), (0, 5), (5, 0)], ids=str)
@pytest.mark.parametrize("capacity", [0, 3])
@pytest.mark.parametrize("lengths", [[0], [1], [0, 3], [129]], ids=str)
def test_empty_tiers_and_few_tokens(gather, sizes, capacity, lengths):
    if not sum(sizes) and not capacity:
        lengths = [0] * len(lengths)
    check(gather, inputs(16, 3, lengths, sizes, capacity=capacity))


@settings(max_examples=25, deadline=None)
@given(
    bits=st.sampled_from(BITS),
    dim=st.sampled_from([8, 16, 24, 40, 56]),
    lengths=st.lists(st.integers(0, 140), min_size=1, max_size=5),
    sizes=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    capacity=st.integers(1, 4),
    dtype=st.sampled_from([torch.float16, torch.float32]),
    seed=st.integers(0, 99),
)
def test_any_rows(gather, bits, dim, lengths, sizes, capacity, dtype, seed):
    check(gather, inputs(dim, bits, lengths, sizes, 1, capacity, dtype, seed=seed))


@pytest.mark.parametrize("bits", BITS)
def test_the_dispatching_function(bits):
    """It allocates what it is not given, in the dense tier's dtype; NaN stays a token's own."""
    arguments = inputs(16, bits, [9, 4], dtype=torch.float16)
    scales, address = arguments[1], arguments[5]
    address[2] = 3
    address[[*range(2), *range(3, 13)]] = 5
    scales[0][3] = torch.nan
    found = codes.gather_states(*arguments)
    assert found.dtype == torch.float16
    assert found.isnan().all(1).tolist() == [i == 2 for i in range(13)]
    assert found.isnan().any(1).tolist() == [i == 2 for i in range(13)]
    out = torch.empty_like(found)
    assert codes.gather_states(*arguments, out=out) is out
    assert torch.equal(out.view(torch.int16), found.view(torch.int16))


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
class TestOnGPU:
    @pytest.mark.parametrize("bits", BITS)
    @pytest.mark.parametrize("dim", [64, 128, 80, 256])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
    def test_large(self, bits, dim, dtype):
        lengths = [2000, 0, 1, 3000, 129, 128, 127, 500]
        arguments = inputs(dim, bits, lengths, (3_000, 501), 2, 150, dtype, "transposed")
        check(lambda *given: codes.gather_states(*given[:-1], out=given[-1]), arguments)

    @pytest.mark.parametrize("bits", BITS)
    def test_the_host_waits_for_nothing(self, bits):
        arguments = inputs(128, bits, [300, 200], dtype=torch.bfloat16)
        codes.gather_states(*arguments)  # compiles, and copies the rotation to the GPU
        torch.cuda.set_sync_debug_mode("error")
        try:
            codes.gather_states(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")
