"""`fit_temperatures` under its earlier path."""

from hardkv.selectors.temperatures import fit_temperatures

__all__ = ["fit_temperatures"]
