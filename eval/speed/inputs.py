"""Make the ragged inputs of the benchmarks on the device, from shapes and seeds."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hardkv.cache.storage.codec import Codec
from hardkv.cache.storage.dense import DenseTier
from hardkv.cache.storage.ragged import Columns, RaggedTier
from hardkv.cache.storage.tiers import Tiers
from hardkv.kernels.codes import code_width
from hardkv.kernels.rows import Rows, cumulative

# Logical length of synthetic sequences, of which a part is kept.
SEEN = 1 << 17


@dataclass(frozen=True)
class Shape:
    """Describe the rows (KV heads of all sequences) and the tokens that they keep."""

    rows: int
    mean: int  # mean tokens per row, including the dense tier
    lengths: str = "uniform"  # in 0.25 to 1.75 of the mean; "heavy": 45 to 1,800, log-uniform, scaled to the mean

    def draw(self, seed: int) -> Tensor:
        """Draw the number of tokens per row, int64 `[R]`."""
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
    """Hold the parameters that all inputs share."""

    device: torch.device
    dtype: torch.dtype
    heads: int = 8  # KV heads
    group: int = 4  # query heads per KV head
    dim: int = 128
    window: int = 32
    interval: int = 128

    @property
    def capacity(self) -> int:
        """Return the slots of a dense tier."""
        return self.window + self.interval

    @property
    def half_full(self) -> int:
        """Return the tokens of a dense tier in the middle of an interval."""
        return self.window + self.interval // 2

    @property
    def token_bytes(self) -> int:
        """Return the bytes of a token's key and value."""
        return 2 * self.dim * self.dtype.itemsize

    def normal(self, seed: int) -> Callable[..., Tensor]:
        """Return a function that draws tensors of given sizes."""
        random = torch.Generator(self.device).manual_seed(seed)
        return lambda *size, dtype=self.dtype: torch.randn(size, generator=random, device=self.device, dtype=dtype)

    def rows(self, lengths: Tensor) -> Rows:
        """Make rows of these lengths, int64 `[R]` on the CPU."""
        return Rows(cumulative(lengths.to(self.device)), int(lengths.sum()), int(lengths.max()))


def slots(rows: Rows) -> tuple[Tensor, Tensor]:
    """Return for every token its place in its row, and the row's length; int64 `[N]`."""
    row = rows.ids
    return torch.arange(rows.total, device=row.device) - rows.cu_seqlens.long()[row], rows.lengths[row]


def make_tiers(setting: Setting, lengths: Tensor, fill: int, seen: int, seed: int, alike: bool = False) -> Tiers:
    """Make tiers of random tokens, spread evenly over `seen` columns; the newest `fill` are in the dense tier.

    Args:
        lengths: tokens per condensed row, int64 `[R]` on the CPU.
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
    columns = Columns(
        keys,
        draw(rows.total, dim),
        (slot * (seen - fill) // length).to(torch.int32),
        torch.zeros(rows.total, dtype=torch.uint8, device=setting.device),
        torch.zeros(rows.total, 0, dtype=torch.float16, device=setting.device),
    )
    condensed = RaggedTier(columns, rows)
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


def coded(tiers: Tiers, codec: Codec) -> Tiers:
    """Return tiers that hold random codes in the place of as many condensed states."""
    columns, dense = tiers.condensed.columns, (tiers.dense.keys, tiers.dense.values)
    drawn = (
        states
        if bits == 16
        else torch.randint(
            0, 256, (states.shape[0], code_width(states.shape[1], bits)), dtype=torch.uint8, device=states.device
        )
        for states, bits in zip((columns.keys, columns.values), codec.bits, strict=True)
    )
    keys, values = drawn
    scales = torch.full((keys.shape[0], 2), 0.5, dtype=torch.float16, device=keys.device)
    condensed = RaggedTier(columns._replace(keys=keys, values=values, scales=scales), tiers.condensed.rows)
    sparse = codec.empty(tiers.sparse.lengths.shape[0], *dense)
    return replace(tiers, condensed=condensed, sparse=sparse, codec=codec, centres=codec.first_centres(*dense))
