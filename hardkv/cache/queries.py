"""The newest queries of a layer, which judge its tokens at the next event."""

from collections.abc import Sequence

import torch
from torch import Tensor


class QueryRing:
    """The queries of the newest columns, which score at the next event; written in place, oldest overwritten."""

    def __init__(self, queries: Tensor, capacity: int):
        batch, num_heads, _, head_dim = queries.shape
        with torch.inference_mode(False):
            self.buffer = torch.zeros(batch, num_heads, capacity, head_dim, dtype=queries.dtype, device=queries.device)
            self.valid = torch.zeros(batch, capacity, dtype=torch.bool, device=queries.device)
        self.size = 0

    @property
    def capacity(self) -> int:
        return self.valid.shape[1]

    def append(self, queries: Tensor, valid: Tensor | None, start: int) -> None:
        """Store `queries [B, Hq, q, D]` of columns `start, start + 1, ...`; `valid [B, q]`, all when None."""
        capacity, q_len = self.capacity, queries.shape[2]
        first = max(0, q_len - capacity)
        while first < q_len:  # at most twice: to the buffer's end, and from its beginning
            slot = (start + first) % capacity
            length = min(q_len - first, capacity - slot)
            new, place = slice(first, first + length), slice(slot, slot + length)
            self.buffer[:, :, place] = queries[:, :, new]
            self.valid[:, place] = True if valid is None else valid[:, new]
            first += length
        self.size = min(capacity, self.size + q_len)

    def newest(self, count: int, end: int) -> tuple[Tensor, Tensor]:
        """Up to `count` queries before column `end`, oldest first, and their validity; see `newest_of`."""
        return newest_of([self], min(count, self.size), end)

    def grown(self, capacity: int, end: int) -> "QueryRing":
        """A copy with room for more columns; `end` is the column after the newest."""
        ring = QueryRing(self.buffer, capacity)
        queries, valid = self.newest(self.size, end)
        ring.append(queries, valid, end - self.size)
        ring.size = self.size
        return ring

    def select_sequences(self, indices: Tensor) -> "QueryRing":
        """A ring of the given batch rows, in that order."""
        ring = QueryRing(self.buffer[indices], self.capacity)
        ring.buffer.copy_(self.buffer[indices])
        ring.valid.copy_(self.valid[indices])
        ring.size = self.size
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
