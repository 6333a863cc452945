"""Logits Calibration: one temperature per KV head, so that a scorer's top-p keeps what raw attention's top-p keeps."""

import math
import numbers
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hardkv.kernels.autocast import suspended
from hardkv.selectors.checks import check_name

SOLVERS = ("adam", "bisect")
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-4, 1e4
_LIMIT = math.log(MAX_TEMPERATURE)  # log T lives in [-_LIMIT, _LIMIT]
_DEAD = -1e30  # log-score of what is not in the softmax: exp gives 0 at every T and, unlike -inf, a gradient of 0
_SCAN_POINTS = 33  # samples that disagree by orders of magnitude give a row several minima
_CPU_BLOCK, _DEVICE_BLOCK = 2**17, 2**25  # entries of z worked on at once: cache size, launch cost
_RATE, _RATE_DECAY = 0.05, 0.95  # Adam's, in log T and per step: it can travel about 1


@dataclass(frozen=True)
class TemperatureFit:
    """What `fit_temperatures` found; unpacks as `temperatures, residuals = fit`.

    Args:
        temperatures: `[R]`, float32 (float64 for float64 input).
        residuals: `[R]`, root mean square, over the samples used, of (mass of the m best-scored candidates
            at T) - (reference mass of the m best candidates). 0 where no sample was used.
        counts: `[R, S]` int64, the m of every sample: what `TopP(p)` keeps on the reference.
        samples: `[R]` int64, how many of the S samples were used.
        unfitted: `[R]` bool, T is 1 because nothing determines it: no sample was used, or the masses are the
            same at every T (all scores of the row equal, for instance; its residual still tells how far off they are).
        clamped: `[R]` bool, T stopped at `MIN_TEMPERATURE` or `MAX_TEMPERATURE`; the best one lies beyond.
    """

    temperatures: Tensor
    residuals: Tensor
    counts: Tensor
    samples: Tensor
    unfitted: Tensor
    clamped: Tensor

    def __iter__(self) -> Iterator[Tensor]:
        yield self.temperatures
        yield self.residuals


@torch.inference_mode(False)
def fit_temperatures(
    scores: Tensor,
    reference: Tensor,
    p: float,
    mask: Tensor | None = None,
    solver: str = "adam",
    *,
    max_steps: int = 300,
    tolerance: float = 1e-6,
) -> TemperatureFit:
    """Fit one temperature per row so that top-p on softmax(z / T) keeps as much as top-p on raw attention.

    Logits Calibration of HARD-KV (ICML 2026, https://arxiv.org/abs/2606.28831). For sample s of row r let m be the
    number of candidates that `TopP(p)` keeps on the reference (protected tokens are credited with the mass A(F) they
    hold) and M the reference mass, normalised over the candidates, of those m. The row's temperature minimises

        sum over s of (mass_T(m best candidates by z) - M)^2,  mass_T under softmax over the candidates of z / T.

    T never changes the order of z, so z is sorted once; the masses fall as T grows. Samples that say nothing are left
    out: protected tokens alone reach p (m = 0), or everything is kept (m = number of candidates). Where several T
    are equally good the one nearest to 1 is taken.

    M overshoots p's share, so that z = log A gives T = 1. For one sample with distinct scores `TopP(p)` then keeps
    exactly m if the m-th score's own mass at T exceeds that overshoot (always so for z = a * log A), else a few less.

    Both solvers first bisect, for every sample, the T that fits it alone; the row's minimum lies between the smallest
    and the largest of these, and the best point of a scan there is the start. Rows never influence one another.

    Args:
        scores: log-scores z `[R, S, N]`, floating point, R rows (layer, KV head), S samples sharing a
            temperature. -inf is a candidate without mass. Entries outside `mask` are ignored.
        reference: attention probabilities `[R, S, N]` over all tokens of the row, protected ones included.
            Padding is 0 here and False in `mask`.
        p: the mass to keep, in (0, 1].
        mask: bool `[R, S, N]`, True for candidates. All tokens are by default.
        solver: `"adam"`, the paper's optimiser: `torch.optim.Adam` on log T of all rows at once, its learning
            rate decaying, a row done when its steps stay below `tolerance`. `"bisect"`: bisection to the floating
            point's precision, exact for one sample; several samples: golden-section search around the scan's best
            point. It needs fewer passes over the data.
        max_steps: most Adam steps.
        tolerance: Adam's smallest step in log T.

    Returns:
        `TemperatureFit`, which unpacks as `(temperatures, residuals)`, both `[R]`. T stays within
        [`MIN_TEMPERATURE`, `MAX_TEMPERATURE`]; rows stopped there are flagged and a `UserWarning` counts them.

    Raises:
        TypeError, ValueError: wrong dtypes, shapes that differ, devices that differ, p outside (0, 1], NaN or +inf
        among the candidates' scores, a reference that is negative, not finite or sums to more than one.

    Example:

    ```python
    >>> attention = torch.randn(3, 4, 512).mul(3).softmax(-1)  # 3 rows, 4 samples of each
    >>> temperatures, residuals = fit_temperatures(0.25 * attention.log(), attention, p=0.9)
    >>> [round(temperature, 3) for temperature in temperatures.tolist()]
    [0.25, 0.25, 0.25]

    ```
    """
    check_name("solver", solver, SOLVERS)
    if max_steps < 1 or not tolerance > 0:
        raise ValueError(
            f"max_steps is {max_steps} and tolerance is {tolerance}; give at least one step and a tolerance above 0."
        )
    scores, reference, mask = _checked(scores, reference, p, mask)
    n_rows = scores.shape[0]
    with torch.no_grad(), suspended(scores.device):
        problem = _prepare(scores, reference, p, mask)
        counts, samples = problem.m, problem.used.sum(-1)
        temperatures = scores.new_ones(n_rows)
        residuals = scores.new_zeros(n_rows)
        unfitted = torch.ones(n_rows, dtype=torch.bool, device=scores.device)
        clamped = torch.zeros_like(unfitted)
        rows = samples.nonzero().squeeze(-1)
        if not len(rows):
            return TemperatureFit(temperatures, residuals, counts, samples, unfitted, clamped)

        problem = problem.rows(rows)
        low, high, flat = problem.bracket(halvings=4 if solver == "adam" else _digits(scores.dtype))
        log_t, spacing = problem.scan(low, high, _SCAN_POINTS if scores.shape[1] > 1 else 3)
        if solver == "adam":
            log_t = _adam(problem, log_t, max_steps, tolerance)
        elif scores.shape[1] > 1:
            log_t = _golden_section(problem, log_t, (log_t - spacing).clamp(min=low), (log_t + spacing).clamp(max=high))
        log_t = log_t.masked_fill(flat, 0.0)

        temperatures[rows] = log_t.exp()
        residuals[rows] = (problem.loss(log_t) / samples[rows]).sqrt()
        unfitted[rows] = flat
        clamped[rows] = log_t.abs() > _LIMIT - 1e-3
    if n_clamped := int(clamped.sum()):
        warnings.warn(
            f"{n_clamped} of {n_rows} temperatures stopped at the limits [{MIN_TEMPERATURE:g}, {MAX_TEMPERATURE:g}]; "
            "see `clamped` of the result. Rescale the scores if their spread is that far from a log-probability's.",
            stacklevel=3,
        )
    return TemperatureFit(temperatures, residuals, counts, samples, unfitted, clamped)


@torch.no_grad()
def kept_counts(
    scores: Tensor, temperatures: Tensor | None, reference: Tensor, p: float, mask: Tensor | None = None
) -> Tensor:
    """How many candidates `TopP(p)` keeps of each sample, without floor and cap.

    `kept_counts(z, None, ...)` is before calibration, `kept_counts(z, temperatures, ...)` after, and both are to be
    compared with the `counts` of the fit, which are `kept_counts(reference.log(), None, ...)`.

    Args:
        scores: log-scores z `[R, S, N]`, as for `fit_temperatures`.
        temperatures: `[R]`, positive; `None` means 1.
        reference: attention probabilities `[R, S, N]`; only the mass of the protected tokens is read.
        p: the mass to keep, in (0, 1].
        mask: bool `[R, S, N]`, True for candidates.

    Returns:
        `Tensor`: `[R, S]` int64.
    """
    scores, reference, mask = _checked(scores, reference, p, mask)
    if temperatures is None:
        temperatures = scores.new_ones(scores.shape[0])
    if temperatures.shape != scores.shape[:1] or not bool(((temperatures > 0) & temperatures.isfinite()).all()):
        raise ValueError(
            f"temperatures has shape {list(temperatures.shape)} and begins {temperatures.flatten()[:8].tolist()}; it "
            f"must be [{scores.shape[0]}], one positive finite number per row of scores. Pass None for no calibration."
        )
    with suspended(scores.device):
        z = _sorted_logits(scores, mask)
        weights = (z / temperatures.to(z)[:, None, None]).softmax(-1)
        counts, _ = _top_p(weights, (reference * ~mask).sum(-1), mask.sum(-1), p)
    return counts


@dataclass(frozen=True)
class _Problem:
    """The fit in its smallest form: what is left outside the m best of each sample, as a function of log T."""

    z: Tensor  # [R, S, N] descending, the best one at 0, everything outside the softmax at _DEAD
    m: Tensor  # [R, S]
    target: Tensor  # [R, S] 1 - M. The rest, not the top, is compared: near p = 1 it has more digits
    used: Tensor  # [R, S] bool

    def rows(self, index: Tensor) -> "_Problem":
        return _Problem(self.z[index], self.m[index], self.target[index], self.used[index])

    def rest_mass(self, log_t: Tensor) -> Tensor:
        """1 - mass_T of the m best, `[R, S]`, for log T `[R, 1]` or `[R, S]`; it grows with T."""
        return _RestMass.apply(log_t.expand_as(self.target), self.z, self.m)

    def loss(self, log_t: Tensor) -> Tensor:
        """`[R]` for log T `[R]`."""
        return ((self.rest_mass(log_t.unsqueeze(-1)) - self.target).square() * self.used).sum(-1)

    def bracket(self, halvings: int) -> tuple[Tensor, Tensor, Tensor]:
        """Bisect each sample's own log T. Returns per row their lowest and highest, and whether no T matters."""
        n_best, n_live = (self.z == 0).sum(-1), (self.z > _DEAD).sum(-1)
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

        far = torch.full_like(zero, _LIMIT).masked_fill(gap.abs() <= slack, 0.0)
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
        """The best of evenly spaced log T of each row, and the spacing, both `[R]`."""
        spacing = (high - low) / (n_points - 1)
        points = torch.stack([low + i * spacing for i in range(n_points)])  # [P, R]
        losses = torch.stack([self.loss(point) for point in points])
        good = losses <= losses.amin(0) * (1 + 1e-4) + 1e-16
        nearest_to_one = points.abs().masked_fill(~good, math.inf).argmin(0)
        return points.gather(0, nearest_to_one[None])[0], spacing


class _RestMass(torch.autograd.Function):
    """The mass beyond the m best `[R, S]` and its exact derivative, a block of samples at a time.

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


def _adam(problem: _Problem, start: Tensor, max_steps: int, tolerance: float) -> Tensor:
    """The best log T `[R]` that Adam saw on its way from `start`."""
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
        log_t.clamp_(-_LIMIT, _LIMIT)
        small = (log_t - before).abs() < tolerance
        small_steps = torch.where(small | (small_steps >= 3), small_steps + 1, 0)
        if step % 8 == 0 and bool((small_steps >= 3).all()):  # a look now and then: it waits for the device
            break
    return best


def _golden_section(problem: _Problem, start: Tensor, low: Tensor, high: Tensor, steps: int = 32) -> Tensor:
    """A minimum of the loss between `low` and `high`, `[R]`, or `start` where that is no better."""
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


def _prepare(scores: Tensor, reference: Tensor, p: float, mask: Tensor) -> _Problem:
    """Sort, aim, and tell which samples can be used."""
    n_candidates = mask.sum(-1)
    weights = (reference * mask).sort(-1, descending=True).values
    m, rest_mass = _top_p(weights, (reference * ~mask).sum(-1), n_candidates, p)
    z = _sorted_logits(scores, mask)
    used = (m > 0) & (m < n_candidates) & (z[..., :1] > _DEAD).any(-1)
    return _Problem(z * used.unsqueeze(-1), m, rest_mass, used)


def _sorted_logits(scores: Tensor, mask: Tensor) -> Tensor:
    """Descending along the last dimension, the best at 0. Equal scores are interchangeable here, so no tie rule."""
    z = scores.masked_fill(~mask, -math.inf).sort(-1, descending=True).values
    best = z[..., :1]
    return torch.where(z > -math.inf, z - best, _DEAD)


def _top_p(weights: Tensor, credit: Tensor, n_candidates: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """The number of candidates that top-p keeps, and the share of the candidates' mass beyond them, both `[R, S]`.

    `weights` `[R, S, N]` descend and need no normalisation; `credit` is the mass A(F) of the protected tokens.
    """
    tail = weights.flip(-1).cumsum(-1).flip(-1)  # summed from the small end: it keeps its digits near p = 1
    share = tail / tail[..., :1].clamp(min=torch.finfo(tail.dtype).tiny)
    if p == 1:
        return n_candidates, torch.zeros_like(credit)
    kept = ((1 - credit).unsqueeze(-1) * share > 1 - p).sum(-1)
    beyond = torch.nn.functional.pad(share, (0, 1)).gather(-1, kept.unsqueeze(-1)).squeeze(-1)
    return kept, beyond


def _digits(dtype: torch.dtype) -> int:
    """Halvings that take a bracket of width `_LIMIT` to the precision of `dtype`."""
    return math.ceil(math.log2(_LIMIT / torch.finfo(dtype).eps))


def _checked(scores: Tensor, reference: Tensor, p: float, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The arguments, validated, detached, and in float32 or float64."""
    if not isinstance(p, numbers.Real) or isinstance(p, bool) or not 0 < p <= 1:
        raise ValueError(f"p is {p!r}; it is the attention mass to keep and must be a number in (0, 1].")
    if mask is None:
        mask = torch.ones_like(scores, dtype=torch.bool)
    for name, tensor in (("scores", scores), ("reference", reference)):
        if not tensor.is_floating_point():
            raise TypeError(f"{name} has dtype {tensor.dtype}; it must be floating point. Convert it with .float().")
    if mask.dtype != torch.bool:
        raise TypeError(f"mask has dtype {mask.dtype}; it must be torch.bool, True for candidates.")
    if scores.dim() != 3:
        raise ValueError(
            f"scores has shape {list(scores.shape)}; it must be [R, S, N]: rows, samples of a row, tokens. "
            "Use scores.unsqueeze(1) for one sample a row."
        )
    for name, tensor in (("reference", reference), ("mask", mask)):
        if tensor.shape != scores.shape:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}; it must be that of scores, {list(scores.shape)}. "
                "Pad with reference 0 and mask False."
            )
        if tensor.device != scores.device:
            raise ValueError(f"{name} is on {tensor.device} and scores on {scores.device}; move them to one device.")
    dtype = torch.promote_types(torch.promote_types(scores.dtype, reference.dtype), torch.float32)
    scores, reference = scores.detach().to(dtype), reference.detach().to(dtype)
    if bool((~(scores < math.inf) & mask).any()):
        raise ValueError("scores holds NaN or +inf among the candidates; it must be finite or -inf there.")
    if not bool(((reference >= 0) & reference.isfinite()).all()):
        raise ValueError(
            "reference holds negative, NaN or infinite entries; it must hold attention probabilities, 0 for padding."
        )
    if reference.numel() and (largest := float(reference.sum(-1).max())) > 1.05:
        raise ValueError(
            f"reference has a sample that sums to {largest:.4g}; each must sum to about 1 over all its tokens. "
            "Pass probabilities (after the softmax, averaged over queries and heads), not logits or counts."
        )
    return scores, reference, mask
