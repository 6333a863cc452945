"""How ragged tiers store their tokens: as states, or quantised to a few bits per coordinate."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hardkv.cache.storage.dense import DenseTier
from hardkv.cache.storage.ragged import Columns, RaggedTier
from hardkv.kernels.codes import code_width, gather_codes
from hardkv.kernels.dtypes import accumulation_dtype


class Centres(NamedTuple):
    """What is subtracted from the keys and values of every row before they are quantised."""

    keys: Tensor  # [R, D]
    values: Tensor  # [R, Dv]

    def select_rows(self, rows: Tensor) -> "Centres":
        """Return the centres of the given rows (int64), in that order."""
        return Centres(self.keys[rows], self.values[rows])


def token_nbytes(bits: tuple[int, int], dim: int, value_dim: int, itemsize: int) -> int:
    """Return the bytes of a token that an event keeps, with its position and misses.

    Args:
        bits, dim, value_dim: of its key and value. itemsize: bytes of a coordinate that is not quantised.
    """
    if bits == (16, 16):
        return (dim + value_dim) * itemsize + 5
    return Codec(bits, 0, None).nbytes(dim, value_dim, itemsize) + 5


@dataclass(frozen=True)
class Codec:
    """Quantise tokens when they leave the dense tier.

    Args:
        bits: per coordinate of keys and values: 8, 4, 3, 2, or 16 for states that stay as they are.
        sinks: number of first tokens, which stay in the dense tier: their keys lie far from the others', and much
            attention goes to them.
        means: of every head's keys and values, `[H, D]` and `[H, Dv]`, to subtract; None: those of what each row holds
            at the first event that quantises some of it.
    """

    bits: tuple[int, int]
    sinks: int
    means: tuple[Tensor, Tensor] | None

    def empty(self, rows: int, keys: Tensor, values: Tensor) -> RaggedTier:
        """Return a tier without tokens, for keys `[..., D]` and values `[..., Dv]`."""
        codes = [
            states if bits == 16 else states.new_empty(0, code_width(states.shape[-1], bits), dtype=torch.uint8)
            for states, bits in zip((keys, values), self.bits, strict=True)
        ]
        return RaggedTier.empty(rows, codes[0], codes[1], scales=2)

    def nbytes(self, dim: int, value_dim: int, itemsize: int) -> int:
        """Return the bytes of a quantised token's codes and scales, without position and misses.

        Args:
            dim, value_dim: of its key and value. itemsize: bytes of a coordinate that is not quantised.
        """
        widths = zip((dim, value_dim), self.bits, strict=True)
        return 4 + sum(width * itemsize if bits == 16 else code_width(width, bits) for width, bits in widths)

    def first_centres(self, keys: Tensor, values: Tensor) -> Centres:
        """Return the centres of rows without codes, for keys `[B, H, _, D]` and values `[B, H, _, Dv]`."""
        batch, heads = keys.shape[:2]
        if self.means is not None:
            return Centres(
                *(mean.to(states).repeat(batch, 1) for mean, states in zip(self.means, (keys, values), strict=True))
            )
        return Centres(*(states.new_zeros(batch * heads, states.shape[-1]) for states in (keys, values)))

    def centres(self, old: Centres, condensed: RaggedTier, sparse: RaggedTier, dense: DenseTier) -> Centres:
        """Return the centres with which an event quantises.

        Without calibrated means, they are the means of what a row holds, without sinks, until it holds codes.
        """
        if self.means is not None:
            return old
        fixed = (condensed.lengths + sparse.lengths > 0)[:, None]
        slot = torch.arange(dense.bound, device=dense.fill.device)
        counted = (slot >= self.sinks) & (slot < dense.fill[:, None])  # [B, bound]
        number = counted.sum(1).clamp_min(1)[:, None, None]
        hidden = ~counted[:, None, :, None]  # such a slot may hold anything
        means = (
            states.masked_fill(hidden, 0.0).sum(2, dtype=accumulation_dtype(states.dtype)).div(number).to(states.dtype)
            for states in (dense.keys[:, :, : dense.bound], dense.values[:, :, : dense.bound])
        )
        return Centres(*(torch.where(fixed, kept, mean.flatten(0, 1)) for kept, mean in zip(old, means, strict=True)))

    def gather(
        self,
        held: tuple[RaggedTier, RaggedTier],
        dense: DenseTier,
        centres: Centres,
        address: Tensor,
        index: Tensor,
        positions: Tensor,
        misses: Tensor,
    ) -> Columns:
        """Gather tokens for a new ragged tier. Codes move as they are; tokens of the dense tier are quantised.

        Args:
            held: condensed and sparse tier. dense, centres: of the same layer.
            address: int64 `[N]`, index of each token in the two tiers and then the dense slots.
            index: int64 `[n]`, which of the N tokens to take, in this order.
            positions: int32 `[N]`. misses: uint8 `[N]`.
        """
        sources = [(tier.keys, tier.values) for tier in (*held, dense)]
        scales = [tier.columns.scales for tier in held]
        return Columns(*gather_codes(sources, scales, centres, self.bits, address, index, positions, misses))
