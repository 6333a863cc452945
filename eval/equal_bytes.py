"""Comparison at equal bytes: figures between two measured sizes, linear in the logarithm of bytes."""

from collections.abc import Sequence

import numpy as np

# Within so much of TopK's bytes a method used as many; up to so much beyond its budgets it is still compared.
SAME_BYTES = 0.01
NEAR_BYTES = 0.05


def between(sizes: Sequence[float], nbytes: float) -> tuple[int, float] | None:
    """Find where so many bytes lie among sizes.

    Args:
        sizes: bytes, ascending.

    Returns:
        The index of the size below, and the share of the figure at the next size: with share s the figure at `nbytes`
        is (1 - s) times the one below plus s times the next. None where all sizes are larger, or all smaller.
    """
    for below in range(len(sizes) - 1):
        low, high = sizes[below : below + 2]
        if low <= nbytes <= high:
            return below, float(np.log(nbytes / low) / np.log(high / low)) if high > low else 0.0
    return None
