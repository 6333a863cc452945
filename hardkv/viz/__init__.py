"""Pictures of what a cache holds. Drawing one imports the packages of `pip install 'hardkv[viz]'`.

The `plot_` functions return a closed figure of matplotlib, which a notebook shows as the last value of a cell;
`show_tokens` and `explore` return HTML.
"""

from hardkv.viz.calibration import plot_calibration
from hardkv.viz.explore import explore
from hardkv.viz.html import Html
from hardkv.viz.lengths import plot_lengths
from hardkv.viz.mass import plot_mass
from hardkv.viz.memory import plot_bytes
from hardkv.viz.tiers import plot_kept, plot_tiers, plot_token
from hardkv.viz.tokens import show_tokens

__all__ = [
    "Html",
    "explore",
    "plot_bytes",
    "plot_calibration",
    "plot_kept",
    "plot_lengths",
    "plot_mass",
    "plot_tiers",
    "plot_token",
    "show_tokens",
]
