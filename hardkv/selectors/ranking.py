"""Ranking: the candidates of every row in order of score. Budgets count along it."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hardkv.kernels.rows import count_per_row
from hardkv.kernels.selection import keep_best, sort_rows
from hardkv.selectors.observation import Observation


@dataclass(frozen=True)
class Ranking:
    """The candidates (held tokens that are not protected) of every row, best first.

    A kept set consists of the protected tokens and a prefix of this order, so a budget only returns counts.
    """

    observation: Observation
    z: Tensor  # [R, width], log-scores, -inf after the last candidate
    token: Tensor  # int64 [R, width], index into the flat tokens
    temperature: Tensor  # [R]

    @classmethod
    def of(cls, z: Tensor, observation: Observation, temperature: Tensor | None = None) -> "Ranking":
        """Rank by `z [N]`; Top-p budgets divide z by `temperature [R]` (None: 1)."""
        z = z.clamp_min(torch.finfo(z.dtype).min)  # -inf marks what is no candidate
        ranked, token = sort_rows(z, ~observation.protected, observation.cu_seqlens, observation.max_length)
        if temperature is None:
            temperature = ranked.new_ones(observation.num_rows)
        return cls(observation, ranked, token, temperature.to(ranked))

    @cached_property
    def num_protected(self) -> Tensor:
        """Number of protected tokens per row, |F|, int64 `[R]`."""
        return count_per_row(self.observation.protected, self.observation.cu_seqlens)

    @cached_property
    def num_candidates(self) -> Tensor:
        """Number of candidates per row, |C|, int64 `[R]`."""
        return self.observation.lengths - self.num_protected

    @cached_property
    def protected_mass(self) -> Tensor:
        """A(F), `[R]`: the reference attention that the protected tokens of each row receive."""
        observation = self.observation
        mass = observation.attention.masked_fill(~observation.protected, 0.0)
        total = mass.new_zeros(observation.num_rows)
        return total.scatter_add_(0, observation.row, mass).clamp(0.0, 1.0)

    @cached_property
    def mass_lost(self) -> Tensor:
        """u, `[R, width]`: the mass a row loses with candidate j and all worse ones, -inf after the last candidate.

        u is P = softmax(z / T) over the candidates, summed from the tail (so that small masses stay exact), times the
        mass 1 - A(F) that the candidates hold. TopP(p) keeps exactly the candidates with u > 1 - p.
        """
        present = self.z > -torch.inf
        probability = torch.softmax(self.z / self.temperature[:, None], -1).nan_to_num(0.0)  # NaN: no candidate
        tail = probability.flip(1).cumsum(1).flip(1)
        return torch.where(present, (1 - self.protected_mass)[:, None].to(tail) * tail, -torch.inf)

    def per_head(self, padded: Tensor) -> Tensor:
        """Turn `[R, ...]` into `[B, H, ...]`."""
        return padded.unflatten(0, (self.observation.batch_size, self.observation.num_kv_heads))

    def keep(self, counts: Tensor) -> Tensor:
        """Return the kept set, bool `[N]`: the protected tokens and the best `counts [R]` candidates of each row."""
        counts = counts.minimum(self.num_candidates)
        return keep_best(self.token, counts, self.observation.keys.shape[0]) | self.observation.protected
