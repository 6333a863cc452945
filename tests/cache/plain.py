"""Model in plain code what a HardKVCache must hold and compute, column by column; import nothing from hardkv.

Queries, keys and values are small integers, so that scores are exact and ties are frequent. The worth of a token to a
head is the sum of its dot products with the queries observed; the scorer is `tests.cache.test_machine.Worth`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

LAYERS, HEADS, GROUP, DIM = 2, 2, 2, 4
SCALE = 0.3

# For one sequence and layer: candidates per head as (worth, position), best first, and n - |F| -> counts to keep.
Share = Callable[[list[list[tuple[float, int]]], list[int]], list[int]]


@dataclass(frozen=True)
class Columns:
    """New columns of a batch: queries `[L, B, Hq, q, D]`, keys and values `[L, B, H, q, D]`, exists bool `[B, q]`."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    exists: Tensor

    @classmethod
    def random(cls, exists: Tensor, generator: torch.Generator) -> "Columns":
        """Draw integers in float64 on the CPU."""
        batch, count = exists.shape

        def integers(heads: int, most: int) -> Tensor:
            shape = (LAYERS, batch, heads, count, DIM)
            return torch.randint(-most, most + 1, shape, generator=generator, device="cpu").to(exists.device).double()

        return cls(integers(HEADS * GROUP, 2), integers(HEADS, 2), integers(HEADS, 9), exists)

    def of(self, rows: Sequence[int]) -> "Columns":
        """Return the given batch rows, in this order."""
        index = torch.as_tensor(rows, dtype=torch.long)
        return Columns(self.queries[:, index], self.keys[:, index], self.values[:, index], self.exists[index])

    def until(self, column: int) -> "Columns":
        """Return the columns before `column`."""
        cut = [x[..., :column, :] for x in (self.queries, self.keys, self.values)]
        return Columns(*cut, self.exists[:, :column])

    def followed_by(self, new: "Columns") -> "Columns":
        """Return these columns followed by the new ones."""
        pairs = [(self.queries, new.queries), (self.keys, new.keys), (self.values, new.values)]
        return Columns(*(torch.cat(pair, -2) for pair in pairs), torch.cat([self.exists, new.exists], 1))


@dataclass
class Observed:
    """Hold the queries given to one event of one layer: columns `[W]`, queries `[B, Hq, W, D]`, valid `[B, W]`."""

    columns: list[int]
    queries: Tensor
    valid: Tensor


@dataclass
class Plain:
    """Track what every KV head of every layer and sequence holds, and when that changes.

    Args:
        window, sinks, interval, patience, pin_prompt: as for HardKVCache.
        share: function for the number of candidates each head keeps. n: tokens kept per head, including protected ones.
    """

    window: int
    sinks: int
    interval: int
    patience: int
    pin_prompt: bool
    share: Share
    n: int
    columns: Columns | None = None
    held: list[list[list[dict[int, int]]]] = field(default_factory=list)  # [B][L][H] {position: misses}
    events: int = 0
    last_event: int | None = None
    recording: bool = False
    prompt_length: int | None = None
    revocable: int = 0  # newest columns that extend a full window of queries, so that a crop loses none
    missing: int = 0  # queries that the window may lack after a longer crop

    @property
    def seen(self) -> int:
        return 0 if self.columns is None else self.columns.exists.shape[1]

    @property
    def batch(self) -> int:
        return len(self.held)

    @property
    def due(self) -> bool:
        """Return whether an event is due."""
        if self.columns is None:
            return False
        return self.last_event is None or self.seen - self.last_event >= self.interval

    # ------------------------------------------------------------------ what is done to the cache

    def forward(
        self, new: Columns, observed: list[Observed], fails: bool = False, hidden: Tensor | None = None
    ) -> list[Tensor]:
        """Take new columns; events that run empty `observed`; `fails` means that the event after this forward fails.

        `hidden` columns, bool `[B, columns so far]`, count as padding from now on.

        Returns:
            The attention output per layer, `[B, Hq, q, D]`, NaN where a column does not exist.
        """
        if self.due:  # the event of a draft, or one that failed
            self.event(observed)
        if hidden is not None and self.columns is not None:
            self.columns = replace(self.columns, exists=self.columns.exists & ~hidden)
            for b, layers in enumerate(self.held):
                for head in (head for heads in layers for head in heads):
                    for position in hidden[b].nonzero()[:, 0].tolist():
                        head.pop(position, None)
        start, count = self.seen, new.exists.shape[1]
        if self.columns is None:
            self.held = [[[{} for _ in range(HEADS)] for _ in range(LAYERS)] for _ in new.exists]
        self.columns = new if self.columns is None else self.columns.followed_by(new)
        out = [self._attend(layer, start) for layer in range(LAYERS)]
        for b, layers in enumerate(self.held):
            fresh = dict.fromkeys((start + new.exists[b].nonzero()[:, 0]).tolist(), 0)
            for heads in layers:
                for head in heads:
                    head.update(fresh)
        self.missing = max(0, self.missing - count)
        if self.recording:
            self.revocable += count if start else min(count, self.interval)
        if self.prompt_length is None and (count == 1 or (self.recording and start)):
            self.prompt_length = start or self.seen
        if self.due and not self.recording and not fails:
            self.event(observed)
        return out

    def refuses_crop(self, remove: int) -> bool:
        """Return whether the columns are too old to be taken back."""
        length, window_start = self.seen - remove, (self.last_event or 0) - self.window
        return bool(remove) and 0 < length < window_start

    def crop(self, remove: int, observed: list[Observed]) -> None:
        """Take back the newest columns."""
        if self.columns is None:
            return
        length = self.seen - remove
        if length <= 0:
            self.clear()
            return
        self.columns = self.columns.until(length)
        self.missing, self.revocable = self.missing + max(0, remove - self.revocable), 0
        for layers in self.held:
            for heads in layers:
                for head in heads:
                    for position in [position for position in head if position >= length]:
                        del head[position]
        if self.prompt_length is not None:
            self.prompt_length = min(self.prompt_length, length)
        if self.recording and self.due:
            self.event(observed)

    def clear(self) -> None:
        """Forget every column."""
        self.columns, self.held, self.events, self.last_event = None, [], 0, None
        self.prompt_length, self.missing, self.revocable = None, 0, 0

    def record(self) -> None:
        """Hold events from now on, until a crop or the next forward."""
        self.recording, self.revocable = True, 0

    def select(self, rows: Sequence[int]) -> None:
        """Continue with the given sequences, in this order."""
        if self.columns is not None:
            self.columns = self.columns.of(rows)
            self.held = [[[dict(head) for head in heads] for heads in self.held[row]] for row in rows]

    # ------------------------------------------------------------------ what it must hold

    def event(self, observed: list[Observed]) -> None:
        """Run an event: every head ranks its tokens by the queries given to it."""
        assert self.columns is not None
        for layer in range(LAYERS):
            if not any(head for b in range(self.batch) for head in self.held[b][layer]):
                continue  # nothing is held, so the scorer is not called
            shown = observed.pop(0)
            self._check_observed(shown, layer)
            for b in range(self.batch):
                self._select(b, layer, shown.columns)
        self.events, self.last_event, self.revocable = self.events + 1, self.seen, 0

    def _check_observed(self, shown: Observed, layer: int) -> None:
        """Check that the queries of the window's columns are correct and complete."""
        assert self.columns is not None
        width = len(shown.columns)
        assert shown.columns == list(range(self.seen - width, self.seen))
        assert min(self.window, self.seen) - self.missing <= width <= self.window
        exists = self.columns.exists[:, shown.columns]
        assert torch.equal(shown.valid, exists)
        true = self.columns.queries[layer][:, :, shown.columns]
        assert torch.equal(shown.queries * exists[:, None, :, None], true * exists[:, None, :, None])

    def worth(self, b: int, layer: int, head: int, observed: list[int], positions: list[int]) -> list[float]:
        """Return the sum of a token's dot products with the observed queries, over the head's group."""
        assert self.columns is not None
        real = [column for column in observed if self.columns.exists[b, column]]
        queries = self.columns.queries[layer, b, head * GROUP : (head + 1) * GROUP, real]
        return (self.columns.keys[layer, b, head, positions] @ queries.sum((0, 1))).tolist()

    def _select(self, b: int, layer: int, observed: list[int]) -> None:
        pinned = 0
        if self.pin_prompt:
            pinned = self.seen if self.prompt_length is None else self.prompt_length
        protected, ranked = [], []
        for head, held in enumerate(self.held[b][layer]):
            tokens = sorted(held)
            always = {*tokens[: self.sinks], *tokens[-self.window :], *(p for p in tokens if p < pinned)}
            worth = self.worth(b, layer, head, observed, tokens)
            candidates = [(w, p) for w, p in zip(worth, tokens, strict=True) if p not in always]
            protected.append(always)
            ranked.append(sorted(candidates, reverse=True))  # at ties the newer one first
        counts = self.share(ranked, [max(0, self.n - len(always)) for always in protected])
        for head, held in enumerate(self.held[b][layer]):
            selected = protected[head] | {position for _, position in ranked[head][: counts[head]]}
            self.held[b][layer][head] = {
                position: 0 if position in selected else missed + 1
                for position, missed in held.items()
                if position in selected or missed < self.patience
            }

    def kept(self, b: int, layer: int, head: int) -> list[int]:
        """Return the positions that attention reads."""
        return sorted(position for position, missed in self.held[b][layer][head].items() if missed == 0)

    def waiting(self, b: int, layer: int, head: int) -> dict[int, int]:
        """Return the positions on probation, with their misses."""
        held = self.held[b][layer][head]
        return {position: held[position] for position in sorted(held) if held[position]}

    def _attend(self, layer: int, start: int) -> Tensor:
        """Compute dense attention of the columns from `start` on over all columns, with -inf on tokens not held."""
        columns = self.columns
        assert columns is not None
        queries = columns.queries[layer, :, :, start:]
        count = queries.shape[2]
        out = torch.full_like(queries, torch.nan)
        for b, layers in enumerate(self.held):
            for head in range(HEADS):
                visible = torch.zeros(count, start + count, dtype=torch.bool)
                visible[:, self.kept(b, layer, head)] = True
                visible[:, start:] = columns.exists[b, start:] & torch.ones(count, count, dtype=torch.bool).tril()
                group = slice(head * GROUP, (head + 1) * GROUP)
                logits = queries[b, group] @ columns.keys[layer, b, head].T * SCALE
                weights = torch.softmax(logits.masked_fill(~visible, -torch.inf), -1)
                out[b, group] = weights @ columns.values[layer, b, head]
            out[b, :, ~columns.exists[b, start:]] = torch.nan
            assert layers
        return out


def evenly(ranked: list[list[tuple[float, int]]], room: list[int]) -> list[int]:
    """Share like TopK: every head fills its own room."""
    return room


def best_of_all(ranked: list[list[tuple[float, int]]], room: list[int]) -> list[int]:
    """Share like AdaKV with alpha 0: the best tokens of all heads share the room; newer tokens, lower heads first."""
    everyone = sorted(((w, p, -head) for head, tokens in enumerate(ranked) for w, p in tokens), reverse=True)
    taken = [-head for _, _, head in everyone[: sum(room)]]
    return [taken.count(head) for head in range(len(ranked))]
