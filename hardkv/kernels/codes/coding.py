"""How to read the quantised tokens of ragged rows."""

from typing import NamedTuple

import torch
from torch import Tensor

from hardkv.kernels.codes.reference import decode, unpack_levels
from hardkv.kernels.codes.rotation import rotation


class Coding(NamedTuple):
    """How to read the quantised keys and values of R ragged rows, N tokens.

    Attention needs no decoded tokens: q . (M^T c s + centre) = (q M) . c s + q . centre, and the sum of weighted values
    is rotated and shifted as a whole. M is the rotation, c s the levels of the codes times their scale.
    """

    bits: tuple[int, int]  # of keys and values; 16: not quantised
    scales: Tensor  # float16 [N, 2], of keys and values
    key_centres: Tensor  # [R, D]
    value_centres: Tensor  # [R, Dv]

    def query(self, query: Tensor, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the rotated queries of some rows, `[r, G, q, D]`, and what to add to their dot products, `[r, G, q]`.

        Args:
            query: `[r, G, q, D]`. rows: int64 `[r]`.
        """
        if self.bits[0] == 16:
            return query, None
        offset = torch.einsum("rgqd,rd->rgq", query, self.key_centres[rows].to(query))
        return query @ rotation(query.shape[-1], query.device, query.dtype), offset

    def rotated(self, keys: Tensor, values: Tensor, token: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the rotated, centred keys `[..., D]` and values `[..., Dv]` of tokens, from their codes.

        Args:
            keys, values: codes of the tokens. token: int64 `[...]`, their indices among all N.
        """
        scales = self.scales[token].to(dtype)
        read = (
            states.to(dtype) if bits == 16 else unpack_levels(states, bits, dtype) * scale[..., None]
            for states, bits, scale in zip((keys, values), self.bits, scales.unbind(-1), strict=True)
        )
        key, value = read
        return key, value

    def result(self, out: Tensor, rows: Tensor) -> Tensor:
        """Return attention over the values, from attention over the rotated, centred values, `[r, G, q, Dv]`."""
        if self.bits[1] == 16:
            return out
        centre = self.value_centres[rows].to(out)[:, None, None]
        return out @ rotation(out.shape[-1], out.device, out.dtype).mT + centre

    def decoded(self, keys: Tensor, values: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
        """Return the decoded keys `[N, D]` and values `[N, Dv]`. Tokens after the last row decode to anything.

        Args:
            keys, values: codes of all tokens. cu_seqlens: int32 `[R + 1]`, the rows.
        """
        token = torch.arange(keys.shape[0], dtype=torch.int32, device=keys.device)
        row = torch.searchsorted(cu_seqlens[1:], token, right=True).clamp_max(self.key_centres.shape[0] - 1)
        return self.states(0, keys, row), self.states(1, values, row)

    def states(self, kind: int, codes: Tensor, row: Tensor) -> Tensor:
        """Return the decoded keys (kind 0) or values (kind 1) of all tokens, `[N, D]`. row: int64 `[N]`, of each."""
        if self.bits[kind] == 16:
            return codes
        centres = (self.key_centres, self.value_centres)[kind]
        return decode(codes, self.scales[:, kind], centres[row], self.bits[kind])
