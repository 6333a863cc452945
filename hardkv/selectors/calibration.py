"""The earlier import path of `fit_temperatures`."""

from hardkv.selectors.temperatures import fit_temperatures

__all__ = ["fit_temperatures"]
