"""What every kernel and a whole event cost on a GPU, beside their peers and the least time that memory allows.

    python -m eval.speed.kernels --out eval/results/kernels.json     # minutes, on one CUDA GPU
    python -m eval.speed.kernels_report eval/results/kernels.json    # tables, and the picture beside the JSON

Each operation runs on random bfloat16 inputs of the same ragged shapes with all its backends: hardkv's Triton kernel;
every installed `flash_attn_varlen_func`, as hardkv calls it on both tiers and alone on one contiguous tier of the same
tokens; and the PyTorch reference. `eager_us` is one call between two CUDA events, host included where it is slower;
`graph_us` a call within a captured graph. Calls take turns over copies of the inputs that exceed the L2 several times,
as far as 48 copies do: what the small operations read and write stays in it, as in a decode step. `bytes` are those
that must be moved, each input read once and each output written once, and `fraction` is what they make of the
bandwidth of a large copy. Before it is timed, an output is checked against float64.
"""

import argparse
import json
import math
import time
import warnings
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib import metadata
from itertools import chain, groupby
from operator import itemgetter
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import hardkv
from hardkv import HardKVConfig
from hardkv.cache.layer import HardKVLayer, compress_together
from hardkv.cache.merged import Merged
from hardkv.cache.queries import QueryRing
from hardkv.cache.tiers import DenseTier, RaggedTier, Tiers
from hardkv.kernels import append, attention, compaction, scoring, selection, similarity, varlen
from hardkv.kernels.backends import why_not_triton
from hardkv.kernels.rows import Rows, cumulative
from hardkv.selectors import Risk, RiskCurves, TopK

# Calls of a graph at least, unless they take longer than this together; replays of it; calls between two events.
GRAPH_CALLS, GRAPH_US, REPLAYS, EAGER_CALLS = 16, 20_000, 20, 20
# Bytes that calls of a round go through, and copies at most; the L2 of an H200 holds 60 MB.
ROTATED, MAX_COPIES = 400_000_000, 48
# Beyond this relative error an output counts as wrong; bfloat16 products err by a few thousandths.
TOLERANCE = 1e-2
COPY_BYTES = 2 << 30
# Logical length of synthetic sequences, from which what is kept is a part.
SEEN = 1 << 17


# ---------------------------------------------------------------------- shapes


@dataclass(frozen=True)
class Shape:
    """Rows (KV heads of all sequences) and the tokens they keep."""

    rows: int
    mean: int  # tokens of a row, those of the dense tier included
    lengths: str = "uniform"  # in 0.25 to 1.75 of the mean; "heavy": 45 to 1,800, log-uniform, scaled to the mean

    def draw(self, seed: int) -> Tensor:
        """Tokens of every row, int64 `[R]`."""
        random = torch.Generator().manual_seed(seed)
        if self.lengths == "uniform":
            return torch.randint(self.mean // 4, self.mean * 7 // 4 + 1, (self.rows,), generator=random)
        drawn = 45 * (1800 / 45) ** torch.rand(self.rows, generator=random, dtype=torch.float64)
        return (drawn * self.mean / drawn.mean()).round().long()

    def __str__(self) -> str:
        return f"{self.rows}x{self.mean} {self.lengths}"


SHAPES = (
    Shape(64, 2048),
    Shape(256, 2048),
    Shape(512, 4096),
    Shape(128, 32768),
    Shape(256, 512, "heavy"),
    Shape(288, 2048, "heavy"),
    Shape(8, 2048),
)
QUICK = (Shape(64, 2048), Shape(256, 2048), Shape(8, 2048))


@dataclass(frozen=True)
class Setting:
    """What all inputs share."""

    device: torch.device
    dtype: torch.dtype
    heads: int = 8  # KV heads
    group: int = 4  # query heads of each
    dim: int = 128
    window: int = 32
    interval: int = 128

    @property
    def capacity(self) -> int:
        """Slots of a dense tier."""
        return self.window + self.interval

    @property
    def half_full(self) -> int:
        """Tokens of a dense tier in the middle of an interval."""
        return self.window + self.interval // 2

    @property
    def token_bytes(self) -> int:
        """Bytes of a token's key and value."""
        return 2 * self.dim * self.dtype.itemsize

    def normal(self, seed: int) -> Callable[..., Tensor]:
        """A function that draws tensors of the sizes it is given."""
        random = torch.Generator(self.device).manual_seed(seed)
        return lambda *size, dtype=self.dtype: torch.randn(size, generator=random, device=self.device, dtype=dtype)

    def rows(self, lengths: Tensor) -> Rows:
        """Rows of these lengths, int64 `[R]` on the CPU."""
        return Rows(cumulative(lengths.to(self.device)), int(lengths.sum()), int(lengths.max()))


def slots(rows: Rows) -> tuple[Tensor, Tensor]:
    """Of every token: its place in its row, and the row's length; int64 `[N]`."""
    row = rows.ids
    return torch.arange(rows.total, device=row.device) - rows.cu_seqlens.long()[row], rows.lengths[row]


def make_tiers(setting: Setting, lengths: Tensor, fill: int, seen: int, seed: int, alike: bool = False) -> Tiers:
    """Tiers of random tokens, spread evenly over `seen` columns, of which the newest `fill` are in the dense tier.

    Args:
        lengths: tokens of the condensed rows, int64 `[R]` on the CPU.
        alike: whether the keys of a head have a mean cosine of 0.6 instead of 0.
    """
    draw, rows, heads, dim = setting.normal(seed), setting.rows(lengths), setting.heads, setting.dim
    batch = lengths.shape[0] // heads
    slot, length = slots(rows)
    keys, dense_keys = draw(rows.total, dim), draw(batch, heads, setting.capacity, dim)
    if alike:
        common = draw(batch, heads, 1, dim) * 1.5**0.5
        dense_keys += common
        keys += common.view(-1, dim)[rows.ids]
    condensed = RaggedTier(
        keys,
        draw(rows.total, dim),
        (slot * (seen - fill) // length).to(torch.int32),
        torch.zeros(rows.total, dtype=torch.uint8, device=setting.device),
        rows,
    )
    dense = DenseTier(
        dense_keys,
        draw(batch, heads, setting.capacity, dim),
        torch.arange(seen - fill, seen - fill + setting.capacity, device=setting.device)
        .to(torch.int32)
        .repeat(batch, 1),
        torch.full((batch,), fill, device=setting.device),
        fill,
    )
    sparse = RaggedTier.empty(lengths.shape[0], keys, keys)
    return Tiers(condensed, sparse, dense, torch.full_like(dense.fill, seen), seen)


# ---------------------------------------------------------------------- operations


@contextmanager
def reference_kernels() -> Iterator[None]:
    """hardkv's operations run their PyTorch references, as where there is no Triton."""
    with ExitStack() as stack:
        for module in (append, attention, compaction, scoring, similarity):
            stack.enter_context(patch.object(module, "kernels_for", lambda *args: "torch"))
        yield


def spot_rows(rows: Rows) -> list[tuple[int, slice]]:
    """A few rows, with their tokens, that an output is checked in: the shortest, the longest, the first, the last."""
    lengths, bounds = rows.lengths.tolist(), rows.cu_seqlens.tolist()
    last = len(lengths) - 1
    chosen = {lengths.index(min(lengths)), lengths.index(max(lengths)), 0, last}
    return [(row, slice(bounds[row], bounds[row + 1])) for row in sorted(chosen)]


def relative_error(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Norm of what was found minus what was expected, over the norm of what was expected, of all pairs together."""
    off = sum(float((found.double() - expected.double()).square().sum()) for found, expected in pairs)
    return math.sqrt(off / max(sum(float(expected.double().square().sum()) for _, expected in pairs), 1e-300))


def inexact(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    """0 where all that was found equals what was expected, else infinity."""
    return 0.0 if all(torch.equal(found, expected) for found, expected in pairs) else math.inf


class Operation(ABC):
    """One copy of an operation's inputs; the same shape and seed make the same copy."""

    name: str
    most_shapes: int | None = None  # of those given, None for all
    reference_tokens = 1 << 23  # the PyTorch reference runs on shapes of so many at most
    nbytes: int  # that must be moved
    flops = 0  # of what is computed; 0 where it depends on the numbers, or is not what limits

    @abstractmethod
    def __init__(self, shape: Shape, seed: int, setting: Setting): ...

    @classmethod
    def backends(cls) -> tuple[str, ...]:
        return "triton", "torch"

    @abstractmethod
    def run(self, backend: str) -> Any:
        """One call; "torch" must run within `reference_kernels()`."""

    @abstractmethod
    def error(self, found: Any) -> float:
        """The relative error of what `run` returned."""


class Attention(Operation):
    """Decode: one new token a sequence, over both tiers."""

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
        """New tokens of a sequence, and tokens of the dense tier, these included."""
        return 1, setting.half_full

    @classmethod
    def backends(cls) -> tuple[str, ...]:
        packages = varlen.installed()
        return "triton", *packages, *(f"{package}, one tier" for package in packages), "torch"

    def run(self, backend: str) -> Tensor:
        """`[B, H, G, q, D]`."""
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
            out, _ = varlen.varlen_attention(
                self.query, condensed.keys, condensed.values, rows.cu_seqlens, rows.longest, *tail,
                package=backend, **new,
            )  # fmt: skip
        return out.unflatten(1, (self.setting.heads, -1))

    def _one_tier(self, package: str) -> Tensor:
        """The package alone, all tokens in one contiguous tier: what it could do without a dense tier."""
        if self.joined is None:
            query = self.query.unflatten(1, (self.setting.heads, -1)).transpose(2, 3)  # [B, H, q, G, D]
            merged = Merged.of([self.tiers], 0, 0, 0)
            cu_q = torch.arange(self.rows + 1, dtype=torch.int32, device=query.device) * self.queries
            tokens = merged.gather([self.tiers], 0), merged.gather([self.tiers], 1)
            self.joined = query.flatten(0, 2).contiguous(), *tokens, cu_q, merged.rows
        query, keys, values, cu_q, rows = self.joined
        out, _ = varlen.PACKAGES[package].attend(
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
    """A chunk of a prompt, or a draft: all new tokens since the last event at once."""

    name = "attention-chunk"
    most_shapes = 1

    def new_and_dense(self, setting: Setting) -> tuple[int, int]:
        return setting.interval, setting.capacity


class Ragged(Operation):
    """Rows whose newest tokens are a window."""

    def __init__(self, shape: Shape, seed: int, setting: Setting):
        self.setting = setting
        self.rows = setting.rows(shape.draw(seed))
        slot, length = slots(self.rows)
        older = length - setting.window
        self.in_window = slot >= older
        spread = slot * (SEEN - setting.window) // older.clamp_min(1)
        self.positions = torch.where(self.in_window, SEEN - length + slot, spread).to(torch.int32)


class ScoringMean(Ragged):
    """What the window's queries pay to every token."""

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
        self.exclude = self.in_window if self.reduce == "max_logits" else None  # as R-KV does
        self.scale = setting.dim**-0.5
        per_token = 4 + 4 + (1 if self.exclude is not None else 0)  # position, result, whether it counts
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
    """As R-KV scores: one softmax over the group's largest logits, before the window."""

    name = "scoring-max-logits"
    reduce = "max_logits"


class Similarity(Ragged):
    """R-KV's redundancy, of keys of which none resembles another: every cosine is looked at."""

    name = "similarity"
    reference_tokens = 1 << 18
    common = 0.0  # norm of what a row's keys share, over the norm of the rest

    def __init__(self, shape: Shape, seed: int, setting: Setting):
        super().__init__(shape, seed, setting)
        draw = setting.normal(seed)
        self.keys = draw(self.rows.total, setting.dim)
        if self.common:
            self.keys += (draw(shape.rows, setting.dim) * self.common)[self.rows.ids]
        self.nbytes = self.keys.nbytes + self.rows.total * 4
        self.flops = 0 if self.common else int(2 * setting.dim * self.rows.lengths.square().sum())

    def run(self, backend: str) -> Tensor:
        return similarity.mean_cosine(self.keys, self.rows)

    def error(self, found: Tensor) -> float:
        pairs = []
        for row, part in spot_rows(self.rows):
            one = Rows.of(self.rows.cu_seqlens[row : row + 2] - part.start)
            pairs.append(
                (found[part], similarity.mean_cosine_reference(self.keys[part].double(), one, threshold=0.5, eps=1e-8))
            )
        return relative_error(pairs)


class SimilarityAlike(Similarity):
    """Of keys that resemble each other, at a mean cosine of 0.6: the search for a near-duplicate ends early."""

    name = "similarity-alike"
    common = 1.5**0.5


class Pooling(Ragged):
    """Max-pooling of scores along rows."""

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
    """Selection of a share of every row; PyTorch's primitives are what hardkv uses."""

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
    """How many of a sequence's best tokens each head holds, as AdaKV and Adaptive ask."""

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
    """What an event writes: 85% of the condensed tokens, and the whole dense tier, one row behind the other."""

    name = "compaction"

    def __init__(self, shape: Shape, seed: int, setting: Setting):
        fill = setting.capacity
        self.tiers = make_tiers(setting, (shape.draw(seed) - fill).clamp_min(1), fill, SEEN, seed)
        random = torch.Generator(setting.device).manual_seed(seed)
        merged = Merged.of([self.tiers], setting.window, 0, 0)
        self.merged = replace(merged, misses=torch.empty_like(merged.misses).random_(0, 255, generator=random))
        chosen = torch.rand(self.merged.rows.total, generator=random, device=setting.device) < 0.85
        chosen |= self.merged.address >= self.tiers.condensed.rows.total
        self.index = chosen.nonzero()[:, 0]
        # key and value, position and misses, each read and written; where to find them
        self.nbytes = self.index.shape[0] * (2 * (setting.token_bytes + 4 + 1) + 8 + 8)

    def run(self, backend: str) -> tuple[Tensor, ...]:
        merged = self.merged
        return compaction.gather_tiers(self.tiers.sources, merged.address, self.index, merged.positions, merged.misses)

    def error(self, found: tuple[Tensor, ...]) -> float:
        """In a few thousand tokens, by plain indexing."""
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


class Append(Operation):
    """One new token a sequence into the dense tier."""

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
OPERATIONS = ("attention", "event", *(kind.name for kind in KINDS[1:]))  # in this order


# ---------------------------------------------------------------------- timing


class CudaTimer:
    """Times calls on the current CUDA device, in microseconds; the calls of a list take turns."""

    def eager(self, calls: Sequence[Callable[[], Any]]) -> float:
        """One call between two events: the median of 20, or of fewer that take 0.3 s together, but of 5 at least."""
        times: list[float] = []
        held: deque[Any] = deque(maxlen=len(calls))  # so that outputs take turns as well
        while len(times) < 5 or (len(times) < EAGER_CALLS and sum(times) < 3e5):
            call = calls[len(times) % len(calls)]
            times.append(self._between(lambda call=call: held.append(call())))
        return median(times)

    def graph(self, calls: Sequence[Callable[[], Any]], estimate: float) -> float:
        """A call within a captured graph; `estimate` of its time decides how many the graph gets."""
        rounds = min(math.ceil(GRAPH_CALLS / len(calls)), int(GRAPH_US / (estimate * len(calls))))
        rounds = max(rounds, 1)
        graph, held = torch.cuda.CUDAGraph(), deque(maxlen=len(calls))
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            for _ in range(rounds):
                for call in calls:
                    held.append(call())
        for _ in range(2):
            graph.replay()
        return median(self._between(graph.replay) for _ in range(REPLAYS)) / (rounds * len(calls))

    def wall(self, call: Callable[[], Any]) -> float:
        """From an idle device to an idle device, by the host's clock."""
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        return (time.perf_counter() - start) * 1e6

    def waits(self, call: Callable[[], Any]) -> list[str]:
        """The lines of Python at which the host waits for the device during a call."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                call()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        found = [w for w in caught if "called a synchronizing CUDA operation" in str(w.message)]
        return [f"{Path(w.filename).name}:{w.lineno}" for w in found]

    def free_bytes(self) -> int:
        """Memory of the device that can still be had."""
        self.release()
        return torch.cuda.mem_get_info()[0]

    def release(self) -> None:
        """Give back what the last operation's tensors left."""
        torch.cuda.empty_cache()

    def _between(self, call: Callable[[], Any]) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e3


def copy_bandwidth(timer: CudaTimer, setting: Setting, nbytes: int = COPY_BYTES) -> float:
    """Bytes a second that a large copy within the device reads and writes."""
    source = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(source)
    copy = partial(target.copy_, source)
    copy()
    return 2 * nbytes / (timer.eager([copy]) * 1e-6)


def measure(copies: Sequence[Operation], shape: Shape, backend: str, timer: CudaTimer, setting: Setting) -> dict:
    """The record of one backend; an error instead of times where it fails, and beside `eager_us` where a graph does."""
    first = copies[0]
    record: dict[str, Any] = {
        "operation": first.name,
        "backend": backend,
        "shape": asdict(shape),
        "copies": len(copies),
        "bytes": round(sum(copy.nbytes for copy in copies) / len(copies)),
        "flops": round(sum(copy.flops for copy in copies) / len(copies)),
    }
    if backend == "torch" and shape.rows * shape.mean > first.reference_tokens:
        return record | {"error": f"not run: the reference takes shapes of up to {first.reference_tokens:,} tokens"}
    if backend == "triton" and (reason := why_not_triton(setting.device, setting.dtype)):
        return record | {"error": f"not run: {reason}"}
    calls = [partial(copy.run, backend) for copy in copies]
    try:
        with reference_kernels() if backend == "torch" else nullcontext():
            off = first.error(calls[0]())
            if not off <= TOLERANCE:
                raise ArithmeticError(f"wrong: a relative error of {off:.2g}")
            record["relative_error"] = off
            for call in calls[1:]:
                call()
            record["eager_us"] = timer.eager(calls)
            if backend != "torch":
                record["graph_us"] = timer.graph(calls, record["eager_us"])
    except Exception as error:  # a package that cannot, memory that does not suffice: the others go on
        record["error"] = describe(error)
    return record


def describe(error: Exception) -> str:
    """An exception on one short line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:300]


def measure_shape(kind: type[Operation], shape: Shape, timer: CudaTimer, setting: Setting) -> Iterator[dict]:
    """The records of all backends on the same inputs."""
    backends = kind.backends()
    try:
        first = kind(shape, 0, setting)
        count = min(MAX_COPIES, math.ceil(ROTATED / first.nbytes))
        copies = [first, *(kind(shape, seed, setting) for seed in range(1, count))]
    except Exception as error:
        for backend in backends:
            failed = {"operation": kind.name, "backend": backend, "shape": asdict(shape)}
            yield failed | {"error": f"no inputs: {describe(error)}"}
        return
    for backend in backends:
        yield measure(copies, shape, backend, timer, setting)
    del first, copies
    timer.release()


# ---------------------------------------------------------------------- an event


@dataclass(frozen=True)
class Model:
    """Whose event is measured: by default that of Qwen3-8B and a batch of 32."""

    layers: int = 36
    batch: int = 32
    kept: int = 2048
    sinks: int = 4
    seen: int = 16384  # columns so far
    weights: float = 16.4e9  # bytes, read once a step


QWEN = Model()
# Scorer, budget, and whether the keys of a head are alike, which decides how long R-KV searches.
EVENTS = (
    ("attention", "topk", False),
    ("snapkv", "topk", False),
    ("rkv", "topk", False),
    ("attention", "risk", False),
    ("snapkv", "risk", False),
    ("rkv", "risk", False),
    ("rkv", "topk", True),
)
# Again with a batch of one, where an event is all launches.
SMALL_EVENTS = (("snapkv", "topk", False), ("rkv", "topk", False))


def synthetic_curves(model: Model, heads: int) -> RiskCurves:
    """Losses w / n whose minima at a fixed total, n ~ sqrt(w), spread log-uniformly over a factor of 40."""
    random = torch.Generator().manual_seed(0)
    weight = 40.0 ** (2 * torch.rand(model.layers, heads, 1, generator=random))
    edges = {round(model.seen ** (step / 48)) for step in range(12, 49)}
    counts = torch.tensor(sorted(edges))
    return RiskCurves(counts, weight * (1 / counts - 1 / counts[-1]))


def make_layers(model: Model, setting: Setting, budget: str, alike: bool, count: int) -> list[HardKVLayer]:
    """The first `count` layers of a cache, an interval after an event: the dense tiers are full."""
    if budget == "topk":
        budgets = [TopK(model.kept)] * model.layers
        counts = torch.full((model.layers, setting.heads), model.kept)
    else:
        curves = synthetic_curves(model, setting.heads)
        budgets = Risk(model.kept).for_layers(curves)
        counts = Risk(model.kept).allocation(curves, model.seen, setting.window + model.sinks)
    layers = []
    for place in range(count):
        lengths = (counts[place] - setting.window).clamp_min(1).repeat(model.batch)
        tiers = make_tiers(setting, lengths, setting.capacity, model.seen, place, alike)
        layer = HardKVLayer(settings_for(model, setting, "attention"), budgets[place], place)
        layer.lazy_initialization(tiers.dense.keys, tiers.dense.values)
        layer.tiers = replace(tiers, compressed_at=model.seen - setting.interval, events=1)
        draw, query_heads = setting.normal(place + 1000), setting.heads * setting.group
        queries = draw(model.batch, query_heads, setting.window, setting.dim)
        layer.ring = QueryRing(queries, setting.window)
        layer.ring.append(queries, None, model.seen - setting.window)
        layer.scale = setting.dim**-0.5
        layers.append(layer)
    return layers


def settings_for(model: Model, setting: Setting, scorer: str) -> HardKVConfig:
    """Settings of the layers; their budgets are their own."""
    return HardKVConfig(
        scorer=scorer, budget=model.kept, window=setting.window, sinks=model.sinks, interval=setting.interval
    )


def fitting_layers(model: Model, setting: Setting, free: int) -> int:
    """Layers whose tiers, old and new beside each other, and what the event of one needs fit in `free` bytes."""
    layer = model.batch * setting.heads * (model.kept + setting.interval) * setting.token_bytes
    return max(1, min(model.layers, int(free * 0.9 / layer - 8) * 2 // 5))


def restored(layers: Sequence[HardKVLayer], tiers: Sequence[Tiers]) -> Callable[[], None]:
    """Put back the old tiers, which an event only reads, and drop the new ones; returns the call of their event."""
    for layer, old in zip(layers, tiers, strict=True):
        layer.tiers = old
    return partial(compress_together, layers)


def event_error(layer: HardKVLayer, old: Tiers) -> float:
    """An event of one layer against the PyTorch references: the part of tokens kept by one only, and what differs."""
    found = []
    for context in (nullcontext(), reference_kernels()):
        with context:
            restored([layer], [old])()
        assert layer.tiers is not None
        found.append(layer.tiers.condensed)
    ours, theirs = ((tier.rows.ids << 32) + tier.positions for tier in found)
    mine, yours = torch.isin(ours, theirs), torch.isin(theirs, ours)
    one_only = float((~mine).sum() + (~yours).sum()) / (ours.shape[0] + theirs.shape[0])
    pairs = [(getattr(found[0], name)[mine], getattr(found[1], name)[yours]) for name in ("keys", "values")]
    return max(one_only, relative_error(pairs))


def decode_us(layers: Sequence[HardKVLayer], timer: CudaTimer, setting: Setting) -> float:
    """Attention of a decode step in the middle of an interval, a layer."""
    calls = []
    for place, layer in enumerate(layers):
        assert layer.tiers is not None
        condensed, dense, fill = layer.tiers.condensed, layer.tiers.dense, setting.half_full
        query = setting.normal(place + 2000)(dense.keys.shape[0], setting.heads * setting.group, 1, setting.dim)
        calls.append(
            partial(
                attention.attend_tiers, query, condensed.keys, condensed.values, condensed.rows,
                dense.keys, dense.values, dense.positions, torch.full_like(dense.fill, fill),
                bound=fill, start=layer.tiers.seen, scale=layer.scale,
            )
        )  # fmt: skip
    for call in calls:
        call()
    return timer.graph(calls, timer.eager(calls))


def measure_event(
    scorer: str,
    layers: Sequence[HardKVLayer],
    old: Sequence[Tiers],
    attention_us: float,
    timer: CudaTimer,
    setting: Setting,
    model: Model,
    bandwidth: float,
) -> dict[str, Any]:
    """What is found of one scorer's event on layers whose tiers before it are `old`."""
    for layer in layers:
        layer.settings = settings_for(model, setting, scorer)
    off = event_error(layers[0], old[0])
    if not off <= TOLERANCE:
        raise ArithmeticError(f"wrong: differs from the reference by {off:.2g}")
    for _ in range(2):
        restored(layers, old)()
    event_us = median(timer.wall(restored(layers, old)) for _ in range(9)) * model.layers / len(layers)
    waits = timer.waits(restored(layers, old))
    restored(layers, old)  # nothing of the new tiers stays
    step = model.layers * attention_us + model.weights / bandwidth * 1e6
    return {
        "layers": len(layers),
        "relative_error": off,
        "eager_us": event_us,
        "attention_us": model.layers * attention_us,
        "step_us": step,
        "share": event_us / (setting.interval * step),
        "waits": waits,
    }


def measure_events(
    timer: CudaTimer, setting: Setting, model: Model, bandwidth: float, events: Sequence[tuple[str, str, bool]] = EVENTS
) -> Iterator[dict]:
    """Records of events: `eager_us` by the host's clock, `share` of the interval's decode steps at their least.

    A step's least: reading the weights once at the copy bandwidth, and the attention of all layers as measured. Where
    memory does not suffice for all layers, fewer are measured, and the times are scaled.
    """
    for (budget, alike), group in groupby(events, key=itemgetter(1, 2)):
        prepared = None
        for scorer, _, _ in group:
            record: dict[str, Any] = {
                "operation": "event",
                "backend": "hardkv",
                "scorer": scorer,
                "budget": budget,
                "alike": alike,
                "shape": asdict(model) | {"rows": model.batch * setting.heads, "mean": model.kept, "lengths": budget},
            }
            try:
                if prepared is None:
                    count = fitting_layers(model, setting, timer.free_bytes())
                    layers = make_layers(model, setting, budget, alike, count)
                    prepared = layers, [layer.tiers for layer in layers], decode_us(layers, timer, setting)
                    del layers
                record |= measure_event(scorer, *prepared, timer, setting, model, bandwidth)
            except Exception as error:  # as above
                record["error"] = describe(error)
            yield record
        del prepared
        timer.release()


# ---------------------------------------------------------------------- the program


def run(
    out: Path,
    operations: Sequence[str],
    timer: CudaTimer,
    setting: Setting,
    *,
    shapes: Sequence[Shape] = SHAPES,
    model: Model = QWEN,
    quick: bool = False,
    copy_bytes: int = COPY_BYTES,
) -> dict[str, Any]:
    """Measure operations and write them into `out` one by one, beside what it holds of others from the same setup.

    Args:
        shapes: of the operations. model: whose event is measured. copy_bytes: of the copy that measures bandwidth.
    """
    started = time.perf_counter()
    bandwidth = copy_bandwidth(timer, setting, copy_bytes)
    timer.release()
    data = {**machine(setting), "quick": quick, "copy_bandwidth": bandwidth, "records": []}
    before = json.loads(out.read_text()) if out.exists() else {}
    if all(before.get(name) == data[name] for name in ("machine", "versions", "quick")):
        data["records"] = before["records"]
    print(f"{data['machine']}: copies at {bandwidth / 1e12:.3f} TB/s", flush=True)
    kinds = {kind.name: kind for kind in KINDS}
    for name in (name for name in OPERATIONS if name in operations):
        if name == "event":
            small = measure_events(timer, setting, replace(model, batch=1), bandwidth, SMALL_EVENTS)
            found: Iterator[dict] = chain(measure_events(timer, setting, model, bandwidth), small)
        else:
            kind = kinds[name]
            own = shapes[: kind.most_shapes]
            found = (record for shape in own for record in measure_shape(kind, shape, timer, setting))
        records = []
        for record in found:
            best = record.get("graph_us") or record.get("eager_us")
            if best and "bytes" in record:
                record["fraction"] = record["bytes"] / (best * 1e-6) / bandwidth
            print(line(record), flush=True)
            records.append(record)
        others = [record for record in data["records"] if record["operation"] != name]
        data["records"] = sorted(others + records, key=lambda record: OPERATIONS.index(record["operation"]))
        write(out, data)
    print(f"{time.perf_counter() - started:.0f} s")
    return data


def line(record: dict[str, Any]) -> str:
    """A record for the terminal."""
    shape = Shape(*(record["shape"][name] for name in ("rows", "mean", "lengths")))
    backend = record["backend"] if "scorer" not in record else record["scorer"] + (", alike" * record["alike"])
    times = [f"{record[name]:.1f}" if name in record else "-" for name in ("eager_us", "graph_us")]
    share = record.get("fraction", record.get("share"))
    end = "" if share is None else f"{share:.3f}"
    end += f" batch {record['shape']['batch']}" if "scorer" in record else ""
    error = f"  {record['error'][:80]}" if "error" in record else ""
    return f"{record['operation']:18} {shape!s:18} {backend:22} {times[0]:>9} {times[1]:>8} us {end}{error}"


def machine(setting: Setting) -> dict[str, Any]:
    """What the records were measured on and with."""
    on_gpu = setting.device.type == "cuda"
    distributions = metadata.packages_distributions()
    versions = {"torch": torch.__version__, "hardkv": hardkv.__version__}
    tops = {name: varlen.PACKAGES[name].module.split(".")[0] for name in varlen.installed()}
    for name, top in {"triton": "triton", **tops}.items():
        found = [f"{dist} {metadata.version(dist)}" for dist in sorted(set(distributions.get(top, ())))]
        versions[name] = ", ".join(found) or "not installed"
    return {"machine": torch.cuda.get_device_name() if on_gpu else "CPU", "versions": versions}


def write(out: Path, data: dict[str, Any]) -> None:
    """The JSON, a record a line, whole or not at all."""
    out.parent.mkdir(parents=True, exist_ok=True)
    head = {name: value for name, value in data.items() if name != "records"}
    lines = ",\n".join(json.dumps(record) for record in data["records"])
    partial_file = out.with_suffix(".partial")
    partial_file.write_text(json.dumps(head)[:-1] + ',\n"records": [\n' + lines + "\n]}\n")
    partial_file.replace(out)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m eval.speed.kernels", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("eval/results/kernels.json"))
    parser.add_argument("--quick", action="store_true", help="fewer shapes, and an event of 6 layers")
    parser.add_argument("--only", nargs="+", choices=OPERATIONS, default=OPERATIONS, metavar="OPERATION")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("this needs a CUDA device, and PyTorch finds none: run it on a machine with an NVIDIA GPU")
    from eval.speed.kernels_report import summary

    setting = Setting(torch.device("cuda"), torch.bfloat16)
    quick = {"shapes": QUICK, "model": replace(QWEN, layers=6, weights=QWEN.weights / 6)} if args.quick else {}
    print(summary(run(args.out, args.only, CudaTimer(), setting, quick=args.quick, **quick)))


if __name__ == "__main__":
    main()
