"""The ragged tiers, condensed and sparse: rows of tokens of different lengths. They change only at events."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hardkv.kernels.rows import Rows, count_per_row, cumulative, padded_index


class Columns(NamedTuple):
    """Everything stored per token, for N tokens. Storage and compaction move all columns alike."""

    keys: Tensor  # [N, D], or codes, see `storage.codec`
    values: Tensor  # [N, Dv], or codes
    positions: Tensor  # int32 [N]
    misses: Tensor  # uint8 [N], consecutive events that did not select the token
    scales: Tensor  # float16 [N, 2], of codes of keys and values; [N, 0] without codes

    def map(self, function: Callable[[Tensor], Tensor]) -> "Columns":
        """Return the columns with `function` applied to each."""
        return Columns(*map(function, self))

    def map_states(self, function: Callable[[Tensor], Tensor]) -> "Columns":
        """Return the columns with `function` applied to keys and values only; these are nearly all of the bytes."""
        return self._replace(keys=function(self.keys), values=function(self.values))


@dataclass(frozen=True)
class RaggedTier:
    """R rows of tokens in flat tensors. A row is contiguous and ascends in position. A tier never changes."""

    columns: Columns
    rows: Rows

    @classmethod
    def empty(cls, rows: int, keys: Tensor, values: Tensor, scales: int = 0) -> "RaggedTier":
        """Return a tier without tokens, with the widths, dtype and device of `keys [..., D]`, `values [..., Dv]`.

        It has `scales` scales per token.
        """
        columns = Columns(
            keys.new_empty(0, keys.shape[-1]),
            values.new_empty(0, values.shape[-1]),
            torch.empty(0, dtype=torch.int32, device=keys.device),
            torch.empty(0, dtype=torch.uint8, device=keys.device),
            torch.empty(0, scales, dtype=torch.float16, device=keys.device),
        )
        return cls(columns, Rows(torch.zeros(rows + 1, dtype=torch.int32, device=keys.device), 0, 0))

    @property
    def keys(self) -> Tensor:
        """`[N, D]`."""
        return self.columns.keys

    @property
    def values(self) -> Tensor:
        """`[N, Dv]`."""
        return self.columns.values

    @property
    def positions(self) -> Tensor:
        """int32 `[N]`."""
        return self.columns.positions

    @property
    def misses(self) -> Tensor:
        """uint8 `[N]`, consecutive events that did not select the token."""
        return self.columns.misses

    @property
    def cu_seqlens(self) -> Tensor:
        """Where rows begin and end, int32 `[R + 1]`."""
        return self.rows.cu_seqlens

    @property
    def lengths(self) -> Tensor:
        """Tokens of every row, int32 `[R]`."""
        return self.cu_seqlens.diff()

    def select_rows(self, rows: Tensor) -> "RaggedTier":
        """Return a tier of the given rows (int64), in that order. A row may appear several times or never."""
        lengths = self.lengths[rows].long()
        width = int(lengths.max()) if rows.numel() else 0
        index, valid = padded_index(self.cu_seqlens[:-1][rows], lengths, width)
        token = index[valid]
        return RaggedTier(self._take(token), Rows(cumulative(lengths), token.shape[0], width))

    def without(self, gone: Tensor) -> "RaggedTier":
        """Return a tier without the marked tokens, bool `[N]`. The host waits for their number."""
        token = (~gone).nonzero()[:, 0]
        if token.shape[0] == self.rows.total:
            return self
        lengths = count_per_row(~gone, self.cu_seqlens)
        return RaggedTier(self._take(token), Rows(cumulative(lengths), token.shape[0], int(lengths.max())))

    def _take(self, token: Tensor) -> Columns:
        return self.columns.map(lambda column: column[token])

    def tensors(self) -> list[Tensor]:
        """Return all tensors held, for counting bytes, including schedules that have been built."""
        return [*self.columns, *self.rows.tensors()]
