"""What the pictures share: where their data comes from, colours, how a figure ends."""

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from hardkv.cache import HardKVCache, Trace
from hardkv.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Width that a notebook shows unscaled, in inches.
WIDTH = 7.0
# Okabe and Ito's palette, told apart with any colour vision.
BLUE, ORANGE, GREEN, VERMILION, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#7F7F7F"
COLOURS = (BLUE, ORANGE, GREEN, VERMILION, "#CC79A7", "#56B4E9", "#F0E442", "#000000")
# Beside colours, where lines are more than these: told apart without them.
MARKERS = "o^vDPX*<>p"
TIER_COLOURS = {"condensed": BLUE, "sparse": ORANGE, "dense": GREEN}
DROPPED, UNSEEN = "#E4E4E4", "#FFFFFF"
STATES = {  # what `Trace.tiers` says, and 4 for what is still to come
    0: ("given back", DROPPED),
    1: ("condensed: selected", BLUE),
    2: ("sparse: held, not read", ORANGE),
    3: ("dense: newest", GREEN),
    4: ("not yet seen", UNSEEN),
}
# Points that all cells of a heat map's row share, and the sizes of numbers in them.
ROW_POINTS, MIN_SIZE, MAX_SIZE = 395, 4.2, 7.0
# Up to so many rows a row is a pixel at least; beyond, an image is made so many pixels wide.
SHARP_ROWS, WIDE = 200, 600


def trace_of(source: "Trace | HardKVCache", what: str = "source") -> Trace:
    """A recorded trace as it is; of a cache the present.

    Raises:
        TypeError: neither. ValueError: it holds nothing.
    """
    if isinstance(source, HardKVCache):
        source = Trace.of(source)
    if not isinstance(source, Trace):
        raise TypeError(f"{what}={type(source).__name__} must be a HardKVCache, or the Trace of cache.record()")
    if not len(source):
        raise ValueError(f"{what} is empty: run the model with this cache first, within cache.record() for a trace")
    return source


def finish(figure: "Figure", path: "str | PathLike[str] | None") -> "Figure":
    """Save a figure if it shall be, and close it: a notebook then shows it once, as a cell's last value."""
    import matplotlib.pyplot as plt

    if path is not None:
        save_figure(figure, path)
    plt.close(figure)
    return figure


def save_figure(figure: "Figure", path: "str | PathLike[str]", dpi: int = 150) -> None:
    """Write a figure; the suffix chooses the format, and matplotlib's default is added to a name without one.

    Raises:
        OSError: it cannot be written, or something other than a file stands there.
        ValueError: a format that matplotlib does not know.
    """
    path = Path(path)
    form = path.suffix[1:] or figure.canvas.get_default_filetype()
    with replacing(path if path.suffix else path.with_name(f"{path.name}.{form}")) as file:
        figure.savefig(file, format=form, dpi=dpi)


def number_size(cells: int, characters: int) -> float | None:
    """Font size of numbers of so many characters in a row of so many cells, in points; None: they do not fit."""
    size = min(ROW_POINTS / cells / (0.62 * characters + 0.6), MAX_SIZE)
    return size if size >= MIN_SIZE else None


def draw_states(axis: "Axes", states: torch.Tensor) -> None:
    """An image of what `STATES` numbers, uint8 `[rows, snapshots]`; pixels that stand for several rows mix colours."""
    from matplotlib.colors import BoundaryNorm, ListedColormap

    rows, snapshots = states.shape
    mixed = rows > SHARP_ROWS
    # mixing would blur the steps from snapshot to snapshot too, if they were not many pixels wide
    wide = states.repeat_interleave(-(-WIDE // snapshots) if mixed else 1, 1)
    axis.imshow(
        wide.numpy(),
        aspect="auto",
        origin="lower",
        extent=(-0.5, snapshots - 0.5, -0.5, rows - 0.5),
        cmap=ListedColormap([colour for _, colour in STATES.values()]),
        norm=BoundaryNorm([code - 0.5 for code in range(len(STATES) + 1)], len(STATES)),
        interpolation="antialiased" if mixed else "nearest",
        interpolation_stage="rgba",
    )


def label_snapshots(axis: "Axes", trace: Trace, most: int = 8, name: bool = True) -> None:
    """Number cells along the x axis, one a snapshot, by the columns seen, and name the axis."""
    every = -(-len(trace) // most)
    places = range(len(trace) - 1, -1, -every)
    axis.set_xticks(list(places), labels=[f"{int(trace.seen[place]):,}" for place in places], fontsize=8)
    if name:
        axis.set_xlabel("tokens seen: after every event, and at the end", fontsize=9)


def states_legend(figure: "Figure", codes: "set[int]") -> None:
    """Beside a figure: the colours of these states."""
    from matplotlib.patches import Patch

    patches = [Patch(facecolor=colour, edgecolor="0.6", linewidth=0.5, label=label)
               for code, (label, colour) in STATES.items() if code in codes]  # fmt: skip
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), fontsize=8, frameon=False)
