"""The newest queries of a layer, which judge its tokens at the next event."""

from collections.abc import Sequence

import torch
from torch import Tensor


class QueryRing:
    """The queries of the newest columns, which score at the next event; written in place, oldest overwritten.

    Its owner says where the newest column is, so that queries of columns that a crop takes back, or that a failed
    forward never stored, do not count.
    """

    def __init__(self, queries: Tensor, capacity: int):
        batch, num_heads, _, head_dim = queries.shape
        with torch.inference_mode(False):
            self.buffer = torch.zeros(batch, num_heads, capacity, head_dim, dtype=queries.dtype, device=queries.device)
            self.valid = torch.zeros(batch, capacity, dtype=torch.bool, device=queries.device)
        self.first: int | None = None  # the oldest column that is not overwritten
        self.valid_from: int | None = None  # the host knows this and all newer columns to be valid in every sequence

    @property
    def capacity(self) -> int:
        return self.valid.shape[1]

    def append(self, queries: Tensor, valid: Tensor | None, start: int) -> None:
        """Store `queries [B, Hq, q, D]` of columns `start, start + 1, ...`; `valid [B, q]`, all when None."""
        capacity, q_len = self.capacity, queries.shape[2]
        # before anything is overwritten
        self.first = max(start if self.first is None else min(self.first, start), start + q_len - capacity)
        told = valid is None and self._all_valid(start)
        self._note(start, None if valid is None else start + q_len)
        first = max(0, q_len - capacity)
        while first < q_len:  # at most twice: to the buffer's end, and from its beginning
            slot = (start + first) % capacity
            length = min(q_len - first, capacity - slot)
            new, place = slice(first, first + length), slice(slot, slot + length)
            self.buffer[:, :, place] = queries[:, :, new]
            if not told:
                self.valid[:, place] = True if valid is None else valid[:, new]
            first += length

    def appended(self, count: int, end: int) -> None:
        """`count` queries of every sequence, before column `end`, were written to the buffer by somebody else."""
        start = end - count
        self.first = max(start if self.first is None else min(self.first, start), end - self.capacity)
        told = self._all_valid(start)
        self._note(start, None)
        if told:
            return
        first, last = (end - min(count, self.capacity)) % self.capacity, end % self.capacity
        if first < last:
            self.valid[:, first:last] = True
        else:
            self.valid[:, first:] = True
            self.valid[:, :last] = True

    def _all_valid(self, start: int) -> bool:
        """Whether every slot says valid already, when columns from `start` come."""
        return self.valid_from is not None and start - self.valid_from >= self.capacity

    def _note(self, start: int, valid_from: int | None) -> None:
        """Columns from `start` come, valid from a column on; None: all of them. They may take the place of others."""
        if valid_from is None:
            valid_from = start if self.valid_from is None else min(self.valid_from, start)
        self.valid_from = valid_from

    def available(self, end: int) -> int:
        """How many columns before `end` are not overwritten."""
        return 0 if self.first is None else max(end - self.first, 0)

    def newest(self, count: int, end: int) -> tuple[Tensor, Tensor]:
        """Up to `count` queries before column `end`, oldest first, and their validity; see `newest_of`."""
        return newest_of([self], min(count, self.available(end)), end)

    def resized(self, capacity: int, end: int) -> "QueryRing":
        """A copy with room for `capacity` columns and the newest ones before column `end`."""
        ring = QueryRing(self.buffer, capacity)
        queries, valid = self.newest(capacity, end)
        ring.append(queries, valid, end - valid.shape[1])
        return ring

    def without(self, hidden: Tensor) -> "QueryRing":
        """A copy in which queries of the marked columns, bool `[B, end]`, do not count; `end`: the next column."""
        end = hidden.shape[1]
        ring = self.select_sequences(torch.arange(hidden.shape[0], device=hidden.device))
        columns = torch.arange(end - min(self.available(end), self.capacity), end, device=hidden.device)
        ring.valid[:, columns % self.capacity] &= ~hidden[:, columns]
        ring.valid_from = end
        return ring

    def select_sequences(self, indices: Tensor) -> "QueryRing":
        """A ring of the given batch rows, in that order."""
        ring = QueryRing(self.buffer[indices], self.capacity)
        ring.buffer.copy_(self.buffer[indices])
        ring.valid.copy_(self.valid[indices])
        ring.first, ring.valid_from = self.first, self.valid_from
        return ring


def newest_of(rings: Sequence[QueryRing], count: int, end: int) -> tuple[Tensor, Tensor]:
    """The `count` queries before column `end` of rings of one shape, whose sequences follow one another.

    Returns:
        Queries `[L * B, Hq, count, D]`, oldest first, and validity `[L * B, count]`; they may share memory with a ring.
    """
    capacity, buffer, valid = rings[0].capacity, rings[0].buffer, rings[0].valid
    if len(rings) > 1:
        buffer, valid = torch.cat([ring.buffer for ring in rings]), torch.cat([ring.valid for ring in rings])
    first = (end - count) % max(capacity, 1)
    if first + count <= capacity:
        return buffer[:, :, first : first + count], valid[:, first : first + count]
    spans = slice(first, capacity), slice(0, first + count - capacity)
    return torch.cat([buffer[:, :, span] for span in spans], 2), torch.cat([valid[:, span] for span in spans], 1)
