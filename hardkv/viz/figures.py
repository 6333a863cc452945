"""Parts that the pictures share: colours, sizes, saving."""

from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from hardkv.files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Width in inches that a notebook shows unscaled.
WIDTH = 7.0
# Okabe and Ito's palette, which people with any colour vision can tell apart.
BLUE, ORANGE, GREEN, VERMILION, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#7F7F7F"
COLOURS = (BLUE, ORANGE, GREEN, VERMILION, "#CC79A7", "#56B4E9", "#F0E442", "#000000")
# For figures with more lines than colours: markers tell the lines apart.
MARKERS = "o^vDPX*<>p"
TIER_COLOURS = {"condensed": BLUE, "sparse": ORANGE, "dense": GREEN}
DROPPED, UNSEEN = "#E4E4E4", "#FFFFFF"
STATES = {  # the values of `Trace.tiers`, and 4 for tokens that are still to come
    0: ("given back", DROPPED),
    1: ("condensed: selected", BLUE),
    2: ("sparse: held, not read", ORANGE),
    3: ("dense: newest", GREEN),
    4: ("not yet seen", UNSEEN),
}
# Points for all cells of a heat map's row, and the smallest and largest font size of the numbers in cells.
ROW_POINTS, MIN_SIZE, MAX_SIZE = 395, 4.2, 7.0
# An image with more rows than this, which are less than a pixel high, is made this many pixels wide.
SHARP_ROWS, WIDE = 200, 600


def finish(figure: "Figure", path: "str | PathLike[str] | None") -> "Figure":
    """Save a figure if there is a path, and close it: a notebook then shows it once, as the last value of a cell."""
    import matplotlib.pyplot as plt

    if path is not None:
        save_figure(figure, path)
    plt.close(figure)
    return figure


def save_figure(figure: "Figure", path: "str | PathLike[str]", dpi: int = 150) -> None:
    """Write a figure; the suffix chooses the format. A name without suffix gets that of matplotlib's default.

    Raises:
        OSError: the file cannot be written, or the path is something other than a file.
        ValueError: matplotlib does not know the format.
    """
    path = Path(path)
    form = path.suffix[1:] or figure.canvas.get_default_filetype()
    with replacing(path if path.suffix else path.with_name(f"{path.name}.{form}")) as file:
        figure.savefig(file, format=form, dpi=dpi)


def number_size(cells: int, characters: int) -> float | None:
    """Return the font size, in points, at which such numbers fit into a row of cells; None: they do not fit."""
    size = min(ROW_POINTS / cells / (0.62 * characters + 0.6), MAX_SIZE)
    return size if size >= MIN_SIZE else None


def draw_states(axis: "Axes", states: torch.Tensor) -> None:
    """Draw states, numbered as in `STATES`, uint8 `[rows, snapshots]`; a pixel of several rows mixes their colours."""
    from matplotlib.colors import BoundaryNorm, ListedColormap

    rows, snapshots = states.shape
    mixed = rows > SHARP_ROWS
    # many pixels per snapshot, so that mixing does not blur the steps between snapshots
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


def states_legend(figure: "Figure", codes: "set[int]") -> None:
    """Add a legend with the colours of these states below the figure."""
    from matplotlib.patches import Patch

    patches = [Patch(facecolor=colour, edgecolor="0.6", linewidth=0.5, label=label)
               for code, (label, colour) in STATES.items() if code in codes]  # fmt: skip
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches), fontsize=8, frameon=False)
