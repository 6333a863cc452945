"""Compare the output of an operation with the reference's."""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from torch import Tensor

from hardkv.kernels import append, attention, compaction, layout, scoring, similarity
from hardkv.kernels.rows import Rows

# A larger relative error counts as wrong; bfloat16 products have errors of a few thousandths.
TOLERANCE = 1e-2


@contextmanager
def reference_kernels() -> Iterator[None]:
    """Make hardkv's operations run their PyTorch references, as without Triton."""
    with ExitStack() as stack:
        for module in (append, attention, compaction, layout, scoring, similarity):
            stack.enter_context(patch.object(module, "kernels_for", lambda *args: "torch"))
        yield


def spot_rows(rows: Rows) -> list[tuple[int, slice]]:
    """Return the rows, with their tokens, for checking an output: the shortest, the longest, the first, the last."""
    lengths, bounds = rows.lengths.tolist(), rows.cu_seqlens.tolist()
    last = len(lengths) - 1
    chosen = {lengths.index(min(lengths)), lengths.index(max(lengths)), 0, last}
    return [(row, slice(bounds[row], bounds[row + 1])) for row in sorted(chosen)]


def relative_error(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Return the norm of found minus expected over the norm of expected, over all pairs together."""
    off = sum(float((found.double() - expected.double()).square().sum()) for found, expected in pairs)
    return math.sqrt(off / max(sum(float(expected.double().square().sum()) for _, expected in pairs), 1e-300))


def inexact(pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Return 0 if everything found equals the expected, else infinity."""
    return 0.0 if all(torch.equal(found, expected) for found, expected in pairs) else math.inf
