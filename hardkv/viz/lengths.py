"""Draws how many tokens each KV head keeps, as a heat map."""

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hardkv.cache import HardKVCache, Stats, Trace
from hardkv.extras import require
from hardkv.viz.figures import WIDTH, finish, number_size

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Largest height in inches of a sequence's heat map, most heads named on its axis, most heads with numbers.
HIGHEST, MAX_TICKS, MAX_NUMBERED = 4.0, 16, 32


def plot_lengths(
    lengths: "Tensor | Sequence[Sequence[Sequence[int]]] | HardKVCache | Stats | Trace",
    path: "str | Path | None" = None,
    title: str = "Tokens kept per layer and KV head",
) -> "Figure":
    """Draw `cache.lengths()`: layers from left to right, KV heads from top to bottom, one panel per sequence.

    Args:
        lengths: a cache, its `stats()`, the newest snapshot of a trace, or tokens `[layers, batch, kv_heads]`, a tensor
            or the nested lists of a JSON file.
        path: where to save the picture; the suffix chooses the format.
        title: title above the picture.

    Returns:
        The figure, closed: a notebook shows it once, as the last value of a cell.

    Raises:
        MissingPackageError: matplotlib is not installed.
        ValueError: `lengths` has not three dimensions, or is empty.
    """
    require("viz", "matplotlib")
    import matplotlib.pyplot as plt

    if isinstance(lengths, Trace):
        lengths = lengths.lengths()[-1:].flatten(0, 1)
    elif isinstance(lengths, HardKVCache):
        lengths = lengths.lengths()
    counts = torch.as_tensor(lengths.lengths if isinstance(lengths, Stats) else lengths).cpu()
    if counts.dim() != 3 or counts.numel() == 0:
        raise ValueError(f"lengths has shape {tuple(counts.shape)}; expected [layers, batch, kv_heads], none of them 0")
    layers, batch, heads = counts.shape
    high = min(0.3 * heads, HIGHEST)
    figure, grid = plt.subplots(
        batch, 1, figsize=(WIDTH, 1.3 + batch * (0.4 + high)), squeeze=False, sharex=True, layout="constrained"
    )
    axes = grid[:, 0]
    # Colours begin at 0, so that two pictures with the same largest count have the same colours.
    largest = max(int(counts.max()), 1)
    size = number_size(layers, len(str(largest))) if heads <= MAX_NUMBERED else None
    for sequence, axis in enumerate(axes):
        panel = counts[:, sequence].T.numpy()  # [heads, layers]
        image = axis.imshow(panel, aspect="auto", cmap="viridis", vmin=0, vmax=largest, interpolation="nearest")
        axis.set_yticks(range(0, heads, -(-heads // MAX_TICKS)))
        axis.set_ylabel("KV head" if batch == 1 else f"KV head\n(sequence {sequence})")
        if size is not None:
            for head, layer in product(range(heads), range(layers)):
                count = int(panel[head, layer])
                colour = "black" if count > 0.55 * largest else "white"
                axis.text(layer, head, f"{count}", ha="center", va="center", fontsize=size, color=colour)
    axes[-1].set_xlabel("compressed layer")
    axes[-1].xaxis.get_major_locator().set_params(integer=True)
    axes[0].set_title(title, loc="left", fontsize=11)

    mean = float(counts.double().mean())
    bar = figure.colorbar(image, ax=list(axes), pad=0.01, aspect=max(6, 4 * batch))
    bar.set_label(f"tokens kept (mean {mean:,.0f})")
    bar.ax.axhline(mean, color="white" if mean < 0.55 * largest else "black", linewidth=1.5)
    return finish(figure, path)
