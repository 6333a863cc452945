"""The dense tier: the window and the tokens since the last event. It grows at every step."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hardkv.cache.storage.memory import storage_nbytes
from hardkv.kernels.append import append


@dataclass(frozen=True)
class DenseTier:
    """Store the window and the tokens since the last event, `[B, H, capacity, D]`, appended to in place.

    Every sequence has its own fill; slots from the fill on hold nothing. All heads of a sequence hold the same tokens.
    Appending writes at the fill and returns a tier with a larger fill, so the old tier keeps its content.
    """

    keys: Tensor  # [B, H, C, D]
    values: Tensor  # [B, H, C, Dv]
    positions: Tensor  # int32 [B, C]
    fill: Tensor  # int64 [B]
    bound: int  # the host's upper bound on fill
    even: bool = True  # whether every sequence's fill equals the bound, as far as the host knows
    total: int | None = None  # tokens of all sequences together, if they are not even and the host knows it

    @classmethod
    def allocate(
        cls, keys: Tensor, values: Tensor, capacity: int, fill: Tensor | None = None, bound: int = 0
    ) -> "DenseTier":
        """Return an empty tier shaped after `keys [B, H, _, D]` and `values [B, H, _, Dv]`.

        Keys and values are not initialised: a caller that passes `fill` and `bound` must write those tokens.
        """
        batch, num_kv_heads = keys.shape[:2]
        # Later calls write into these buffers, so they must not be inference tensors, even if made in inference mode.
        with torch.inference_mode(False):
            return cls(
                torch.empty(batch, num_kv_heads, capacity, keys.shape[-1], dtype=keys.dtype, device=keys.device),
                torch.empty(batch, num_kv_heads, capacity, values.shape[-1], dtype=values.dtype, device=keys.device),
                torch.zeros(batch, capacity, dtype=torch.int32, device=keys.device),
                torch.zeros(batch, dtype=torch.int64, device=keys.device) if fill is None else fill,
                bound,
            )

    @classmethod
    def view(cls, keys: Tensor, values: Tensor) -> "DenseTier":
        """Return a full tier over a model's own tensors, without a copy: columns 0, 1, ..., no padding."""
        batch, _, length, _ = keys.shape
        positions = torch.arange(length, dtype=torch.int32, device=keys.device).expand(batch, -1)
        return cls(keys, values, positions, torch.full((batch,), length, device=keys.device), length)

    @property
    def capacity(self) -> int:
        return self.positions.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values, including all memory that they are views of."""
        return storage_nbytes([self.keys, self.values])

    def append(self, keys: Tensor, values: Tensor, valid: Tensor | None, start: int) -> "DenseTier":
        """Return a tier that also holds the valid tokens of `keys [B, H, q, D]` and `values [B, H, q, Dv]`.

        Their columns are `start, start + 1, ...`. The new tier shares this tier's buffers unless their capacity is too
        small.
        """
        q_len = keys.shape[2]
        tier = self if self.bound + q_len <= self.capacity else self.grown(self.bound + q_len)
        fill = append(tier.keys, tier.values, tier.positions, tier.fill, keys, values, start, valid)
        return replace(tier, fill=fill, bound=tier.bound + q_len, even=tier.even and valid is None, total=None)

    def counted(self, fill: Sequence[int]) -> "DenseTier":
        """Return the same tier with its fill known to the host."""
        return replace(self, even=all(each == self.bound for each in fill), total=sum(fill))

    def grown(self, capacity: int) -> "DenseTier":
        """Return a copy with room for `capacity` tokens."""
        tier = DenseTier.allocate(self.keys, self.values, capacity)
        tier.keys[:, :, : self.bound] = self.keys[:, :, : self.bound]
        tier.values[:, :, : self.bound] = self.values[:, :, : self.bound]
        tier.positions[:, : self.bound] = self.positions[:, : self.bound]
        return replace(tier, fill=self.fill, bound=self.bound, even=self.even)

    def cropped(self, length: int) -> "DenseTier":
        """Return this tier without the tokens of column `length` and later."""
        fill = (self.held() & (self.positions < length)).sum(1)
        least, most = torch.stack([fill.min(), fill.max()]).tolist()
        return replace(self, fill=fill, bound=most, even=least == most)

    def ends(self, first: int, newest: int, capacity: int, least: int) -> "DenseTier":
        """Return a new tier with the `first` and the `newest` tokens of every sequence at its front, as they come.

        Every sequence holds at least `least` tokens.
        """
        count = first + newest
        fill, bound = self.fill.clamp_max(count), min(self.bound, count)
        tier = DenseTier.allocate(self.keys, self.values, capacity, fill, bound)
        if self.even and not first:
            for new, old in ((tier.keys, self.keys), (tier.values, self.values)):
                new[:, :, :bound] = old[:, :, self.bound - bound : self.bound]
            tier.positions[:, :bound] = self.positions[:, self.bound - bound : self.bound]
            return tier
        slot = torch.arange(bound, device=fill.device)
        slot = torch.where(slot < first, slot, (self.fill - fill)[:, None] + slot)
        sequence = torch.arange(slot.shape[0], device=slot.device)[:, None]
        tier.keys[:, :, :bound] = self.keys[sequence, :, slot].transpose(1, 2)
        tier.values[:, :, :bound] = self.values[sequence, :, slot].transpose(1, 2)
        tier.positions[:, :bound] = self.positions[sequence, slot]
        return replace(tier, even=self.even or least >= bound)

    def held(self) -> Tensor:
        """Return which slots hold a token, bool `[B, C]`."""
        return torch.arange(self.capacity, device=self.fill.device) < self.fill[:, None]

    def without(self, gone: Tensor) -> "DenseTier":
        """Return a new tier without the marked slots, bool `[B, C]`. The host waits for the fill."""
        stays = self.held() & ~gone
        fill = stays.sum(1)
        least, most = torch.stack([fill.min(), fill.max()]).tolist()
        slot = torch.argsort((~stays).to(torch.uint8), dim=1, stable=True)[:, :most]
        sequence = torch.arange(slot.shape[0], device=slot.device)[:, None]
        tier = DenseTier.allocate(self.keys, self.values, self.capacity, fill, most)
        for new, old in ((tier.keys, self.keys), (tier.values, self.values)):
            new[:, :, :most] = old[sequence, :, slot].transpose(1, 2)
        tier.positions[:, :most] = self.positions[sequence, slot]
        return replace(tier, even=least == most)

    def select_sequences(self, indices: Tensor) -> "DenseTier":
        """Return a tier of the given batch rows, in that order."""
        rows = replace(self, keys=self.keys[indices], values=self.values[indices], positions=self.positions[indices])
        return replace(rows, fill=self.fill[indices]).grown(self.capacity)

    def tensors(self) -> list[Tensor]:
        """Return all tensors held, for counting bytes."""
        return [self.keys, self.values, self.positions, self.fill]
