"""The problem of `fit_temperatures`, a function of one log T per row, and its solvers."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-4, 1e4
LIMIT = math.log(MAX_TEMPERATURE)  # log T lies in [-LIMIT, LIMIT]
DEAD = -1e30  # log-score of an entry outside the softmax: exp gives 0 at every T and, unlike -inf, a gradient of 0
_CPU_BLOCK, _DEVICE_BLOCK = 2**17, 2**25  # entries of z processed at once: cache size, launch cost
_RATE, _RATE_DECAY = 0.05, 0.95  # Adam's learning rate, in log T, and its decay per step: Adam can travel about 1


@dataclass(frozen=True)
class Problem:
    """The fit as a least-squares problem in log T: the mass outside the m best of each sample should be `target`."""

    z: Tensor  # [R, S, N], descending from 0; DEAD outside the softmax
    m: Tensor  # [R, S], how many are the best
    target: Tensor  # [R, S], 1 - M: the mass outside the m best, which has more digits near p = 1
    used: Tensor  # [R, S] bool, whether the sample counts

    def rows(self, index: Tensor) -> "Problem":
        return Problem(self.z[index], self.m[index], self.target[index], self.used[index])

    def rest_mass(self, log_t: Tensor) -> Tensor:
        """Return 1 - mass_T of the m best, `[R, S]`, for log T `[R, 1]` or `[R, S]`; it grows with T."""
        return _RestMass.apply(log_t.expand_as(self.target), self.z, self.m)

    def loss(self, log_t: Tensor) -> Tensor:
        """Return the squared error per row, `[R]`, for log T `[R]`."""
        return ((self.rest_mass(log_t.unsqueeze(-1)) - self.target).square() * self.used).sum(-1)

    def bracket(self, halvings: int) -> tuple[Tensor, Tensor, Tensor]:
        """Bisect each sample's own log T. Return per row the lowest, the highest, and whether every T is as good."""
        n_best, n_live = (self.z == 0).sum(-1), (self.z > DEAD).sum(-1)
        flat = ((n_best == n_live) | (self.m >= n_live) | ~self.used).all(-1)
        # the rest's mass for T -> 0 and T -> infinity
        coldest, hottest = ((n - self.m).clamp(min=0).to(self.target) / n for n in (n_best, n_live))
        goal = self.target.clamp(coldest, hottest)  # ties can put the target beyond

        zero = torch.zeros_like(goal)
        gap = self.rest_mass(zero) - goal
        side = torch.where(gap < 0, 1.0, -1.0).to(zero)  # T must grow or shrink; log T = side * distance
        slack = torch.finfo(zero.dtype).eps * (4 * goal + 1e-3)

        def arrived(distance: Tensor) -> Tensor:
            return (goal - self.rest_mass(side * distance)) * side <= slack

        far = torch.full_like(zero, LIMIT).masked_fill(gap.abs() <= slack, 0.0)
        near = torch.where(arrived(far), 0.0, far)
        for _ in range(halvings):
            middle = (near + far) / 2
            there = arrived(middle)
            near, far = torch.where(there, near, middle), torch.where(there, middle, far)
        ends = torch.stack((side * near, side * far))  # [2, R, S]
        low = ends.amin(0).masked_fill(~self.used, math.inf).amin(-1)
        high = ends.amax(0).masked_fill(~self.used, -math.inf).amax(-1)
        return low, high, flat

    def scan(self, low: Tensor, high: Tensor, n_points: int) -> tuple[Tensor, Tensor]:
        """Return the best of evenly spaced log T per row, and the spacing, both `[R]`."""
        spacing = (high - low) / (n_points - 1)
        points = torch.stack([low + i * spacing for i in range(n_points)])  # [P, R]
        losses = torch.stack([self.loss(point) for point in points])
        good = losses <= losses.amin(0) * (1 + 1e-4) + 1e-16
        nearest_to_one = points.abs().masked_fill(~good, math.inf).argmin(0)
        return points.gather(0, nearest_to_one[None])[0], spacing


class _RestMass(torch.autograd.Function):
    """The mass beyond the m best, `[R, S]`, and its exact derivative, computed for one block of samples at a time.

    Plain autograd would keep three tensors of the size of z and take several times as long.
    """

    @staticmethod
    def forward(ctx: Any, log_t: Tensor, z: Tensor, m: Tensor) -> Tensor:
        n_tokens = z.shape[-1]
        block = max(1, (_CPU_BLOCK if z.device.type == "cpu" else _DEVICE_BLOCK) // n_tokens)
        column = torch.arange(n_tokens, device=z.device)
        inverse_t = (-log_t).exp()
        buffers = z.new_empty(2, min(block, log_t.numel()), n_tokens)  # fresh pages for every block would cost more
        masses, slopes = [], []
        blocks = (tensor.flatten(0, 1).split(block) for tensor in (z, m[..., None], inverse_t[..., None]))
        for z_block, m_block, inverse_block in zip(*blocks, strict=True):
            x, share = buffers[:, : len(z_block)]
            torch.mul(z_block, inverse_block, out=x)
            torch.softmax(x, -1, out=share)
            mean = x.mul_(share).sum(-1)
            top = column < m_block
            mass = share.masked_fill_(top, 0).sum(-1)
            masses.append(mass)
            slopes.append(mass * mean - x.masked_fill_(top, 0).sum(-1))  # d mass / d log T
        ctx.save_for_backward(torch.cat(slopes).view_as(log_t))
        return torch.cat(masses).view_as(log_t)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad * ctx.saved_tensors[0], None, None


def adam(problem: Problem, start: Tensor, max_steps: int, tolerance: float) -> Tensor:
    """Run Adam from `start` and return the best log T that it met, `[R]`."""
    log_t = start.clone().requires_grad_()  # the leaf, and what the loss reads
    # Adam works per coordinate, so rows stay independent.
    optimizer = torch.optim.Adam([log_t], lr=_RATE, betas=(0.8, 0.9), eps=1e-12)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, _RATE_DECAY)
    best, best_loss = start.clone(), torch.full_like(start, math.inf)
    small_steps = torch.zeros_like(start)
    for step in range(1, max_steps + 1):
        before = log_t.detach().clone()
        with torch.enable_grad():
            loss = problem.loss(log_t)
            optimizer.zero_grad()
            loss.sum().backward()
        loss = loss.detach()
        better = (loss < best_loss) & (small_steps < 3)  # one small step may be a turning point
        best, best_loss = torch.where(better, before, best), torch.where(better, loss, best_loss)
        with torch.device("cpu"):  # where Adam counts its steps, whatever the default device is
            optimizer.step()
        schedule.step()
        log_t.clamp_(-LIMIT, LIMIT)
        small = (log_t - before).abs() < tolerance
        small_steps = torch.where(small | (small_steps >= 3), small_steps + 1, 0)
        if step % 8 == 0 and bool((small_steps >= 3).all()):  # not every step: this waits for the device
            break
    return best


def golden_section(problem: Problem, start: Tensor, low: Tensor, high: Tensor, steps: int = 32) -> Tensor:
    """Return a minimum of the loss between `low` and `high`, `[R]`, or `start` where that is no better."""
    shrink = (math.sqrt(5) - 1) / 2
    left, right = high - shrink * (high - low), low + shrink * (high - low)
    left_loss, right_loss = problem.loss(left), problem.loss(right)
    for _ in range(steps):
        go_left = left_loss <= right_loss
        low, high = torch.where(go_left, low, left), torch.where(go_left, right, high)
        new = torch.where(go_left, high - shrink * (high - low), low + shrink * (high - low))
        new_loss = problem.loss(new)
        left, right = torch.where(go_left, new, right), torch.where(go_left, left, new)
        left_loss, right_loss = torch.where(go_left, new_loss, right_loss), torch.where(go_left, left_loss, new_loss)
    found, loss = torch.where(left_loss <= right_loss, left, right), torch.minimum(left_loss, right_loss)
    return torch.where(loss < problem.loss(start), found, start)


def halvings_to_precision(dtype: torch.dtype) -> int:
    """Return how many halvings take a bracket of width `LIMIT` to the precision of `dtype`."""
    return math.ceil(math.log2(LIMIT / torch.finfo(dtype).eps))
