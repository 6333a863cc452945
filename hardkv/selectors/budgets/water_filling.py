"""Water-filling: tokens go where the risk curves fall most. The result is exact and needs one sort."""

from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from hardkv.selectors.budgets.curves import RiskCurves, middles, reach

# `at_lengths` computes a layer's share of the total at lengths that are the first factor apart, and closer just above
# n, where the share changes fastest. Between two such lengths the share is at most the second factor larger.
ROOM_STEP, ROOM_SPARE = 1.02, 1.02


class Spending(Protocol):
    """What is spent: `Risk`, hashable."""

    @property
    def n(self) -> int:
        """Mean tokens per head."""
        ...

    @property
    def floor(self) -> int | float:
        """The least per head: a count, or a share of `n`."""
        ...

    @property
    def cap(self) -> int | None:
        """The most per head."""
        ...


@dataclass(frozen=True)
class Plan:
    """The pieces of all rows' curves, for water-filling: S = rows * (K' - 1), piece-major, so that ties spread.

    A budget is a number of tokens, or of bytes if tokens of different rows take different bytes (`priced`).
    """

    rows: int
    length: int  # the largest context length that was measured
    start: Tensor  # int64 [S], the count at which a piece begins
    stop: Tensor  # int64 [S]
    middle: Tensor  # float64 [S]
    gains: Tensor  # float64 [S], as measured: for contexts up to `length`
    tail: Tensor  # float64 [S], for longer contexts, before the factor `reach`
    cost: Tensor  # int64 [rows], of a token; 1 if the budget counts tokens
    full: int = 1  # the cost of a token of those that a budget's `n` counts
    free: int = 0  # the first tokens of a row, which cost nothing
    copies: "dict[torch.device, Plan]" = field(default_factory=dict, repr=False, compare=False)
    rooms: "dict[tuple[Spending, int, int], Tensor]" = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, curves: RiskCurves, continued: tuple[Tensor, Tensor], layers: slice) -> "Plan":
        """Make the plan of some layers; `continued` is `curves.continued()`, computed once for all plans."""
        counts, tail = continued
        gains = torch.nn.functional.pad(curves.gains, (0, tail.shape[2] - curves.gains.shape[2]))
        rows = tail[layers].flatten(0, 1).shape[0]
        start, middle = counts[:-1].clone(), middles(counts)
        start[0] = 0  # counts below the first measured one belong to the first piece

        def by_piece(per_row: Tensor) -> Tensor:
            return per_row[layers].flatten(0, 1).T.flatten()

        start, stop, middle = (t.repeat_interleave(rows) for t in (start, counts[1:], middle))
        cost = torch.ones(rows, dtype=torch.int64, device=tail.device)
        return cls(rows, curves.length, start, stop, middle, by_piece(gains), by_piece(tail), cost)

    def priced(self, cost: Tensor, full: int, free: int) -> "Plan":
        """Return a plan whose budget is the bytes of n tokens per row that take `full` bytes each.

        Args:
            cost: int64 `[rows]`, bytes of a token. full: at least as many. free: number of tokens per row, among the n
                too, that the bytes leave out.
        """
        return replace(self, cost=cost, full=full, free=free, copies={}, rooms={})

    def mean(self, n: int) -> int:
        """Return how many tokens per row have the bytes of n; sequences that are no longer are kept whole."""
        return self.free + (n - self.free) * self.full * self.rows // int(self.cost.sum())

    def on(self, device: torch.device) -> "Plan":
        """Return the plan on a device; it is copied once for all layers."""
        if self.start.device == device:
            return self
        if device not in self.copies:
            real = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
            start, stop = self.start.to(device), self.stop.to(device)
            middle, gains, tail = (t.to(device, real) for t in (self.middle, self.gains, self.tail))
            moved = start, stop, middle, gains, tail, self.cost.to(device)
            self.copies[device] = Plan(self.rows, self.length, *moved, self.full, self.free)
        return self.copies[device]

    def tensors(self) -> list[Tensor]:
        return [self.start, self.stop, self.middle, self.gains, self.tail, self.cost]

    def totals(self, risk: Spending, tokens: Tensor, protected: Tensor) -> Tensor:
        """Return counts per row, int64 `[B, rows]`, for sequences of `tokens [B]` with `protected [B]` per row."""
        total = (risk.n - self.free) * self.full * self.rows
        return self.counts(total, tokens, *bounds(risk, tokens, protected))

    def at_lengths(self, risk: Spending, length: int, protected: int) -> Tensor:
        """Return `totals` at lengths up to `length`, `[lengths, rows]`; stored, as every layer asks for the same."""
        asked = risk, length, protected
        found = self.rooms.get(asked)
        if found is None:
            n = self.mean(risk.n)
            lengths, step = [length, min(n, length)], 1.0  # up to n tokens, all are kept
            while n + step < length:
                lengths.append(round(n + step))
                step += min(step / 2, (n + step) * (ROOM_STEP - 1))
            tokens = self.start.new_tensor(sorted(set(lengths)))
            found = torch.cat([self.totals(risk, each, each.clamp_max(protected)) for each in tokens.split(32)])
            self.rooms.clear()
            self.rooms[asked] = found
        return found

    def counts(self, total: int, context: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Water-filling: return counts per row, int64 `[B, rows]`, at least `low [B]` and at most `high [B]`.

        They cost `total`, or as near to it as the bounds allow: with bytes, less than a token is left. `context [B]`:
        tokens of each sequence so far.
        """
        low = low.minimum(high)
        pieces = self.start.shape[0] // self.rows
        order = (self.gains_at(context) / self.cost.repeat(pieces)).argsort(dim=1, descending=True, stable=True)
        row = order % self.rows
        cost = self.cost[row]
        width = self.widths(low, high).gather(1, order)
        before = (width * cost).cumsum(1) - width * cost
        left = total - self.cost.sum() * (low - self.free)
        taken = ((left[:, None] - before).clamp_min(0) // cost).minimum(width)
        counts = low[:, None].expand(-1, self.rows).contiguous()
        return counts.scatter_add_(1, row, taken)

    def gains_at(self, context: Tensor) -> Tensor:
        """Return the loss that a token of each piece avoids in contexts `[B]`, `[B, S]`."""
        longer = self.tail * reach(self.middle, context[:, None])
        return torch.where(context[:, None] > self.length, longer, self.gains)

    def widths(self, low: Tensor, high: Tensor) -> Tensor:
        """Return the tokens of each piece between bounds `[B]`, int64 `[B, S]`."""
        return (self.stop.minimum(high[:, None]) - self.start.maximum(low[:, None])).clamp_min(0)


def bounds(risk: Spending, tokens: Tensor, protected: Tensor) -> tuple[Tensor, Tensor]:
    """Return the fewest and the most tokens per row, `[B]`, of sequences of `tokens [B]` with `protected [B]`."""
    if isinstance(risk.floor, float):
        low = protected + (risk.floor * (risk.n - protected).clamp_min(0).float()).long()
    else:
        low = protected.clamp_min(risk.floor)
    return low, tokens if risk.cap is None else tokens.minimum(protected.clamp_min(risk.cap))
