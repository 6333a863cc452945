"""Pictures of what a cache holds. They need `pip install 'hardkv[viz]'`, which is imported when one is drawn.

Those of matplotlib return a closed figure, which a notebook shows as a cell's last value; `show_tokens` and `explore`
return HTML.
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
