"""Compare at equal bytes: interpolate figures between two measured sizes, linearly in the logarithm of bytes."""

from collections.abc import Sequence

import numpy as np

# Relative difference within which two methods use equal bytes, and the most beyond TopK's budgets still compared.
SAME_BYTES = 0.01
NEAR_BYTES = 0.05


def between(sizes: Sequence[float], nbytes: float) -> tuple[int, float] | None:
    """Find the position of `nbytes` among sizes.

    Args:
        sizes: bytes, ascending.

    Returns:
        The index of the size below, and the share s of the figure at the next size: the figure at `nbytes`
        is (1 - s) times the figure below plus s times the next one. None if all sizes are larger, or all smaller.
    """
    for below in range(len(sizes) - 1):
        low, high = sizes[below : below + 2]
        if low <= nbytes <= high:
            return below, float(np.log(nbytes / low) / np.log(high / low)) if high > low else 0.0
    return None
