"""Test the gather of quantised tokens: stored codes move bit by bit, and states are quantised as in float64."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hardkv.kernels import codes
from hardkv.kernels.codes import code_width, decode
from hardkv.kernels.codes.gather_reference import gather_codes_reference
from hardkv.kernels.codes.reference import DEVIATION, LEVELS, unpack
from hardkv.kernels.codes.rotation import rotation
from tests.kernels.poison import poisoned

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
BITS = [(8, 8), (4, 4), (3, 3), (2, 2), (16, 4), (3, 16), (2, 8)]


@pytest.fixture(scope="module", params=["torch", "triton"])
def gather(request):
    if request.param == "torch":
        return gather_codes_reference
    pytest.importorskip("triton")
    if not GPU and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs a GPU, or TRITON_INTERPRET=1")
    from hardkv.kernels.codes.triton import gather_codes

    return gather_codes


def inputs(dims, bits, sizes=(20, 9), shape=(2, 3, 7), dtype=torch.float32, layout="contiguous", seed=0):
    """Draw two tiers with random codes and a dense tier `[B, H, C, D]`; every token has an address.

    Returns:
        The arguments of `gather_codes` up to bits, and the addresses, int64 `[N]`, shuffled.
    """
    torch.manual_seed(seed)
    batch, heads, capacity = shape

    def held(size, kind):
        if bits[kind] == 16:
            return torch.randn(size, dims[kind], device=DEVICE).to(dtype)
        return torch.randint(0, 256, (size, code_width(dims[kind], bits[kind])), device=DEVICE).byte()

    def dense(dim):
        if layout == "transposed":  # the layout of a projection's output
            states = torch.randn(batch, capacity, heads, dim, device=DEVICE).transpose(1, 2)
        elif layout == "strided":
            states = torch.randn(batch, heads, dim, capacity, device=DEVICE).mT
        else:
            states = torch.randn(batch, heads, capacity, dim, device=DEVICE)
        return (states * torch.logspace(-2, 2, capacity, device=DEVICE)[:, None] + 1).to(dtype)

    sources = [tuple(held(size, kind) for kind in (0, 1)) for size in sizes]
    sources.append(tuple(dense(dim) for dim in dims))
    scales = [torch.rand(size, 2, device=DEVICE).half() for size in sizes]
    centres = tuple(torch.randn(batch * heads, dim, device=DEVICE).to(dtype) for dim in dims)
    total = sum(sizes) + batch * heads * capacity
    return (sources, scales, centres, bits), torch.randperm(total, device=DEVICE)


def check_quantised(found, scale, states, centre, bits):
    """Check codes `[n, W]` and scales `[n]` of states `[n, D]`: in float64, no level is nearer but for rounding."""
    dim = states.shape[-1]
    rotated = (states.double() - centre.double()) @ rotation(dim, states.device, torch.float64)
    norm = rotated.norm(dim=1, keepdim=True)
    if bits == 8:
        unit = rotated / rotated.abs().amax(1, keepdim=True).clamp_min(1e-30) * 127
        table = torch.arange(-128.0, 128, device=DEVICE).double()
    else:
        unit = rotated / norm.clamp_min(1e-30) * dim**0.5 * DEVIATION[bits]
        table = torch.tensor([*LEVELS[bits], *(-level for level in LEVELS[bits])], device=DEVICE).double()
    level = table[unpack(found, bits).long()]
    least = (table - unit[..., None]).abs().amin(-1)
    rounding = 3e-4 if bits == 8 else 1e-4  # of a rotation in float32, in levels that go up to 127, and to about 3
    torch.testing.assert_close((level - unit).abs(), least, atol=rounding, rtol=1e-6)
    expected = norm[:, 0] / (level.norm(dim=1) / 64).clamp_min(1e-30)
    torch.testing.assert_close(scale.double(), expected, rtol=2**-10, atol=2**-25)


def check(gather, arguments, address, index):
    """Gather into poisoned memory, and compare tokens of the two tiers and of the dense tier each in its way."""
    sources, scales, centres, bits = arguments
    positions = torch.randint(0, 1 << 30, address.shape, dtype=torch.int32, device=DEVICE)
    misses = torch.randint(0, 256, address.shape, device=DEVICE).byte()
    with poisoned():
        found = gather(*arguments, address, index, positions, misses)
    *states, new_positions, new_misses, new_scales = found
    assert torch.equal(new_positions, positions[index])
    assert torch.equal(new_misses, misses[index])
    assert new_scales.dtype == torch.float16
    ragged, chosen = sum(size.shape[0] for size in scales), address[index]
    held, slot = chosen < ragged, chosen[chosen >= ragged] - ragged
    assert torch.equal(new_scales[held], torch.cat(scales)[chosen[held]])
    for kind in (0, 1):
        first, second, dense = (source[kind] for source in sources)
        assert states[kind].dtype == first.dtype
        assert states[kind].shape == (index.shape[0], first.shape[1])
        assert states[kind].is_contiguous()
        assert torch.equal(states[kind][held], torch.cat([first, second])[chosen[held]])
        expected, made = dense.flatten(0, 2)[slot], states[kind][~held]
        if bits[kind] == 16:
            assert torch.equal(made, expected)
            assert not new_scales[~held, kind].any()
        else:
            centre = centres[kind][slot // dense.shape[2]]
            check_quantised(made, new_scales[~held, kind], expected, centre, bits[kind])
    return found


def drawn(address, count):
    return torch.randint(0, address.shape[0], (count,), device=DEVICE)


@pytest.mark.parametrize("bits", BITS, ids=str)
@pytest.mark.parametrize("dims", [(8, 8), (64, 64), (80, 96), (128, 24)], ids=str)
def test_bits_and_dims(gather, bits, dims):
    arguments, address = inputs(dims, bits)
    check(gather, arguments, address, drawn(address, 70))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("layout", ["transposed", "strided"])
@pytest.mark.parametrize("bits", [(4, 4), (16, 8)], ids=str)
def test_dtypes_and_layouts_of_the_dense_tier(gather, dtype, layout, bits):
    arguments, address = inputs((64, 64), bits, dtype=dtype, layout=layout)
    check(gather, arguments, address, drawn(address, 40))


@pytest.mark.parametrize("sizes", [(0, 0), (0, 5), (5, 0)], ids=str)
@pytest.mark.parametrize("shape", [(1, 2, 3), (2, 1, 0)], ids=str)
@pytest.mark.parametrize("count", [0, 1, 9])
def test_empty_tiers_and_few_tokens(gather, sizes, shape, count):
    arguments, address = inputs((16, 8), (4, 3), sizes, shape)
    index = drawn(address, count) if address.shape[0] else address
    check(gather, arguments, address, index)


@pytest.mark.parametrize("of", ["ragged", "dense"])
def test_all_tokens_of_one_kind(gather, of):
    """Fill whole blocks of a program, and a part of one."""
    arguments, address = inputs((8, 16), (3, 4), (150, 0), (1, 2, 75))
    check(gather, arguments, address, ((address < 150) == (of == "ragged")).nonzero()[:, 0])


@settings(max_examples=25, deadline=None)
@given(
    bits=st.sampled_from(BITS),
    dims=st.tuples(*[st.sampled_from([8, 16, 24, 40])] * 2),
    sizes=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(0, 4)),
    dtype=st.sampled_from([torch.float16, torch.float32]),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_any_tokens(gather, bits, dims, sizes, shape, dtype, seed, data):
    arguments, address = inputs(dims, bits, sizes, shape, dtype, seed=seed)
    total = address.shape[0]
    index = data.draw(st.lists(st.integers(0, total - 1), max_size=12)) if total else []
    check(gather, arguments, address, torch.tensor(index, dtype=torch.int64, device=DEVICE))


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_special_states(gather, bits):
    """A state at its centre is read as it, a huge one as something finite, and NaN as NaN, none beside another."""
    (sources, scales, centres, _), address = inputs((16, 16), (bits, bits), (3, 0), (1, 1, 6))
    keys = sources[2][0]
    keys[0, 0, 1], keys[0, 0, 2], keys[0, 0, 3], keys[0, 0, 4] = centres[0][0], 1e30, torch.nan, torch.nan
    index = torch.tensor([0, 1, 2, 3, 5], device=DEVICE) + 3  # the second NaN is in a slot that no token is in
    address = torch.arange(9, device=DEVICE)
    positions, misses = address.int(), address.byte()
    found = gather(sources, scales, centres, (bits, bits), address, index, positions, misses)
    read = decode(found[0], found[4][:, 0], centres[0].expand(5, -1), bits)
    assert torch.equal(read[1], centres[0][0])
    assert read[2].isfinite().all()
    assert read[3].isnan().all()
    for i, slot in ((0, 0), (4, 5)):
        check_quantised(found[0][[i]], found[4][[i], 0], keys[0, 0, [slot]], centres[0], bits)
    assert decode(found[1], found[4][:, 1], centres[1].expand(5, -1), bits).isfinite().all()


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
class TestOnGPU:
    @pytest.mark.parametrize("bits", BITS, ids=str)
    @pytest.mark.parametrize("dim", [128, 80, 256])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
    def test_large(self, bits, dim, dtype):
        arguments, address = inputs((dim, dim), bits, (30_000, 5_001), (4, 8, 150), dtype, "transposed")
        check(codes.gather_codes, arguments, address, drawn(address, 9_001).sort().values)

    @pytest.mark.parametrize("bits", BITS, ids=str)
    def test_the_host_waits_for_nothing(self, bits):
        arguments, address = inputs((128, 128), bits, (3_000, 500), (2, 8, 150), torch.bfloat16)
        chosen = address, drawn(address, 1_000), address.int(), address.byte()
        codes.gather_codes(*arguments, *chosen)  # compiles, and copies the rotation to the GPU
        torch.cuda.set_sync_debug_mode("error")
        try:
            codes.gather_codes(*arguments, *chosen)
        finally:
            torch.cuda.set_sync_debug_mode("default")
