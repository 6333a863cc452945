"""Observation: what a scorer sees, the held tokens of one layer and the newest queries."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from hardkv.kernels.rows import Rows, cumulative, padded_index
from hardkv.kernels.scoring import Reduce, window_attention
from hardkv.selectors.checks import settle


@dataclass(frozen=True)
class Observation:
    """The held tokens of one layer and the queries that score them.

    Tokens are flat and ragged: row `b * H + h` is KV head h of sequence b. Its tokens are contiguous, ascend in
    position, and lie from `cu_seqlens[row]` to `cu_seqlens[row + 1]`. Symbols: B sequences, H KV heads, R = B * H rows,
    G query heads per KV head, Hq = H * G, W queries, N tokens in all rows, D and Dv channels of a key and a value.

    Args:
        keys: `[N, D]`, after rotation (RoPE).
        load_values: returns `values [N, Dv]`; called when they are first read, so scorers without values gather none.
        positions: int32 `[N]`, the column of each token in its sequence, pads counted.
        cu_seqlens: int32 `[R + 1]`, where each row begins, and where the last one ends.
        queries: `[B, Hq, W, D]`, the newest queries, after rotation, oldest first.
        query_positions: int64 `[W]`, their columns.
        query_valid: bool `[B, W]`, False at padding.
        protected: bool `[N]`, tokens kept at any score: sinks, window, a pinned prompt.
        scale: the factor by which attention multiplies q . k.
        window: how many of the newest tokens of a row are its window.
        softcap: the softcap of the model's attention; None without one.
        tokens: int64 `[B]`, tokens of each sequence so far, evicted ones included; None: the length of its longest row.
        longest: the length of the longest row, or an upper bound, if the host knows it; None: read from the device.
        window_mask: bool `[N]`, True at the newest `window` tokens of every row. None: computed here.
    """

    keys: Tensor
    load_values: Callable[[], Tensor]
    positions: Tensor
    cu_seqlens: Tensor
    queries: Tensor
    query_positions: Tensor
    query_valid: Tensor
    protected: Tensor
    scale: float
    window: int
    softcap: float | None = None
    tokens: Tensor | None = None
    longest: int | None = None
    window_mask: Tensor = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.window_mask is None:
            stop = self.cu_seqlens[1:].long()[self.row]
            settle(self, window_mask=torch.arange(stop.shape[0], device=stop.device) >= stop - self.window)

    @cached_property
    def values(self) -> Tensor:
        """Values of all tokens, `[N, Dv]`."""
        return self.load_values()

    @property
    def batch_size(self) -> int:
        """Number of sequences, B."""
        return self.queries.shape[0]

    @property
    def num_rows(self) -> int:
        """Number of rows, R = B * H."""
        return self.cu_seqlens.shape[0] - 1

    @property
    def num_kv_heads(self) -> int:
        """Number of KV heads, H."""
        return self.num_rows // self.batch_size

    @cached_property
    def rows(self) -> Rows:
        """The rows in the form that kernels take."""
        if self.longest is None:
            return Rows.of(self.cu_seqlens)
        return Rows(self.cu_seqlens, self.keys.shape[0], min(self.longest, self.keys.shape[0]))

    @cached_property
    def lengths(self) -> Tensor:
        """Number of tokens per row, int64 `[R]`."""
        return self.rows.lengths

    @cached_property
    def context(self) -> Tensor:
        """Tokens of each sequence so far, int64 `[B]`: `tokens`, or the length of its longest row."""
        return self.lengths.view(self.batch_size, -1).amax(1) if self.tokens is None else self.tokens

    @property
    def max_length(self) -> int:
        """The length of the longest row, or an upper bound: the width of padded tensors."""
        return self.rows.longest

    @cached_property
    def row(self) -> Tensor:
        """The row of each token, int64 `[N]`."""
        return self.rows.ids

    @cached_property
    def attention(self) -> Tensor:
        """Reference attention A, `[N]`: mean over valid queries and the group of softmax(q . k * scale)."""
        return self.received("mean")

    def received(self, reduce: Reduce, exclude: Tensor | None = None) -> Tensor:
        """Attention that each token receives from the queries, `[N]`; see `kernels.scoring.window_attention`."""
        return window_attention(
            self.queries,
            self.query_positions,
            self.query_valid,
            self.keys,
            self.positions,
            self.rows,
            num_kv_heads=self.num_kv_heads,
            scale=self.scale,
            softcap=self.softcap,
            reduce=reduce,
            exclude=exclude,
        )

    def split(self, layers: Sequence[Rows]) -> "list[Observation]":
        """Split an observation of several layers, whose rows follow one another, into one per layer."""
        parts, first = [], 0
        batch = self.batch_size // len(layers)
        for i, rows in enumerate(layers):
            tokens, sequences = slice(first, first + rows.total), slice(i * batch, (i + 1) * batch)
            part = replace(
                self,
                keys=self.keys[tokens],
                load_values=partial(self._values_of, tokens),
                positions=self.positions[tokens],
                cu_seqlens=rows.cu_seqlens,
                longest=rows.longest,
                queries=self.queries[sequences],
                query_valid=self.query_valid[sequences],
                tokens=None if self.tokens is None else self.tokens[sequences],
                protected=self.protected[tokens],
                window_mask=self.window_mask[tokens],
            )
            parts.append(part)
            first += rows.total
        return parts

    def _values_of(self, tokens: slice) -> Tensor:
        return self.values[tokens]

    def to_padded(self, z: Tensor, fill: float = -torch.inf) -> Tensor:
        """Turn flat `z [N]` into `[B, H, max_length]`; rows are left-aligned, and `fill` follows their end."""
        index, valid = padded_index(self.cu_seqlens[:-1], self.lengths, self.max_length)
        return torch.where(valid, z[index], fill).unflatten(0, (self.batch_size, self.num_kv_heads))

    def to_flat(self, padded: Tensor) -> Tensor:
        """Turn `[B, H, max_length]` (or `[R, max_length]`) into `[N]`: the inverse of `to_padded`."""
        padded = padded.reshape(self.num_rows, padded.shape[-1])
        slot = torch.arange(self.keys.shape[0], device=padded.device) - self.cu_seqlens[:-1].long()[self.row]
        return padded[self.row, slot]

    @classmethod
    def from_dense(
        cls,
        keys: Tensor,
        values: Tensor,
        queries: Tensor,
        *,
        scale: float | None = None,
        window: int | None = None,
        sinks: int = 0,
        mask: Tensor | None = None,
        softcap: float | None = None,
    ) -> "Observation":
        """Make an observation from rectangular tensors, for tests and for scoring outside a cache.

        Args:
            keys: `[B, H, n, D]`.
            values: `[B, H, n, Dv]`.
            queries: `[B, Hq, W, D]`, the queries of the last W columns.
            scale: `D ** -0.5` by default.
            window: newest tokens of a row that are protected, W by default.
            sinks: first tokens of a row that are protected.
            mask: bool `[B, n]` or `[B, H, n]`, True for tokens that exist; all by default. A query does not count if
                its column exists in no head of its sequence.
            softcap: the softcap of the model's attention; None without one.

        Raises:
            ValueError: the shapes do not fit together.

        Example:

        ```python
        >>> keys, values, queries = torch.zeros(1, 2, 6, 4), torch.zeros(1, 2, 6, 4), torch.zeros(1, 4, 2, 4)
        >>> observation = Observation.from_dense(keys, values, queries)
        >>> observation.to_padded(observation.protected)  # of both heads, the two newest tokens
        tensor([[[0., 0., 0., 0., 1., 1.],
                 [0., 0., 0., 0., 1., 1.]]])

        ```
        """
        for name, tensor in (("keys", keys), ("values", values), ("queries", queries)):
            if tensor.dim() != 4:
                raise ValueError(
                    f"{name} {tuple(tensor.shape)} must have four dimensions: [B, heads, tokens, head dim]"
                )
        batch, num_kv_heads, columns, head_dim = keys.shape
        if queries.shape[0] != batch or queries.shape[1] % num_kv_heads or queries.shape[3] != head_dim:
            raise ValueError(
                f"queries {tuple(queries.shape)} do not fit keys {tuple(keys.shape)}: expected [B, Hq, W, D] with the "
                "same B and D and Hq a multiple of the KV heads"
            )
        if values.shape[:3] != keys.shape[:3]:
            raise ValueError(f"values {tuple(values.shape)} do not fit keys {tuple(keys.shape)}: B, H and n must agree")
        num_queries = queries.shape[2]
        if mask is None:
            mask = torch.ones(batch, num_kv_heads, columns, dtype=torch.bool, device=keys.device)
        elif mask.shape not in ((batch, columns), (batch, num_kv_heads, columns)):
            raise ValueError(
                f"mask {tuple(mask.shape)} does not fit keys {tuple(keys.shape)}: expected [B, n] or [B, H, n]"
            )
        elif mask.dim() == 2:
            mask = mask[:, None].expand(-1, num_kv_heads, -1)
        mask = mask.bool()
        present = mask.reshape(batch * num_kv_heads, columns)
        rank = present.long().cumsum(1)  # 1, 2, ... along the row
        window = num_queries if window is None else window
        protected = (rank <= sinks) | (rank > rank[:, -1:] - window)
        query_valid = torch.zeros(batch, num_queries, dtype=torch.bool, device=keys.device)
        overlap = min(num_queries, columns)
        if overlap:
            query_valid[:, -overlap:] = mask.any(1)[:, columns - overlap :]
        return cls(
            keys=keys.reshape(-1, head_dim)[present.reshape(-1)],
            load_values=lambda: values.reshape(-1, values.shape[-1])[present.reshape(-1)],
            positions=torch.arange(columns, device=keys.device).expand_as(present)[present].to(torch.int32),
            cu_seqlens=cumulative(present.sum(1)),
            queries=queries,
            query_positions=torch.arange(columns - num_queries, columns, device=keys.device),
            query_valid=query_valid,
            tokens=mask.any(1).sum(1),
            protected=protected[present],
            scale=head_dim**-0.5 if scale is None else scale,
            window=window,
            softcap=softcap,
        )
