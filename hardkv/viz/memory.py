"""Draws the bytes that caches hold over time, beside those of a dense cache."""

from collections.abc import Mapping
from os import PathLike
from typing import TYPE_CHECKING

import torch

from hardkv.cache import Trace
from hardkv.cache.record.stats import format_bytes
from hardkv.extras import require
from hardkv.viz.figures import COLOURS, WIDTH, finish
from hardkv.viz.traces import trace_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot_bytes(traces: "Trace | Mapping[str, Trace]", path: "str | PathLike[str] | None" = None) -> "Figure":
    """Draw the bytes that caches held after every event, and what DynamicCache would hold for the same layers.

    Args:
        traces: one trace from `cache.record()`, or up to eight by their names in the legend.
        path: where to save the picture; the suffix chooses the format.

    Returns:
        The figure, closed: a notebook shows it once, as the last value of a cell.

    Raises:
        MissingPackageError: matplotlib is not installed.
        TypeError: `traces` are not traces.
        ValueError: nothing was recorded, or there are more than eight.
    """
    require("viz", "matplotlib")
    import matplotlib.pyplot as plt

    named = dict(traces) if isinstance(traces, Mapping) else {"HardKVCache": traces}
    if not 0 < len(named) <= len(COLOURS):
        raise ValueError(f"got {len(named)} traces; up to {len(COLOURS)} can be told apart")
    named = {name: trace_of(trace, "traces") for name, trace in named.items()}
    longest = max(named.values(), key=lambda trace: int(trace.dense_nbytes.max()))
    unit = _unit(int(longest.dense_nbytes.max()))
    figure, axis = plt.subplots(figsize=(WIDTH, 3.2), layout="constrained")
    # a dense cache grows with every token, from 0 on, which is before the first snapshot
    seen, dense = (
        torch.cat([torch.zeros(1, device="cpu"), longest.seen]),
        torch.cat([torch.zeros(1, device="cpu"), longest.dense_nbytes / unit]),
    )
    axis.plot(seen.numpy(), dense.numpy(), color="0.45", linestyle="--", label="DynamicCache")
    for (name, trace), colour in zip(named.items(), COLOURS, strict=False):
        held = trace.nbytes / unit
        # no bytes are allocated between two events
        axis.step(trace.seen.numpy(), held.numpy(), where="post", color=colour, marker=".", label=name)
        ratio = float(trace.nbytes[-1] / trace.dense_nbytes[-1])
        axis.annotate(
            f"{ratio:.0%}",
            (int(trace.seen[-1]), float(held[-1])),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color=colour,
        )
    axis.set_xlim(0, int(longest.seen.max()) * 1.07)
    axis.set_ylim(0, None)
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.set_xlabel("tokens seen", fontsize=9)
    axis.set_ylabel(f"held ({format_bytes(unit).split()[1]})", fontsize=9)
    axis.set_title("Bytes of keys and values, and of all that selection needs", fontsize=10)
    axis.grid(color="0.92")
    axis.set_axisbelow(True)
    axis.legend(fontsize=8, loc="upper left", frameon=False)
    return finish(figure, path)


def _unit(nbytes: int) -> int:
    """Return the largest power of 1024, of those with a name, up to `nbytes`."""
    return max(1024**power for power in range(5) if 1024**power <= max(nbytes, 1))
