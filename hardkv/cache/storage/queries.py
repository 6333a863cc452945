"""The newest queries of a layer. They score its tokens at the next event."""

from collections.abc import Sequence

import torch
from torch import Tensor


class QueryRing:
    """Store the queries of the newest columns in place; new ones overwrite the oldest.

    The owner says which column is the newest. So queries do not count if a crop removed their columns or if a failed
    forward never stored them.
    """

    def __init__(self, queries: Tensor, capacity: int):
        batch, num_heads, _, head_dim = queries.shape
        with torch.inference_mode(False):
            self.buffer = torch.zeros(batch, num_heads, capacity, head_dim, dtype=queries.dtype, device=queries.device)
            self.valid = torch.zeros(batch, capacity, dtype=torch.bool, device=queries.device)
        self.first: int | None = None  # the oldest column not yet overwritten
        self.valid_from: int | None = None  # as far as the host knows, every sequence is valid from this column on

    @property
    def capacity(self) -> int:
        return self.valid.shape[1]

    def append(self, queries: Tensor, valid: Tensor | None, start: int) -> None:
        """Store `queries [B, Hq, q, D]` of columns `start, start + 1, ...`. `valid [B, q]`: all if None."""
        capacity, q_len = self.capacity, queries.shape[2]
        # before anything is overwritten
        self.first = max(start if self.first is None else min(self.first, start), start + q_len - capacity)
        told = valid is None and self._all_valid(start)
        self._note(start, None if valid is None else start + q_len)
        first = max(0, q_len - capacity)
        while first < q_len:  # at most twice: up to the buffer's end, then from its start
            slot = (start + first) % capacity
            length = min(q_len - first, capacity - slot)
            new, place = slice(first, first + length), slice(slot, slot + length)
            self.buffer[:, :, place] = queries[:, :, new]
            if not told:
                self.valid[:, place] = True if valid is None else valid[:, new]
            first += length

    def appended(self, count: int, end: int) -> None:
        """Note that other code wrote `count` queries of every sequence to the buffer, the last at column `end - 1`."""
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
        """Return whether every slot is already marked valid when columns from `start` on arrive."""
        return self.valid_from is not None and start - self.valid_from >= self.capacity

    def _note(self, start: int, valid_from: int | None) -> None:
        """Note that columns from `start` on arrive, valid from column `valid_from` on; None: all of them are valid.

        They may replace columns that were stored before.
        """
        if valid_from is None:
            valid_from = start if self.valid_from is None else min(self.valid_from, start)
        self.valid_from = valid_from

    def available(self, end: int) -> int:
        """Return how many columns before `end` are not overwritten."""
        return 0 if self.first is None else max(end - self.first, 0)

    def newest(self, count: int, end: int) -> tuple[Tensor, Tensor]:
        """Return up to `count` queries before column `end`, oldest first, and their validity; see `newest_of`."""
        return newest_of([self], min(count, self.available(end)), end)

    def resized(self, capacity: int, end: int) -> "QueryRing":
        """Return a copy with room for `capacity` columns that holds the newest queries before column `end`."""
        ring = QueryRing(self.buffer, capacity)
        queries, valid = self.newest(capacity, end)
        ring.append(queries, valid, end - valid.shape[1])
        return ring

    def without(self, hidden: Tensor) -> "QueryRing":
        """Return a copy in which queries of marked columns, bool `[B, end]`, do not count; `end` is the next column."""
        end = hidden.shape[1]
        ring = self.select_sequences(torch.arange(hidden.shape[0], device=hidden.device))
        columns = torch.arange(end - min(self.available(end), self.capacity), end, device=hidden.device)
        ring.valid[:, columns % self.capacity] &= ~hidden[:, columns]
        ring.valid_from = end
        return ring

    def select_sequences(self, indices: Tensor) -> "QueryRing":
        """Return a ring of the given batch rows, in that order."""
        ring = QueryRing(self.buffer[indices], self.capacity)
        ring.buffer.copy_(self.buffer[indices])
        ring.valid.copy_(self.valid[indices])
        ring.first, ring.valid_from = self.first, self.valid_from
        return ring


def newest_of(rings: Sequence[QueryRing], count: int, end: int) -> tuple[Tensor, Tensor]:
    """Return the `count` queries before column `end` of several rings of one shape, joined along the batch.

    Returns:
        Queries `[L * B, Hq, count, D]`, oldest first, and validity `[L * B, count]`. They may share memory with a ring.
    """
    capacity, buffer, valid = rings[0].capacity, rings[0].buffer, rings[0].valid
    if len(rings) > 1:
        buffer, valid = torch.cat([ring.buffer for ring in rings]), torch.cat([ring.valid for ring in rings])
    first = (end - count) % max(capacity, 1)
    if first + count <= capacity:
        return buffer[:, :, first : first + count], valid[:, first : first + count]
    spans = slice(first, capacity), slice(0, first + count - capacity)
    return torch.cat([buffer[:, :, span] for span in spans], 2), torch.cat([valid[:, span] for span in spans], 1)
