"""What a calibration found, as a picture."""

from itertools import product
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hardkv.calibration.summary import NO_KEPT, NO_RISK, Found, allocation_of, layers_of, length_of, scorer_name
from hardkv.extras import require
from hardkv.viz.figures import WIDTH, finish, number_size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The most layers named on the axis of a heat map.
MAX_TICKS = 40
# With more heads, a cell is too low for its number.
MAX_ANNOTATED_HEADS = 16
# The colours of temperatures span at least [1 / r, r]: temperatures within it are as good as 1.
NARROWEST = 1.25


def plot_calibration(calibration: Found, path: "str | PathLike[str] | None" = None, budget: int = 512) -> "Figure":
    """Draw temperatures, counts of top-p before and after calibration, risk curves, and the counts of `Risk(n)`.

    Args:
        calibration: if it lacks something, the panel says so.
        path: where to save the picture; the suffix chooses the format.
        budget: n of the `Risk(n)` whose counts are drawn.

    Returns:
        The figure, closed: a notebook shows it once, as the last value of a cell.

    Raises:
        MissingPackageError: matplotlib is not installed.
    """
    require("viz", "matplotlib")
    import matplotlib.pyplot as plt

    with plt.rc_context({"font.size": 8}):
        figure = _draw(calibration, budget)
    return finish(figure, path)


# ---------------------------------------------------------------------- panels


def _draw(calibration: Found, budget: int) -> "Figure":
    """Draw the figure of `plot_calibration`."""
    import matplotlib.pyplot as plt
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.ticker import LogLocator, NullLocator

    heads = calibration.temperatures.shape[1]
    high = min(max(0.7 + 0.18 * heads, 1.3), 4.0)
    axes: dict[str, Axes]
    figure, axes = plt.subplot_mosaic(
        [["temperatures"] * 2, ["budgets"] * 2, ["kept", "risk"]],
        figsize=(WIDTH, 2 * high + 4.0),
        height_ratios=[high, high, 3.4],
        layout="constrained",
    )
    figure.suptitle(_title(calibration), fontsize=9)
    layers = layers_of(calibration)

    # A few heads may lie far out: the colours show the others, and numbers in the cells show these.
    spread = float(calibration.temperatures.double().log().abs().quantile(0.9).exp())
    limit = max(spread, NARROWEST)
    bar = _heat_map(axes["temperatures"], calibration.temperatures, layers, LogNorm(1 / limit, limit), "RdBu_r")
    bar.set_label("temperature")
    ticks = [1 / limit, limit**-0.5, 1, limit**0.5, limit]
    bar.set_ticks(ticks, labels=[f"{tick:.2g}" for tick in ticks])
    bar.ax.yaxis.set_minor_locator(NullLocator())
    axes["temperatures"].set_title("Temperatures (1: scores are as sharp as attention)", loc="left", fontsize=9)

    allocation = allocation_of(calibration, budget)
    axes["budgets"].set_title(f"Tokens kept under Risk({budget})", loc="left", fontsize=9)
    axes["risk"].set_title("Risk: attention lost by keeping fewer tokens", loc="left", fontsize=9)
    if allocation is None:
        _say(axes["budgets"], NO_RISK)
        _say(axes["risk"], NO_RISK)
    else:
        largest = max(int(allocation.max()), 1)
        bar = _heat_map(axes["budgets"], allocation, layers, Normalize(0, largest), "viridis")
        bar.set_label(f"tokens of {length_of(calibration):,}\n(mean {float(allocation.double().mean()):,.0f})")
        _draw_risk(axes["risk"], calibration, allocation)
        axes["risk"].xaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))

    axes["kept"].set_title("Tokens that top-p keeps, a point a head", loc="left", fontsize=9)
    if calibration.kept is None:
        _say(axes["kept"], NO_KEPT)
    else:
        _draw_kept(axes["kept"], calibration.kept)
    return figure


def _heat_map(axis: "Axes", values: Tensor, layers: list[int], norm: Any, colours: str) -> Any:
    """Draw `values [L, H]`, layers from left to right, heads from top to bottom, and return the colour bar."""
    figure: Any = axis.figure
    panel = values.T.cpu().numpy()  # [H, L]
    image = axis.imshow(panel, aspect="auto", cmap=colours, norm=norm, interpolation="nearest")
    heads, count = panel.shape
    every = -(-count // MAX_TICKS)
    axis.set_xticks(range(0, count, every), labels=[str(layer) for layer in layers[::every]], fontsize=7)
    every = -(-heads // MAX_ANNOTATED_HEADS)
    axis.set_yticks(range(0, heads, every), labels=[str(head) for head in range(0, heads, every)])
    axis.set_xlabel("layer")
    axis.set_ylabel("KV head")
    texts = {(head, layer): _cell(panel[head, layer].item()) for head, layer in product(range(heads), range(count))}
    size = number_size(count, max(map(len, texts.values())))
    if size is not None and heads <= MAX_ANNOTATED_HEADS:
        for (head, layer), text in texts.items():
            red, green, blue, _ = image.to_rgba(panel[head, layer])
            colour = "black" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.5 else "white"
            axis.text(layer, head, text, ha="center", va="center", fontsize=size, color=colour)
    below, above = bool((values < norm.vmin).any()), bool((values > norm.vmax).any())
    extend = {(False, False): "neither", (True, False): "min", (False, True): "max", (True, True): "both"}[below, above]
    return figure.colorbar(image, ax=axis, pad=0.01, aspect=10, extend=extend)


def _draw_kept(axis: "Axes", kept: Tensor) -> None:
    """Draw counts by scores against counts by raw attention, on axes that are logarithmic from 1 on and include 0."""
    raw, before, after = (counts.flatten().cpu().numpy() for counts in kept)
    largest = max(int(kept.max()), 1) * 1.4
    axis.plot([0, largest], [0, largest], color="0.6", linewidth=1, zorder=1)
    small: dict[str, Any] = {"s": 22, "linewidth": 1.0}
    axis.scatter(raw, before, facecolors="none", edgecolors="tab:orange", label="before calibration", zorder=3, **small)
    axis.scatter(raw, after, color="tab:blue", alpha=0.7, label="after calibration", zorder=2, **small)
    for scale, limit in ((axis.set_xscale, axis.set_xlim), (axis.set_yscale, axis.set_ylim)):
        scale("symlog", linthresh=1, linscale=0.3)
        limit(-0.3, largest)
    for ticks in (axis.xaxis, axis.yaxis):
        ticks.set_major_formatter("{x:,.0f}")
    axis.set_xlabel("by raw attention")
    axis.set_ylabel("by the scores")
    axis.grid(color="0.92")
    axis.set_axisbelow(True)
    axis.legend(loc="upper left")


def _draw_risk(axis: "Axes", calibration: Found, allocation: Tensor) -> None:
    """Draw one thin line per head, coloured by layer, and thick ones for the heads with the most and fewest tokens."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    assert calibration.counts is not None
    assert calibration.risk is not None
    figure: Any = axis.figure
    layers = layers_of(calibration)
    counts = calibration.counts.cpu().numpy()
    risk = calibration.risk.cpu().double()
    drawn = risk.masked_fill(risk <= 0, torch.nan).numpy()  # every curve ends at 0, which has no logarithm
    scale = Normalize(min(layers), max(layers))
    colours = colormaps["viridis"]
    for (rank, layer), head in product(enumerate(layers), range(risk.shape[1])):
        axis.plot(counts, drawn[rank, head], color=colours(scale(layer)), linewidth=0.6, alpha=0.7)
    flat = allocation.flatten()
    extremes = {int(flat.argmin()): "black", int(flat.argmax()): "tab:red"}  # one head when all are equal
    for place, colour in extremes.items():
        rank, head = divmod(place, risk.shape[1])
        label = f"layer {layers[rank]}, head {head}: {int(flat[place]):,} tokens"
        axis.plot(counts, drawn[rank, head], color=colour, linewidth=1.8, label=label)
    mean = float(flat.double().mean())
    axis.axvline(mean, color="0.4", linewidth=1, linestyle="--", label=f"the mean, {mean:,.0f} tokens")
    axis.set_xscale("log")
    if bool((risk > 0).any()):
        axis.set_yscale("log")
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.xaxis.set_minor_formatter("")
    axis.set_xlabel("tokens kept")
    axis.set_ylabel("squared attention lost, per query")
    axis.grid(color="0.92")
    axis.legend(loc="lower left")
    if len(layers) > 1:
        bar = figure.colorbar(ScalarMappable(scale, colours), ax=axis, pad=0.01, label="layer")
        bar.ax.yaxis.get_major_locator().set_params(integer=True)


def _say(axis: "Axes", text: str) -> None:
    """Write a text into a panel without data."""
    axis.set_xticks([])
    axis.set_yticks([])
    axis.text(0.5, 0.5, text, ha="center", va="center", color="0.4", transform=axis.transAxes)


def _title(calibration: Found) -> str:
    known = calibration.provenance
    parts = [Path(known.get("name", "")).name]
    parts += [scorer_name(known["scorer"])] if "scorer" in known else []
    parts += [f"{known['tokens']:,} tokens of text"] if "tokens" in known else []
    named = [part for part in parts if part]
    return ", ".join(named[:1]) + (",\n" if len(named) > 1 else "") + ", ".join(named[1:]) or "Calibration"


def _cell(value: "float | int") -> str:
    """Write a number with two digits, no zero before its point, and tiny numbers as <.01."""
    if isinstance(value, int) or value >= 9.95:
        return f"{value:.0f}"
    return f"{value:#.2g}".rstrip(".") if value >= 0.995 else f"{value:.2f}".lstrip("0") if value >= 0.01 else "<.01"
