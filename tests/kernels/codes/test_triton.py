"""Test how the Triton kernel rounds to e4m3, which it computes with integers."""

import os

import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from hardkv.kernels.codes.triton import _e4m3  # noqa: E402

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"

pytestmark = pytest.mark.skipif(
    not GPU and os.environ.get("TRITON_INTERPRET") != "1", reason="needs a GPU, or TRITON_INTERPRET=1"
)


@triton.jit
def rounded(numbers, codes, levels, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    code, level = _e4m3(tl.load(numbers + at))
    tl.store(codes + at, code)
    tl.store(levels + at, level)


def test_rounding_to_e4m3():
    """Compare with PyTorch on all numbers of the format, on those halfway between two, and on their neighbours."""
    exact = torch.arange(127, device=DEVICE).byte().view(torch.float8_e4m3fn).float()
    half = (exact[1:] + exact[:-1]) / 2
    beside = [half.nextafter(half.new_tensor(bound)) for bound in (0.0, 500.0)]
    numbers = torch.cat([exact, half, *beside, torch.rand(7, device=DEVICE) * 20])
    assert numbers.shape == (512,)
    found, level = torch.empty_like(numbers, dtype=torch.int32), torch.empty_like(numbers)
    rounded[(1,)](numbers, found, level, SIZE=512)
    expected = numbers.to(torch.float8_e4m3fn)
    assert torch.equal(found.byte(), expected.view(torch.uint8))
    assert torch.equal(level, expected.float())
