"""Compute indices for ragged rows: a flat buffer `[N, ...]` that `cu_seqlens [R + 1]` cuts into R rows."""

from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

# Tokens per bucket, padding included. Limits the temporaries of the PyTorch references (about 128 MB in float32).
MAX_BUCKET_TOKENS = 1 << 18


def cumulative(lengths: Tensor) -> Tensor:
    """Convert `lengths [R]` to `cu_seqlens`, int32 `[R + 1]`."""
    cu_seqlens = torch.zeros(lengths.shape[0] + 1, dtype=torch.int32, device=lengths.device)
    torch.cumsum(lengths, 0, out=cu_seqlens[1:])
    return cu_seqlens


def row_ids(cu_seqlens: Tensor, total: int) -> Tensor:
    """Return the row of every token, int64 `[N]`."""
    rows = torch.arange(cu_seqlens.shape[0] - 1, device=cu_seqlens.device)
    return torch.repeat_interleave(rows, cu_seqlens.diff(), output_size=total)


def count_per_row(mask: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Count the tokens that `mask` (bool `[N]`) selects in each row, int64 `[R]`."""
    running = torch.zeros(mask.shape[0] + 1, dtype=torch.int64, device=mask.device)
    torch.cumsum(mask, 0, out=running[1:])
    return running[cu_seqlens.long()].diff()


def padded_index(starts: Tensor, lengths: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return flat index and validity, both `[R, width]`, of left-aligned rows; invalid slots point at token 0."""
    slot = torch.arange(width, device=starts.device)
    valid = slot < lengths[:, None]
    return torch.where(valid, starts[:, None].long() + slot, 0), valid


@dataclass(frozen=True)
class Bucket:
    """Hold rows of similar length that the PyTorch references process together, padded to `width`."""

    rows: Tensor  # int64 [r]
    starts: Tensor  # int64 [r], offset of the row's first token
    lengths: Tensor  # int64 [r]
    width: int

    def index(self) -> tuple[Tensor, Tensor]:
        """Return flat index and validity of the bucket's tokens, both `[r, width]`."""
        return padded_index(self.starts, self.lengths, self.width)


def bucket_rows(cu_seqlens: Tensor, most: int | None = None) -> list[Bucket]:
    """Group the non-empty rows by length so that padding at most doubles the work.

    Read `cu_seqlens` on the host once; callers keep the result until the rows change.

    Args:
        cu_seqlens: int32 `[R + 1]`.
        most: maximum tokens per bucket, padding included; a single longer row is allowed. None: `MAX_BUCKET_TOKENS`.
    """
    most = MAX_BUCKET_TOKENS if most is None else min(most, MAX_BUCKET_TOKENS)
    bounds = cu_seqlens.tolist()
    lengths = [stop - start for start, stop in pairwise(bounds)]
    members: dict[int, list[int]] = {}
    for row, length in enumerate(lengths):
        if length:
            members.setdefault(length.bit_length(), []).append(row)
    buckets = []
    for _, rows in sorted(members.items()):
        width = max(lengths[row] for row in rows)
        step = max(1, most // width)
        for first in range(0, len(rows), step):
            part = rows[first : first + step]
            host = [part, [bounds[r] for r in part], [lengths[r] for r in part]]
            rows_, starts, sizes = torch.tensor(host, device=cu_seqlens.device)
            buckets.append(Bucket(rows_, starts, sizes, max(host[2])))
    return buckets


@dataclass(frozen=True)
class Rows:
    """Describe R ragged rows of a flat buffer, with the facts that the host knows."""

    cu_seqlens: Tensor  # int32 [R + 1]
    total: int  # N
    longest: int  # upper bound on the longest row's length
    schedules: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)  # kernel schedules, built once
    room: int | None = None  # tokens that schedules plan for, to serve later rows in the same buffers; None: total

    @classmethod
    def of(cls, cu_seqlens: Tensor) -> "Rows":
        """Create rows from `cu_seqlens`, reading it on the host."""
        return cls(cu_seqlens, int(cu_seqlens[-1]), int(cu_seqlens.diff().max()) if cu_seqlens.shape[0] > 1 else 0)

    @property
    def lengths(self) -> Tensor:
        """Return the number of tokens per row, int64 `[R]`."""
        return self.cu_seqlens.diff().long()

    @property
    def ids(self) -> Tensor:
        """Return the row of every token, int64 `[N]`."""
        return row_ids(self.cu_seqlens, self.total)

    @cached_property
    def buckets(self) -> list[Bucket]:
        """Group the rows as the PyTorch references need them; read them on the host once."""
        return bucket_rows(self.cu_seqlens)

    def buckets_of(self, most: int) -> list[Bucket]:
        """Group the rows as `buckets` does, with at most `most` tokens per bucket; a single longer row is allowed."""
        return bucket_rows(self.cu_seqlens, most)

    def tensors(self) -> list[Tensor]:
        """Return all tensors created so far, for counting bytes."""
        made = [t for bucket in self.__dict__.get("buckets", ()) for t in (bucket.rows, bucket.starts, bucket.lengths)]
        return [self.cu_seqlens, *made, *(t for schedule in self.schedules.values() for t in schedule.tensors())]
