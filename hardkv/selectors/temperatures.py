"""Logits Calibration: with one temperature per KV head, a scorer's top-p keeps as much as raw attention's."""

import math
import numbers
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hardkv.kernels.autocast import suspended
from hardkv.selectors.checks import check_name
from hardkv.selectors.solvers import (
    DEAD,
    LIMIT,
    MAX_TEMPERATURE,
    MIN_TEMPERATURE,
    Problem,
    adam,
    golden_section,
    halvings_to_precision,
)

SOLVERS = ("adam", "bisect")
_SCAN_POINTS = 33  # samples that disagree by orders of magnitude give a row several minima


@dataclass(frozen=True)
class TemperatureFit:
    """The result of `fit_temperatures`; unpacks as `temperatures, residuals = fit`.

    Args:
        temperatures: `[R]`, float32 (float64 for float64 input).
        residuals: `[R]`, root mean square, over the samples used, of (mass of the m best-scored candidates
            at T) - (reference mass of the m best candidates). 0 where no sample was used.
        counts: `[R, S]` int64, the m of each sample: how many candidates `TopP(p)` keeps on the reference.
        samples: `[R]` int64, how many of the S samples were used.
        unfitted: `[R]` bool, True where T is 1 because nothing determines it: no sample was used, or the masses are the
            same at every T (for instance if all scores of the row are equal); the residual still tells the difference.
        clamped: `[R]` bool, True where T is `MIN_TEMPERATURE` or `MAX_TEMPERATURE` and the best T lies beyond.
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

    This is Logits Calibration of HARD-KV (ICML 2026, https://arxiv.org/abs/2606.28831). For sample s of row r, let m be
    the number of candidates that `TopP(p)` keeps on the reference (the protected tokens' mass A(F) counts toward p),
    and M the reference mass, normalised over the candidates, of those m. The row's temperature minimises

        sum over s of (mass_T(m best candidates by z) - M)^2,  mass_T under softmax over the candidates of z / T.

    T never changes the order of z, so z is sorted once; the masses fall as T grows. A sample is left out if protected
    tokens alone reach p (m = 0) or everything is kept (m = number of candidates). Where several T are equally good, the
    fit takes the one nearest to 1.

    M is somewhat larger than p's share, so that z = log A gives T = 1. For one sample with distinct scores, `TopP(p)`
    then keeps exactly m if the m-th score's own mass at T exceeds this surplus (always so for z = a * log A), and a few
    less otherwise.

    Both solvers first find by bisection, for each sample, the T that fits it alone. The row's minimum lies between the
    smallest and the largest of these; the search starts at the best point of a scan there. Rows are independent.

    Args:
        scores: log-scores z `[R, S, N]`, floating point: R rows (layer, KV head), S samples that share a
            temperature. -inf is a candidate without mass. Entries outside `mask` are ignored.
        reference: attention probabilities `[R, S, N]` over all tokens of the row, protected ones included.
            Padding has 0 here and False in `mask`.
        p: the mass to keep, in (0, 1].
        mask: bool `[R, S, N]`, True for candidates. By default all tokens are candidates.
        solver: `"adam"`, the paper's optimiser: `torch.optim.Adam` on log T of all rows at once, with a decaying
            learning rate; a row is done when its steps stay below `tolerance`. `"bisect"`: bisection to the precision
            of the dtype, exact for one sample; with several samples, golden-section search around the scan's best
            point. It needs fewer passes over the data.
        max_steps: the most Adam steps.
        tolerance: a step of Adam below this, in log T, counts as none.

    Returns:
        `TemperatureFit`, which unpacks as `(temperatures, residuals)`, both `[R]`. T stays within
        [`MIN_TEMPERATURE`, `MAX_TEMPERATURE`]; rows that stop there have `clamped`, and a `UserWarning` counts them.

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
        low, high, flat = problem.bracket(halvings=4 if solver == "adam" else halvings_to_precision(scores.dtype))
        log_t, spacing = problem.scan(low, high, _SCAN_POINTS if scores.shape[1] > 1 else 3)
        if solver == "adam":
            log_t = adam(problem, log_t, max_steps, tolerance)
        elif scores.shape[1] > 1:
            log_t = golden_section(problem, log_t, (log_t - spacing).clamp(min=low), (log_t + spacing).clamp(max=high))
        log_t = log_t.masked_fill(flat, 0.0)

        temperatures[rows] = log_t.exp()
        residuals[rows] = (problem.loss(log_t) / samples[rows]).sqrt()
        unfitted[rows] = flat
        clamped[rows] = log_t.abs() > LIMIT - 1e-3
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
    """Count the candidates that `TopP(p)`, without floor and cap, keeps of each sample.

    `kept_counts(z, None, ...)` gives the counts before calibration, `kept_counts(z, temperatures, ...)` those after.
    Compare both with the `counts` of the fit, which are `kept_counts(reference.log(), None, ...)`.

    Args:
        scores: log-scores z `[R, S, N]`, as for `fit_temperatures`.
        temperatures: `[R]`, positive; `None` means 1.
        reference: attention probabilities `[R, S, N]`; only those of protected tokens are read.
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


def _prepare(scores: Tensor, reference: Tensor, p: float, mask: Tensor) -> Problem:
    """Sort the scores, compute m and the target mass, and mark the samples that can be used."""
    n_candidates = mask.sum(-1)
    weights = (reference * mask).sort(-1, descending=True).values
    m, rest_mass = _top_p(weights, (reference * ~mask).sum(-1), n_candidates, p)
    z = _sorted_logits(scores, mask)
    used = (m > 0) & (m < n_candidates) & (z[..., :1] > DEAD).any(-1)
    return Problem(z * used.unsqueeze(-1), m, rest_mass, used)


def _sorted_logits(scores: Tensor, mask: Tensor) -> Tensor:
    """Sort descending along the last dimension and move the best to 0. Ties need no rule: equal scores are alike."""
    z = scores.masked_fill(~mask, -math.inf).sort(-1, descending=True).values
    best = z[..., :1]
    return torch.where(z > -math.inf, z - best, DEAD)


def _top_p(weights: Tensor, credit: Tensor, n_candidates: Tensor, p: float) -> tuple[Tensor, Tensor]:
    """Return how many candidates top-p keeps, and the share of the candidates' mass beyond them, both `[R, S]`.

    `weights` `[R, S, N]` descend and need no normalisation; `credit` is the mass A(F) of the protected tokens.
    """
    tail = weights.flip(-1).cumsum(-1).flip(-1)  # summed from the small end, so that digits survive near p = 1
    share = tail / tail[..., :1].clamp(min=torch.finfo(tail.dtype).tiny)
    if p == 1:
        return n_candidates, torch.zeros_like(credit)
    kept = ((1 - credit).unsqueeze(-1) * share > 1 - p).sum(-1)
    beyond = torch.nn.functional.pad(share, (0, 1)).gather(-1, kept.unsqueeze(-1)).squeeze(-1)
    return kept, beyond


def _checked(scores: Tensor, reference: Tensor, p: float, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return the arguments: validated, detached, and in float32 or float64."""
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
