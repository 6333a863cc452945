"""Draws the cumulative attention mass of one head's best tokens, and the cut of Top-p with and without calibration."""

from os import PathLike
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hardkv.cache import HardKVCache
from hardkv.cache.layer import HardKVLayer
from hardkv.extras import require
from hardkv.selectors.checks import check_fraction
from hardkv.selectors.temperatures import fit_temperatures
from hardkv.viz.figures import BLUE, ORANGE, WIDTH, finish

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_mass(
    cache: HardKVCache,
    layer_idx: int,
    head: int = 0,
    sequence: int = 0,
    p: float = 0.9,
    temperature: float | None = None,
    path: "str | PathLike[str] | None" = None,
) -> "Figure":
    """Draw the cumulative mass of a head's best tokens, by raw attention and by scores, and how many Top-p keeps.

    Protected tokens (sinks and window) are always kept, so the others must reach p_c = (p - a) / (1 - a), where a is
    the attention on protected tokens, as in `TopP`. Each curve sorts the tokens in its own order. Tokens that the cache
    has dropped are left out; an event of `TopP` now would use the same numbers.

    Args:
        cache: the cache, which has been run; its scorer gives the scores.
        layer_idx: index of the layer in the model.
        head, sequence: indices of the KV head and of the sequence.
        p: the mass that Top-p keeps.
        temperature: the divisor of calibrated scores; by default that of the cache's calibration, or else the one that
            fits these scores to this attention.
        path: where to save the picture; the suffix chooses the format.

    Returns:
        The figure, closed: a notebook shows it once, as the last value of a cell.

    Raises:
        MissingPackageError: matplotlib is not installed.
        ValueError: the layer is not compressed, or the head holds only protected tokens.
        IndexError: there is no such head or sequence.
    """
    require("viz", "matplotlib")
    import matplotlib.pyplot as plt

    p = check_fraction("p", p, low_open=True)
    observation = cache.observe(layer_idx)
    layer = cache.layers[layer_idx]
    assert isinstance(layer, HardKVLayer)  # observe() saw to it
    if not (0 <= head < observation.num_kv_heads and 0 <= sequence < observation.batch_size):
        raise IndexError(
            f"head={head}, sequence={sequence}: layer {layer_idx} has {observation.num_kv_heads} KV heads, and the "
            f"cache {observation.batch_size} sequences"
        )
    row = observation.row == sequence * observation.num_kv_heads + head
    candidates = row & ~observation.protected
    count = int(candidates.sum())
    if count == 0:
        raise ValueError(f"head {head} of layer {layer_idx} holds protected tokens only: there is nothing to choose")
    scores = cache.settings.scorer.score(observation)[candidates].double().cpu()  # type: ignore[union-attr]
    attention = observation.attention.double()
    protected_mass = float(attention[row & observation.protected].sum() / attention[row].sum())
    reference = attention[candidates].cpu()
    target = (p - protected_mass) / (1 - protected_mass)
    if temperature is None:
        fitted = layer.tiers.temperatures if layer.tiers is not None else None
        if fitted is not None:
            temperature = float(fitted.view(observation.batch_size, -1)[sequence, head])
        elif layer.temperatures is not None:
            temperature = float(layer.temperatures[head])
        else:
            temperature = _fitted(scores, attention[row].cpu(), observation.protected[row].cpu(), p)
    curves = {
        "raw attention": (_cumulative(reference / reference.sum()), "black", "-"),
        "scores, T = 1": (_cumulative(scores.softmax(0)), ORANGE, "-"),
        f"scores, T = {temperature:.2g}": (_cumulative((scores / temperature).softmax(0)), BLUE, "--"),
    }
    figure, axis = plt.subplots(figsize=(WIDTH, 3.6), layout="constrained")
    numbers = range(1, count + 1)
    for name, (mass, colour, style) in curves.items():
        kept = cut(mass, target)
        axis.plot(numbers, mass.numpy(), color=colour, linestyle=style, label=f"{name}: keeps {kept:,} of {count:,}")
        if kept:
            axis.plot([kept, kept], [0, float(mass[kept - 1])], color=colour, linestyle=":", linewidth=1)
            axis.plot([kept], [float(mass[kept - 1])], color=colour, marker="o", markersize=5)
    axis.axhline(max(target, 0), color="0.6", linewidth=1)
    axis.annotate(
        f"p_c = {max(target, 0):.2f}", (1, max(target, 0)), xytext=(2, 3), textcoords="offset points", fontsize=8
    )
    axis.set_xscale("log")
    axis.set_xlim(1, max(count, 2))
    axis.set_ylim(0, 1.03)
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.set_xlabel("best tokens, beyond the protected ones", fontsize=9)
    axis.set_ylabel("their share of the mass", fontsize=9)
    axis.set_title(
        f"Layer {layer_idx}, KV head {head}: p = {p:g}, of which sinks and window hold {protected_mass:.2f}",
        fontsize=10,
    )
    axis.grid(color="0.92")
    axis.set_axisbelow(True)
    axis.legend(fontsize=8, loc="lower right")
    return finish(figure, path)


def cut(mass: Tensor, target: float) -> int:
    """Return how many of the best tokens reach the target; `mass [n]` is cumulative."""
    if target <= 0:
        return 0
    return min(int((mass < target - 1e-12).sum()) + 1, mass.shape[0])


def _cumulative(mass: Tensor) -> Tensor:
    return mass.sort(descending=True).values.cumsum(0)


def _fitted(scores: Tensor, attention: Tensor, protected: Tensor, p: float) -> float:
    """Fit the temperature of one row from the scores of its candidates and the attention of all its tokens."""
    z = torch.full_like(attention, -torch.inf)
    z[~protected] = scores
    fit = fit_temperatures(z[None, None], attention[None, None], p, mask=~protected[None, None], solver="bisect")
    return float(fit.temperatures[0])
