"""Bits per layer: the codes with which `Risk` spends bytes best, tokens and bits together."""

import torch
from torch import Tensor

from hardkv.kernels.codes import BITS
from hardkv.selectors.budgets.water_filling import Plan, Spending, bounds

# The bits of keys and of values that a layer can get.
CHOICES = ((16, 16), (8, 8), (8, 4), (4, 8), (4, 4), (4, 3), (3, 4), (3, 3), (4, 2), (3, 2), (2, 2))
# Bits are chosen for contexts of the calibration's length, or of this many times n tokens if that is more.
CONTEXT = 8
# How much a unit of loss by fewer bits counts beside a unit of loss by eviction: fitted by `python -m eval.exchange`.
EXCHANGE = 0.13
STEPS = 60  # of the bisection


def losses(distortion: Tensor) -> Tensor:
    """Return the loss of each layer by each of `CHOICES`, float64 `[L, C]`, from `[L, H, 2, 4]` of every head.

    The losses of keys and of values add up.
    """
    found = torch.nn.functional.pad(distortion.double().sum(1), (1, 0))  # nothing is lost with 16 bits
    pairs = [found[:, 0, BITS.index(keys)] + found[:, 1, BITS.index(values)] for keys, values in CHOICES]
    return EXCHANGE * torch.stack(pairs, 1)


def choose(risk: Spending, plan: Plan, loss: Tensor, cost: Tensor, num_protected: int) -> Tensor:
    """Choose the bits of every layer, so that bits and tokens together lose least for the bytes of a budget.

    For a price per byte, every layer has a best choice, together with the tokens of its heads that are worth more than
    their price. Bisection finds the price at which the bytes are spent. Of the choices on the way, and of those
    that are the same for all layers, the one that loses least when exactly these bytes are spent is returned.

    Args:
        risk: the budget. plan: of the layers' heads, at a cost of 1.
        loss: float64 `[L, C]`, of each layer by each choice. cost: int64 `[C]`, bytes of a token; the first is that of
            16 bits.
        num_protected: tokens per head that are kept at 16 bits, and whose bytes do not count.

    Returns:
        int64 `[L]`, indices of choices.
    """
    layers, heads, full = loss.shape[0], plan.rows // loss.shape[0], int(cost[0])
    context = plan.start.new_tensor([max(plan.length, CONTEXT * risk.n)])
    low, high = bounds(risk, context, context.new_tensor([num_protected]))
    total = (risk.n - num_protected) * full * plan.rows
    gains, width = plan.gains_at(context)[0], plan.widths(low, high)[0]
    fewest = heads * int(low - num_protected)
    by_layer = (torch.arange(plan.start.shape[0], device=width.device) % plan.rows) // heads

    def best(price: float) -> tuple[Tensor, int]:
        """Return the choices at a price per byte, and the bytes of their tokens."""
        worth = (gains - price * cost[:, None]).clamp_min(0.0)  # [C, S]
        each = worth.new_zeros(len(cost), layers)
        saved = each.index_add(1, by_layer, worth * width)
        tokens = each.long().index_add(1, by_layer, width * (worth > 0)) + fewest
        found = (loss.T - saved + price * cost[:, None] * fewest).argmin(0)
        return found, int((tokens.gather(0, found[None]) * cost[found]).sum())

    def lost(found: Tensor) -> float:
        """Return the loss of choices, less that of the fewest tokens, if all bytes are spent."""
        priced = plan.priced(cost[found].repeat_interleave(heads), full, num_protected)
        kept = priced.counts(total, context, low, high)[0].repeat(plan.start.shape[0] // plan.rows)
        taken = (kept.minimum(plan.stop) - plan.start.maximum(low)).clamp_min(0)
        return float(loss.gather(1, found[:, None]).sum() - (gains * taken).sum())

    positive = gains[gains > 0]
    if not len(positive):
        return loss.argmin(1)
    cheap, dear = float(positive.min() / cost.max()) / 2, float(positive.max() / cost.min()) * 2
    uniform = [each.expand(layers) for each in torch.arange(len(cost), device=cost.device)[:, None]]
    tried = {tuple(found.tolist()): found for found in uniform}
    for _ in range(STEPS):
        price = (cheap * dear) ** 0.5
        found, spent = best(price)
        tried[tuple(found.tolist())] = found
        cheap, dear = (price, dear) if spent > total else (cheap, price)
    return min(tried.values(), key=lost)
