"""New tokens into a rectangular buffer with a fill per sequence, in place; of a captured step, its queries too."""

import torch
from torch import Tensor

from hardkv.kernels.backends import current, kernels_for


def append(
    dense_keys: Tensor,
    dense_values: Tensor,
    dense_positions: Tensor,
    fill: Tensor,
    keys: Tensor,
    values: Tensor,
    start: int,
    valid: Tensor | None = None,
) -> Tensor:
    """Write new tokens behind every sequence's fill, in their order.

    Args:
        dense_keys: `[B, H, C, D]`; dense_values: `[B, H, C, Dv]`; dense_positions: int32 `[B, C]`; written in place,
            and what lies behind the new fill may be written too.
        fill: int64 `[B]`, with room for all new tokens behind it.
        keys: `[B, H, q, D]`; values: `[B, H, q, Dv]`; start: position of their first column.
        valid: bool `[B, q]`, which of them to take, all when None.

    Returns:
        The new fill, int64 `[B]`.
    """
    if kernels_for(keys.device, keys.dtype) == "triton":
        from hardkv.kernels.append import triton as kernel

        with current(keys):
            return kernel.append(dense_keys, dense_values, dense_positions, fill, keys, values, start, valid)
    return append_reference(dense_keys, dense_values, dense_positions, fill, keys, values, start, valid)


def append_reference(
    dense_keys: Tensor,
    dense_values: Tensor,
    dense_positions: Tensor,
    fill: Tensor,
    keys: Tensor,
    values: Tensor,
    start: int,
    valid: Tensor | None = None,
) -> Tensor:
    """The PyTorch reference of `append`."""
    batch, _, q_len, _ = keys.shape
    column = torch.arange(q_len, device=keys.device)
    slot = fill[:, None] + column  # [B, q]
    sequence = torch.arange(batch, device=keys.device)[:, None]
    keys, values = keys.transpose(1, 2), values.transpose(1, 2)
    order, new_fill = column.expand(batch, -1), fill + q_len
    if valid is not None:
        # valid tokens first: what padding writes behind the new fill never counts, and is overwritten next time
        order = torch.argsort(valid.logical_not().to(torch.uint8), dim=1, stable=True)
        new_fill = fill + valid.sum(1)
        keys, values = keys[sequence, order], values[sequence, order]
    dense_keys[sequence, :, slot] = keys
    dense_values[sequence, :, slot] = values
    dense_positions[sequence, slot] = (start + order).to(torch.int32)
    return new_fill


def append_step(
    dense_keys: Tensor,
    dense_values: Tensor,
    dense_positions: Tensor,
    fill: Tensor,
    ring: Tensor,
    column: Tensor,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
) -> None:
    """One token of every sequence, all in place and without the host: for captured graphs.

    Args:
        dense_keys, dense_values, dense_positions: as in `append`; written at every sequence's fill.
        fill: int64 `[B]`, one more afterwards; there must be room.
        ring: `[B, Hq, W, D]`, written at `column % W`. column: int64 `[1]`, position of the token.
        query: `[B, Hq, 1, D]`; keys: `[B, H, 1, D]`; values: `[B, H, 1, Dv]`.
    """
    tensors = dense_keys, dense_values, dense_positions, fill, ring, column, query, keys, values
    if kernels_for(keys.device, keys.dtype) == "triton":
        from hardkv.kernels.append import triton as kernel

        with current(keys):
            kernel.append_step(*tensors)
    else:
        append_step_reference(*tensors)


def append_step_reference(
    dense_keys: Tensor,
    dense_values: Tensor,
    dense_positions: Tensor,
    fill: Tensor,
    ring: Tensor,
    column: Tensor,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
) -> None:
    """The PyTorch reference of `append_step`."""
    sequence = torch.arange(fill.shape[0], device=fill.device)
    dense_keys[sequence, :, fill] = keys[:, :, 0]
    dense_values[sequence, :, fill] = values[:, :, 0]
    dense_positions[sequence, fill] = column.to(torch.int32)
    fill += 1
    ring.index_copy_(2, column % ring.shape[2], query)
