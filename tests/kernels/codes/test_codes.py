"""Test quantised states against closed forms and published figures, in float64."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from hardkv.kernels.codes import code_width, decode, encode
from hardkv.kernels.codes.reference import DEVIATION, LEVELS, pack, unpack
from hardkv.kernels.codes.rotation import rotation

CPU = torch.device("cpu")
# Mean square error of the best quantiser of a Gaussian of variance 1 (Max 1960, table 1).
DISTORTION = {2: 0.1175, 3: 0.03454, 4: 0.009497}


def density(x):
    return math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def above(x):
    """Return the share of a Gaussian above x."""
    return math.erfc(x / math.sqrt(2)) / 2


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_levels_have_nearly_the_least_error(bits):
    """The mean square error of nearest levels for a Gaussian, in closed form, beside Max's of the best ones."""
    positive = [level / DEVIATION[bits] for level in LEVELS[bits]]
    assert len(positive) == 2 ** (bits - 1)
    bounds = [0.0, *((low + high) / 2 for low, high in pairwise(positive)), math.inf]
    # E[(x - l)^2] = 1 - 2 E[x l] + E[l^2], both halves alike
    error = 1 + 2 * sum(
        level**2 * (above(low) - above(high)) - 2 * level * (density(low) - density(high))
        for level, (low, high) in zip(positive, pairwise(bounds), strict=True)
    )
    assert DISTORTION[bits] * 0.999 < error < DISTORTION[bits] * 1.003


@pytest.mark.parametrize("dim", [8, 16, 64, 80, 96, 128, 256])
def test_rotation_is_orthogonal_and_spreads_a_coordinate_over_its_block(dim):
    found, block = rotation(dim, CPU, torch.float64), dim & -dim
    torch.testing.assert_close(found @ found.mT, torch.eye(dim, dtype=torch.float64))
    size = found.abs()
    assert ((size == 0) | ((size - block**-0.5).abs() < 1e-12)).all()
    assert ((size > 0).sum(1) == block).all()
    assert 0.2 < (found[:, 0][size[:, 0] > 0] > 0).double().mean() < 0.8 or block < 16  # signs differ


def test_rotation_is_the_same_everywhere():
    """Stored caches are read with it: a change breaks them."""
    assert (rotation(16, CPU, torch.float64)[:, 0] > 0).tolist() == [
        True, True, True, True, True, True, True, True, True, False, False, False, True, True, False, True,
    ]  # fmt: skip


@hypothesis_settings(max_examples=50, deadline=None)
@given(bits=st.sampled_from([1, 2, 3, 4, 8]), dim=st.integers(1, 6), tokens=st.integers(0, 5), seed=st.integers(0, 99))
def test_packing_loses_nothing(bits, dim, tokens, seed):
    codes = torch.randint(0, 2**bits, (tokens, 8 * dim), generator=torch.Generator().manual_seed(seed)).byte()
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (tokens, code_width(8 * dim, bits))
    assert torch.equal(unpack(packed, bits), codes)


@pytest.mark.parametrize(
    ("bits", "codes", "expected"),
    [
        (8, [9, 8, 7, 6, 5, 4, 3, 255], [9, 8, 7, 6, 5, 4, 3, 255]),
        (4, [0, 1, 2, 3, 4, 5, 6, 7], [0x40, 0x51, 0x62, 0x73]),
        (2, [0, 1, 2, 3, 3, 2, 1, 0], [0b01_11_10_00, 0b00_10_11_01]),
        # low two bits 3 2 1 0 3 2 1 0; high bits 1 1 1 1 1 0 0 0, of codes 7 5 6 4 3 1 2 0
        (3, [7, 6, 5, 4, 7, 2, 1, 0], [0b01_11_01_11, 0b00_10_00_10, 0b0001_1111]),
    ],
)
def test_packing_by_hand(bits, codes, expected):
    """Byte j holds codes j, j + W, j + 2 W, ... of D codes in W bytes, from its lowest bits on."""
    assert pack(torch.tensor(list(codes), dtype=torch.uint8), bits).tolist() == expected


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dim", [512, 768])
def test_error_of_gaussian_states_is_the_published_distortion(bits, dim):
    """Keeping the norm costs a little: the decoded vector is as long as the state, so it lies beside the best one.

    Vectors of fewer dims err less, as coordinates of a vector of fixed norm reach less far than a Gaussian.
    """
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2_000, dim, generator=generator, dtype=torch.float64) * 3 + 1
    centre = torch.ones_like(states)
    read = decode(*encode(states, centre, bits), centre, bits)
    error = ((read - states) ** 2).mean() / 9
    # of two vectors of length 1 with cosine c = sqrt(1 - d), the square distance is 2 - 2 c
    expected = 2 - 2 * math.sqrt(1 - DISTORTION[bits])
    assert error == pytest.approx(expected, rel=0.03)


def test_eight_bits_round_to_the_nearest_of_127_steps_to_the_largest():
    states = torch.randn(5_000, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    centre = torch.zeros_like(states)
    read = decode(*encode(states, centre, 8), centre, 8)
    step = (states @ rotation(64, CPU, torch.float64)).abs().amax(1) / 127
    error = ((read - states) ** 2).mean(1)
    assert ((error / step**2).mean() * 12).sqrt() == pytest.approx(1, abs=0.02)  # uniform within a step


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dim", [8, 80, 128])
def test_norms_are_kept(bits, dtype, dim):
    states = torch.randn(50, dim, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    states *= torch.logspace(-3, 3, 50, dtype=torch.float64).to(dtype)[:, None]
    centre = torch.zeros_like(states)
    codes, scale = encode(states, centre, bits)
    assert codes.dtype == torch.uint8
    assert codes.shape == (50, dim * bits // 8)
    assert scale.dtype == torch.float16
    assert decode(codes, scale, centre, bits).dtype == dtype
    read = decode(codes, scale, centre.double(), bits)  # without the rounding of coordinates
    ratio = read.norm(dim=1) / states.double().norm(dim=1)
    torch.testing.assert_close(ratio, torch.ones_like(ratio), atol=1e-3, rtol=0)


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_a_state_at_its_centre_is_read_as_the_centre(bits):
    centre = torch.randn(3, 16)
    assert torch.equal(decode(*encode(centre, centre, bits), centre, bits), centre)


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_huge_states_do_not_overflow(bits):
    states = torch.full((1, 16), 1e30)
    read = decode(*encode(states, torch.zeros_like(states), bits), torch.zeros_like(states), bits)
    assert read.isfinite().all()
