"""Define the timed operations of an event: inputs, a call per backend, and the error of its result."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from eval.speed.checks import inexact, reference_kernels, relative_error, spot_rows
from eval.speed.inputs import SEEN, Setting, Shape, coded, make_tiers, slots
from eval.speed.operation import Operation
from hardkv import HardKVConfig
from hardkv.cache.events.held import HeldTokens
from hardkv.cache.storage.codec import Codec
from hardkv.kernels import compaction, scoring, selection, similarity
from hardkv.kernels.codes.gather_reference import gather_states_reference
from hardkv.kernels.rows import Rows
from hardkv.kernels.similarity import REACH


class Ragged(Operation):
    """Hold rows whose newest tokens are a window."""

    def __init__(self, shape: Shape, seed: int, setting: Setting):
        self.setting = setting
        self.rows = setting.rows(shape.draw(seed))
        slot, length = slots(self.rows)
        older = length - setting.window
        self.in_window = slot >= older
        spread = slot * (SEEN - setting.window) // older.clamp_min(1)
        self.positions = torch.where(self.in_window, SEEN - length + slot, spread).to(torch.int32)


class ScoringMean(Ragged):
    """Compute the attention that every token receives from the window's queries."""

    name = "scoring-mean"
    reduce: scoring.Reduce = "mean"

    def __init__(self, shape: Shape, seed: int, setting: Setting):
        super().__init__(shape, seed, setting)
        draw, window = setting.normal(seed), setting.window
        self.keys = draw(self.rows.total, setting.dim)
        batch = shape.rows // setting.heads
        self.queries = draw(batch, setting.heads * setting.group, window, setting.dim)
        self.columns = torch.arange(SEEN - window, SEEN, device=setting.device)
        self.valid = torch.ones(batch, window, dtype=torch.bool, device=setting.device)
        self.exclude = self.in_window if self.reduce == "max_logits" else None  # like R-KV
        self.scale = setting.dim**-0.5
        per_token = 4 + 4 + (1 if self.exclude is not None else 0)  # position, result, exclude flag
        self.nbytes = self.keys.nbytes + self.queries.nbytes + self.rows.total * per_token
        self.flops = 2 * setting.dim * setting.group * window * self.rows.total

    def run(self, backend: str) -> Tensor:
        return scoring.window_attention(
            self.queries, self.columns, self.valid, self.keys, self.positions, self.rows,
            num_kv_heads=self.setting.heads, scale=self.scale, reduce=self.reduce, exclude=self.exclude,
        )  # fmt: skip

    def error(self, found: Tensor) -> float:
        grouped, pairs = self.queries.double().unflatten(1, (self.setting.heads, -1)), []
        for row, part in spot_rows(self.rows):
            b, h = divmod(row, self.setting.heads)
            one = Rows.of(self.rows.cu_seqlens[row : row + 2] - part.start)
            exclude = None if self.exclude is None else self.exclude[part]
            expected = scoring.window_attention_reference(
                grouped[b, h][None], self.columns, self.valid[b][None], self.keys[part].double(), self.positions[part],
                one, 1, self.scale, None, self.reduce, exclude, None,
            )  # fmt: skip
            pairs.append((found[part], expected))
        return relative_error(pairs)


class ScoringMaxLogits(ScoringMean):
    """Score like R-KV: one softmax over the group's largest logits, before the window."""

    name = "scoring-max-logits"
    reduce = "max_logits"


class Similarity(Ragged):
    """Compute R-KV's redundancy for keys without near-duplicates, so that every cosine in reach is computed."""

    name = "similarity"
    reference_tokens = 1 << 18
    common = 0.0  # norm of the part that a row's keys share, over the norm of the rest

    def __init__(self, shape: Shape, seed: int, setting: Setting):
        super().__init__(shape, seed, setting)
        draw = setting.normal(seed)
        self.keys = draw(self.rows.total, setting.dim)
        if self.common:
            self.keys += (draw(shape.rows, setting.dim) * self.common)[self.rows.ids]
        self.nbytes, lengths = self.keys.nbytes + self.rows.total * 4, self.rows.lengths
        self.flops = 0 if self.common else int(2 * setting.dim * (lengths * lengths.clamp_max(REACH)).sum())

    def run(self, backend: str) -> Tensor:
        return similarity.mean_cosine(self.keys, self.rows)

    def error(self, found: Tensor) -> float:
        pairs = []
        for row, part in spot_rows(self.rows):
            one = Rows.of(self.rows.cu_seqlens[row : row + 2] - part.start)
            pairs.append(
                (found[part], similarity.mean_cosine_reference(self.keys[part].double(), one, 0.5, 1e-8, REACH))
            )
        return relative_error(pairs)


class SimilarityAlike(Similarity):
    """Compute the redundancy of similar keys, with mean cosine 0.6: the search for a near-duplicate ends early."""

    name = "similarity-alike"
    common = 1.5**0.5


class Pooling(Ragged):
    """Max-pool scores along rows."""

    name = "pooling"

    def __init__(self, shape: Shape, seed: int, setting: Setting):
        super().__init__(shape, seed, setting)
        self.score = setting.normal(seed)(self.rows.total, dtype=torch.float32).abs()
        self.nbytes = self.rows.total * (4 + 1 + 4)

    def run(self, backend: str) -> Tensor:
        return scoring.pool_rows(self.score, self.in_window, self.rows, kernel_size=7, pooling="max")

    def error(self, found: Tensor) -> float:
        pairs = []
        for row, part in spot_rows(self.rows):
            one = Rows.of(self.rows.cu_seqlens[row : row + 2] - part.start)
            with reference_kernels():
                expected = scoring.pool_rows(
                    self.score[part].double(), self.in_window[part], one, kernel_size=7, pooling="max"
                )
            pairs.append((found[part], expected))
        return relative_error(pairs)


class SortAndKeep(Ragged):
    """Select a share of every row; hardkv uses PyTorch's primitives."""

    name = "sort-and-keep"

    def __init__(self, shape: Shape, seed: int, setting: Setting):
        super().__init__(shape, seed, setting)
        self.values = setting.normal(seed)(self.rows.total, dtype=torch.float32)
        self.counts = (self.rows.lengths - setting.window).clamp_min(0) * 85 // 100
        self.nbytes = self.rows.total * (4 + 1 + 1)

    @classmethod
    def backends(cls) -> tuple[str, ...]:
        return ("primitives",)

    def run(self, backend: str) -> Tensor:
        rows = self.rows
        _, token = selection.sort_rows(self.values, ~self.in_window, rows.cu_seqlens, rows.longest)
        return selection.keep_best(token, self.counts, rows.total)

    def error(self, found: Tensor) -> float:
        pairs = []
        for row, part in spot_rows(self.rows):
            candidates = self.values[part].masked_fill(self.in_window[part], -torch.inf)
            expected = candidates.topk(int(self.counts[row])).values.double()
            kept = candidates[found[part]].double().sort(descending=True).values
            if kept.shape != expected.shape:
                return math.inf
            pairs.append((kept, expected))
        return relative_error(pairs)


class ShareOfBest(SortAndKeep):
    """Count how many of a sequence's best tokens each head holds, for AdaKV and Adaptive."""

    name = "share-of-best"

    def __init__(self, shape: Shape, seed: int, setting: Setting):
        super().__init__(shape, seed, setting)
        rows = self.rows
        ranked, token = selection.sort_rows(self.values, ~self.in_window, rows.cu_seqlens, rows.longest)
        self.ranked = ranked.unflatten(0, (-1, setting.heads))
        self.ages = self.positions[token].unflatten(0, (-1, setting.heads))
        self.total = self.counts.unflatten(0, (-1, setting.heads)).sum(1)
        self.nbytes = self.ranked.nbytes + self.ages.nbytes

    def run(self, backend: str) -> Tensor:
        return selection.share_of_best(self.ranked, self.ages, self.total)

    def error(self, found: Tensor) -> float:
        pairs = []
        for b in {0, self.total.shape[0] - 1}:
            best = self.ranked[b].flatten().topk(int(self.total[b])).indices // self.ranked.shape[2]
            pairs.append((found[b], best.bincount(minlength=self.setting.heads)))
        return relative_error(pairs)


class Compaction(Operation):
    """Gather the tokens that an event keeps: 85% of the condensed tokens and the whole dense tier, row after row."""

    name = "compaction"

    def __init__(self, shape: Shape, seed: int, setting: Setting):
        fill = setting.capacity
        self.tiers = make_tiers(setting, (shape.draw(seed) - fill).clamp_min(1), fill, SEEN, seed)
        random = torch.Generator(setting.device).manual_seed(seed)
        merged = HeldTokens.of([self.tiers], setting.window, 0, 0)
        self.merged = replace(merged, misses=torch.empty_like(merged.misses).random_(0, 255, generator=random))
        chosen = torch.rand(self.merged.rows.total, generator=random, device=setting.device) < 0.85
        chosen |= self.merged.address >= self.tiers.condensed.rows.total
        self.index = chosen.nonzero()[:, 0]
        # key, value, position and misses, each read and written; then the index
        self.nbytes = self.index.shape[0] * (2 * (setting.token_bytes + 4 + 1) + 8 + 8)

    def run(self, backend: str) -> tuple[Tensor, ...]:
        merged = self.merged
        return compaction.gather_tiers(self.tiers.sources, merged.address, self.index, merged.positions, merged.misses)

    def error(self, found: tuple[Tensor, ...]) -> float:
        """Check a few thousand tokens by plain indexing."""
        count = self.index.shape[0]
        place = torch.linspace(0, count - 1, min(count, 4096), device=self.index.device).long()
        token = self.index[place]
        address, offset = self.merged.address[token], self.tiers.condensed.rows.total
        tiers = self.tiers.condensed, self.tiers.dense
        pairs = [(found[2][place], self.merged.positions[token]), (found[3][place], self.merged.misses[token])]
        wrong = inexact(pairs)
        pairs = []
        for mine, name in ((found[0], "keys"), (found[1], "values")):
            older, newer = (getattr(tier, name) for tier in tiers)
            older, newer = older[address.clamp_max(offset - 1)], newer.flatten(0, 2)[(address - offset).clamp_min(0)]
            pairs.append((mine[place], torch.where((address < offset)[:, None], older, newer)))
        return max(wrong, relative_error(pairs))


class Decoding(Operation):
    """Gather the keys that a scorer sees, row after row: 4 bit codes, decoded, and the whole dense tier."""

    name = "decoding"
    bits = 4

    def __init__(self, shape: Shape, seed: int, setting: Setting):
        fill = setting.capacity
        tiers = make_tiers(setting, (shape.draw(seed) - fill).clamp_min(1), fill, SEEN, seed)
        self.tiers = coded(tiers, Codec((self.bits, self.bits), HardKVConfig.sinks, None))
        self.held = HeldTokens.of([self.tiers], setting.window, 0, 0)
        held, codes = self.held.rows.total, self.tiers.condensed
        dense = (held - codes.rows.total) * setting.token_bytes // 2
        # codes with two scales and dense keys are read, keys are written; then the address
        self.nbytes = codes.keys.nbytes + codes.columns.scales.nbytes + dense + held * (setting.token_bytes // 2 + 8)

    def run(self, backend: str) -> Tensor:
        return self.held.gather([self.tiers], 0)

    def error(self, found: Tensor) -> float:
        tiers, held, pairs = self.tiers, self.held, []
        assert tiers.centres is not None
        *codes, dense = (keys for keys, _ in tiers.sources)
        scales = [tier.columns.scales for tier in (tiers.condensed, tiers.sparse)]
        for row, part in spot_rows(held.rows):
            one = Rows.of(held.rows.cu_seqlens[row : row + 2] - part.start)
            expected = torch.empty_like(found[part], dtype=torch.float64)
            centre = tiers.centres.keys[row][None].double()
            gather_states_reference(
                [*codes, dense.double()], scales, centre, 0, self.bits, held.address[part], one, expected
            )
            pairs.append((found[part], expected))
        return relative_error(pairs)
