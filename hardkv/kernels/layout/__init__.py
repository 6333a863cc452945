"""Compute where every held token of a layer is stored, and which tier it goes to."""

import torch
from torch import Tensor

from hardkv.kernels.backends import current, kernels_for
from hardkv.kernels.layout.reference import assign_reference, layout_reference
from hardkv.kernels.rows import Rows


def layout(
    rows: Rows,
    older: Tensor,
    order: Tensor | None,
    positions: Tensor,
    misses: Tensor,
    dense_positions: Tensor,
    fill: Tensor,
    *,
    capacity: int,
    window: int,
    sinks: int,
    pinned: int,
    front: int,
) -> tuple[Tensor, ...]:
    """List every row's tokens: first dense slots below `front`, then its ragged tokens, then its other dense ones.

    Args:
        rows: rows of the result; N tokens, ragged and dense together.
        older: int32 `[R + 1]`, where the rows of the M ragged tokens begin and end.
        order: int64 `[M]`, which ragged token comes at each place; None means unchanged.
        positions: int32 `[M]`; misses: uint8 `[M]`.
        dense_positions: int32 `[B, C]`; fill: int64 `[B]`, valid dense slots. capacity: C.
        window, sinks: newest and first tokens per row to protect. pinned: positions below it are protected too.
        front: slots of the dense tier whose tokens are older than the ragged ones.

    Returns:
        For every token, `[N]`: position (int32), misses (uint8, 0 for dense ones), address in the ragged tokens and
        then the dense slots (int64), whether it is among the first `front` or the newest `window` dense ones, among
        the newest `window` of its row, and whether it is protected.
    """
    tensors = rows, older, order, positions, misses, dense_positions, fill
    if kernels_for(positions.device, torch.float32) == "triton":
        from hardkv.kernels.layout import triton as kernel

        with current(positions):
            return kernel.layout(*tensors, capacity, window, sinks, pinned, front)
    return layout_reference(*tensors, capacity, window, sinks, pinned, front)


def assign(
    keep: Tensor, stays: Tensor, misses: Tensor, rows: Rows, patience: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Assign a tier to every token.

    Args:
        keep: bool `[N]`, selected tokens. stays: bool `[N]`, selected tokens that stay in the dense tier.
        misses: uint8 `[N]`, consecutive events before this one that did not select the token.
        rows: rows of the tokens. patience: misses that a token survives, at most 254.

    Returns:
        Updated misses (uint8 `[N]`), tokens of the condensed and of the sparse tier (bool `[N]` each), and how many
        of them each row has, int32 `[2, R]`.
    """
    if kernels_for(keep.device, torch.float32) == "triton":
        from hardkv.kernels.layout import triton as kernel

        with current(keep):
            return kernel.assign(keep, stays, misses, rows, patience)
    return assign_reference(keep, stays, misses, rows, patience)
