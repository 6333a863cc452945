"""Compare with transformers' QuantizedCache: its settings, and the bytes that it truly holds."""

from typing import Any

import torch
from torch import Tensor
from transformers import QuantizedCache
from transformers.utils import is_hqq_available, is_optimum_quanto_available

PACKAGES = {"quanto": ("optimum-quanto", is_optimum_quanto_available), "hqq": ("hqq", is_hqq_available)}


def missing_package(backend: str) -> str | None:
    """Return a line that says what to install for a backend of QuantizedCache; None if it is there."""
    package, available = PACKAGES[backend]
    if available():
        return None
    left_out = f"QuantizedCache, {backend}, is left out: {package} is not installed"
    return f"{left_out}. Run: pip install 'hardkv[peers]' or pip install {package}"


class Quantized(QuantizedCache):
    """QuantizedCache with its bytes.

    Args:
        config: the model's.
        backend: "quanto" or "hqq".
        bits: per coordinate.
        axes: the axes along which the groups of keys and of values lie, as the backend counts them.
    """

    def __init__(self, config: Any, backend: str, bits: int, axes: tuple[int, int]):
        super().__init__(backend, config, nbits=bits, axis_key=axes[0], axis_value=axes[1])
        if backend == "quanto":
            _unpack_without_compiler()

    def nbytes(self) -> int:
        """Return the bytes of all layers: codes, scales, zero points, and the tokens that are not quantised."""
        return sum(tensor.nbytes for layer in self.layers for tensor in _tensors_of(layer))


def _tensors_of(layer: Any) -> list[Tensor]:
    held = [layer.keys, layer.values]
    for codes in (layer._quantized_keys, layer._quantized_values):
        if isinstance(codes, tuple):  # hqq
            packed, about = codes
            held += [packed, about["scale"], about["zero"]]
        else:
            held += [codes._data._data, codes._scale, codes._shift]
    return held


def _unpack_without_compiler() -> None:
    """Make quanto unpack codes with PyTorch; its own function first compiles an extension."""
    from optimum.quanto.tensor.packed import PackedTensor

    def unpack(packed: Any) -> Tensor:
        bits, mask = packed._bits, 2**packed._bits - 1
        return torch.cat([packed._data >> shift & mask for shift in range(0, 8, bits)])[: packed.shape[0]]

    PackedTensor.unpack = unpack
