"""Pictures. They need matplotlib, `pip install 'hardkv[viz]'`, which is imported when one is drawn."""

from hardkv.viz.calibration import plot_calibration
from hardkv.viz.lengths import plot_lengths

__all__ = ["plot_calibration", "plot_lengths"]
