"""Define the timed operations of a decode step, and list all: inputs, a call per backend, the error of its result."""

import torch
from torch import Tensor

from eval.speed.checks import inexact, relative_error, spot_rows
from eval.speed.event_operations import (
    Compaction,
    Decoding,
    Pooling,
    ScoringMaxLogits,
    ScoringMean,
    ShareOfBest,
    Similarity,
    SimilarityAlike,
    SortAndKeep,
)
from eval.speed.inputs import SEEN, Setting, Shape, make_tiers
from eval.speed.operation import Operation
from hardkv.cache.events.held import HeldTokens
from hardkv.cache.storage.dense import DenseTier
from hardkv.kernels import append, attention
from hardkv.kernels.attention import packages
from hardkv.kernels.attention.varlen import varlen_attention
from hardkv.kernels.rows import Rows


class Attention(Operation):
    """Decode one new token per sequence, over both tiers."""

    name = "attention"
    reference_tokens = 1 << 18

    def __init__(self, shape: Shape, seed: int, setting: Setting):
        self.setting = setting
        self.queries, fill = self.new_and_dense(setting)
        queries = self.queries
        self.tiers = make_tiers(setting, (shape.draw(seed) - fill).clamp_min(1), fill, SEEN, seed)
        self.rows, self.batch = shape.rows, shape.rows // setting.heads
        self.scale, self.joined = setting.dim**-0.5, None
        self.query = setting.normal(seed + 1)(self.batch, setting.heads * setting.group, queries, setting.dim)
        tokens = self.tiers.condensed.rows.total + self.rows * fill
        self.nbytes = tokens * setting.token_bytes + 2 * self.query.nbytes
        pairs = tokens * queries - self.rows * queries * (queries - 1) // 2
        self.flops = 4 * setting.dim * setting.group * pairs

    def new_and_dense(self, setting: Setting) -> tuple[int, int]:
        """Return the new tokens per sequence, and the tokens of the dense tier including them."""
        return 1, setting.half_full

    @classmethod
    def backends(cls) -> tuple[str, ...]:
        installed = packages.installed()
        return "triton", *installed, *(f"{package}, one tier" for package in installed), "torch"

    def run(self, backend: str) -> Tensor:
        """Return attention output `[B, H, G, q, D]`."""
        condensed, dense = self.tiers.condensed, self.tiers.dense
        new = {"bound": dense.bound, "start": SEEN - self.queries, "scale": self.scale}
        tail = dense.keys, dense.values, dense.positions, dense.fill
        if backend in ("triton", "torch"):
            out, _ = attention.attend_tiers(
                self.query, condensed.keys, condensed.values, condensed.rows, *tail, attention=backend, **new
            )
        elif backend.endswith(", one tier"):
            return self._one_tier(backend.removesuffix(", one tier"))
        else:
            rows = condensed.rows
            out, _ = varlen_attention(
                self.query, condensed.keys, condensed.values, rows.cu_seqlens, rows.longest, *tail,
                package=backend, **new,
            )  # fmt: skip
        return out.unflatten(1, (self.setting.heads, -1))

    def _one_tier(self, package: str) -> Tensor:
        """Run the package alone with all tokens in one contiguous tier: its speed without a dense tier."""
        if self.joined is None:
            query = self.query.unflatten(1, (self.setting.heads, -1)).transpose(2, 3)  # [B, H, q, G, D]
            merged = HeldTokens.of([self.tiers], 0, 0, 0)
            cu_q = torch.arange(self.rows + 1, dtype=torch.int32, device=query.device) * self.queries
            tokens = merged.gather([self.tiers], 0), merged.gather([self.tiers], 1)
            self.joined = query.flatten(0, 2).contiguous(), *tokens, cu_q, merged.rows
        query, keys, values, cu_q, rows = self.joined
        out, _ = packages.PACKAGES[package].attend(
            query, keys[:, None], values[:, None], cu_q, rows.cu_seqlens, self.queries, rows.longest,
            self.scale, self.queries > 1, None,
        )  # fmt: skip
        return out.unflatten(0, (self.batch, self.setting.heads, self.queries)).transpose(2, 3)

    def error(self, found: Tensor) -> float:
        condensed, dense = self.tiers.condensed, self.tiers.dense
        start, pairs = SEEN - self.queries, []
        grouped = self.query.unflatten(1, (self.setting.heads, -1))
        for row, part in spot_rows(condensed.rows):
            b, h = divmod(row, self.setting.heads)
            one = Rows.of(condensed.rows.cu_seqlens[row : row + 2] - part.start)
            seen = attention.dense_allowed(dense.positions[b][None], dense.fill[b][None], start, self.queries, None)
            tensors = grouped[b, h][None], condensed.keys[part], condensed.values[part]
            tail = dense.keys[b, h][None, None], dense.values[b, h][None, None]
            expected, _ = attention.tiered_attention(
                *(t.double() for t in tensors), one, *(t.double() for t in tail), seen, scale=self.scale
            )
            pairs.append((found[b, h], expected[0]))
        return relative_error(pairs)


class Chunk(Attention):
    """Attend a chunk of a prompt, or a draft: all new tokens since the last event at once."""

    name = "attention-chunk"
    most_shapes = 1

    def new_and_dense(self, setting: Setting) -> tuple[int, int]:
        return setting.interval, setting.capacity


class Append(Operation):
    """Append one new token per sequence to the dense tier."""

    name = "append"

    def __init__(self, shape: Shape, seed: int, setting: Setting):
        draw, batch = setting.normal(seed), shape.rows // setting.heads
        self.keys, self.values = (draw(batch, setting.heads, 1, setting.dim) for _ in range(2))
        self.dense = DenseTier.allocate(self.keys, self.values, setting.capacity)
        self.slot = setting.half_full
        self.dense.fill.fill_(self.slot)
        self.nbytes = 2 * shape.rows * setting.token_bytes + batch * (4 + 8 + 8)

    def run(self, backend: str) -> Tensor:
        dense = self.dense
        return append.append(dense.keys, dense.values, dense.positions, dense.fill, self.keys, self.values, SEEN)

    def error(self, found: Tensor) -> float:
        dense, slot = self.dense, self.slot
        pairs = [(dense.keys[:, :, slot], self.keys[:, :, 0]), (dense.values[:, :, slot], self.values[:, :, 0])]
        column = torch.full_like(dense.positions[:, slot], SEEN)
        return max(inexact([(dense.positions[:, slot], column), (found, dense.fill + 1)]), relative_error(pairs))


KINDS: tuple[type[Operation], ...] = (
    Attention,
    Compaction,
    Decoding,
    ScoringMean,
    ScoringMaxLogits,
    Similarity,
    SimilarityAlike,
    Chunk,
    Pooling,
    SortAndKeep,
    ShareOfBest,
    Append,
)
