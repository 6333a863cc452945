"""Test the integer helpers that the host calls at every launch."""

import pytest

pytest.importorskip("triton")

import triton

from hardkv.kernels.gpu import cdiv, next_power_of_2

NUMBERS = [*range(2050), (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 1 << 31, (1 << 31) + 1]


def test_as_tritons_own():
    for number in NUMBERS:
        assert next_power_of_2(number) == triton.next_power_of_2(number)
        for divisor in (1, 3, 64):
            assert cdiv(number, divisor) == triton.cdiv(number, divisor)
