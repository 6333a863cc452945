"""Draws over time which tier holds each position of a head, or one token in all heads, and the sizes of tiers."""

from collections.abc import Iterable, Sequence
from itertools import zip_longest
from os import PathLike
from typing import TYPE_CHECKING

import torch

from hardkv.cache import HardKVCache, Trace
from hardkv.extras import require
from hardkv.viz.figures import STATES, TIER_COLOURS, WIDTH, draw_states, finish, states_legend
from hardkv.viz.traces import label_snapshots, trace_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANELS_A_ROW = 4
NOT_YET = 4


def plot_kept(
    trace: "Trace | HardKVCache",
    layer_idx: int,
    heads: "int | Sequence[int] | None" = None,
    sequence: int = 0,
    path: "str | PathLike[str] | None" = None,
) -> "Figure":
    """Draw which positions heads of one layer hold after every event, in the colours of their tiers.

    Each head has a panel: events from left to right, positions from bottom to top. A pixel of several positions mixes
    their colours. Pads, which are never held, look like tokens that were given back.

    Args:
        trace: from `cache.record()`; of a cache, only the present state is drawn.
        layer_idx: index of the layer in the model.
        heads: indices of KV heads, all by default.
        sequence: index of the sequence in the batch.
        path: where to save the picture; the suffix chooses the format.

    Returns:
        The figure, closed: a notebook shows it once, as the last value of a cell.

    Raises:
        MissingPackageError: matplotlib is not installed.
        TypeError, ValueError: nothing was recorded, or the layer is not compressed.
        IndexError: there is no such head or sequence.
    """
    require("viz", "matplotlib")
    import matplotlib.pyplot as plt

    trace = trace_of(trace, "trace")
    if heads is None:
        heads = range(trace.heads(layer_idx))
    heads = list(heads) if isinstance(heads, Iterable) else [heads]
    columns = min(len(heads), PANELS_A_ROW)
    rows = -(-len(heads) // columns)
    figure, grid = plt.subplots(
        rows, columns, figsize=(WIDTH, 0.9 + 2.9 * rows), squeeze=False, sharex=True, sharey=True, layout="constrained"
    )
    unseen = torch.arange(trace.columns, device="cpu") >= trace.seen[:, None, None]
    states = trace.tiers(layer_idx, sequence).masked_fill(unseen, NOT_YET)  # [snapshots, heads, positions]
    shown: set[int] = set()
    for head, axis in zip_longest(heads, grid.flat):
        if head is None:
            axis.set_visible(False)
            continue
        held = states[:, head]
        shown |= set(held.unique().tolist())
        draw_states(axis, held.T)
        label_snapshots(axis, trace, most=9 // columns + 1, name=False)
        axis.set_title(f"KV head {head}", fontsize=9)
    figure.supylabel("position of the token", fontsize=9)
    for axis in grid.flat[len(heads) - columns : len(heads)]:  # the lowest panel of each column
        axis.tick_params(labelbottom=True)
        axis.set_xlabel("tokens seen", fontsize=9)
    figure.suptitle(f"Layer {layer_idx}: tokens held after every event and at the end", fontsize=10)
    states_legend(figure, shown - {NOT_YET})
    return finish(figure, path)


def plot_token(
    trace: "Trace | HardKVCache",
    position: int,
    sequence: int = 0,
    path: "str | PathLike[str] | None" = None,
    text: str = "",
) -> "Figure":
    """Draw the life of one token: which tier of each head holds it, after every event.

    Each KV head has a row. The heads of a layer are neighbours, and the first layer is at the bottom.

    Args:
        trace: from `cache.record()`; of a cache, only the present state is drawn.
        position: column of the token in its sequence, pads counted.
        sequence: index of the sequence in the batch.
        path: where to save the picture; the suffix chooses the format.
        text: the text of the token, for the title.

    Returns:
        The figure, closed: a notebook shows it once, as the last value of a cell.

    Raises:
        MissingPackageError: matplotlib is not installed.
        TypeError, ValueError: nothing was recorded.
        IndexError: there is no such position or sequence.
    """
    require("viz", "matplotlib")
    import matplotlib.pyplot as plt

    trace = trace_of(trace, "trace")
    if not 0 <= position < trace.columns:
        raise IndexError(f"position={position}: this trace has seen columns 0 to {trace.columns - 1}")
    counts = [trace.heads(layer_idx) for layer_idx in trace.layers]
    states = torch.cat([trace.tiers(layer_idx, sequence)[:, :, position] for layer_idx in trace.layers], 1).T
    states = states.masked_fill(trace.seen <= position, NOT_YET)
    figure, axis = plt.subplots(figsize=(WIDTH, min(1.6 + 0.09 * len(states), 7.0)), layout="constrained")
    draw_states(axis, states)
    first = [sum(counts[:rank]) for rank in range(len(counts))]
    for row in first[1:]:
        axis.axhline(row - 0.5, color="white", linewidth=0.6)
    every = -(-len(first) // 16)
    middle = [row + (count - 1) / 2 for row, count in zip(first, counts, strict=True)]
    axis.set_yticks(middle[::every], labels=[str(layer) for layer in trace.layers[::every]], fontsize=8)
    axis.set_ylabel("layer, a row for each KV head", fontsize=9)
    label_snapshots(axis, trace)
    axis.set_title(f"The life of token {position}" + (f", {text!r}" if text else ""), fontsize=10)
    states_legend(figure, set(states.unique().tolist()) - {NOT_YET})
    return finish(figure, path)


def plot_tiers(trace: "Trace | HardKVCache", sequence: int = 0, path: "str | PathLike[str] | None" = None) -> "Figure":
    """Draw how many tokens each tier holds after every event, the mean per KV head over all layers.

    Args:
        trace: from `cache.record()`; of a cache, only the present state is drawn.
        sequence: index of the sequence in the batch.
        path: where to save the picture; the suffix chooses the format.

    Returns:
        The figure, closed: a notebook shows it once, as the last value of a cell.

    Raises:
        MissingPackageError: matplotlib is not installed.
        TypeError, ValueError: nothing was recorded.
        IndexError: there is no such sequence.
    """
    require("viz", "matplotlib")
    import matplotlib.pyplot as plt

    trace = trace_of(trace, "trace")
    figure, axis = plt.subplots(figsize=(WIDTH, 3.0), layout="constrained")
    below = torch.zeros(len(trace), dtype=torch.float64, device="cpu")
    for code, (tier, colour) in enumerate(TIER_COLOURS.items(), 1):
        mean = trace.lengths(tier)[:, :, sequence].sum((1, 2)).double() / trace.num_heads
        if bool(mean.any()):
            axis.bar(range(len(trace)), mean.numpy(), 0.8, below.numpy(), color=colour, label=STATES[code][0])
        below += mean
    axis.plot(range(len(trace)), trace.seen.numpy(), color="0.5", linestyle="--", marker=".", label="tokens seen")
    axis.set_ylim(0, 1.6 * float(below.max()))  # the line of tokens seen soon leaves the picture
    label_snapshots(axis, trace, most=10)
    axis.set_ylabel("tokens a head, on average", fontsize=9)
    axis.set_title("Tokens held, by tier", fontsize=10)
    axis.legend(fontsize=8, loc="upper left", ncols=2, frameon=False)
    return finish(figure, path)
