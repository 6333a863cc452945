"""Quantise keys and values to a few bits per coordinate, and read them."""

from hardkv.kernels.codes.coding import Coding
from hardkv.kernels.codes.reference import code_width, decode, encode

__all__ = ["BITS", "Coding", "code_width", "decode", "encode"]

# Bits per coordinate that states can have; 16 stands for states that are not quantised.
BITS = (16, 8, 4, 3, 2)
