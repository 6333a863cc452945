"""New tokens into a rectangular buffer with a fill per sequence, in place."""

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
    start: int | Tensor,
    valid: Tensor | None = None,
    out_fill: Tensor | None = None,
) -> Tensor:
    """Write new tokens behind every sequence's fill, in their order.

    Args:
        dense_keys: `[B, H, C, D]`; dense_values: `[B, H, C, Dv]`; dense_positions: int32 `[B, C]`; written in place,
            and what lies behind the new fill may be written too.
        fill: int64 `[B]`, with room for all new tokens behind it.
        keys: `[B, H, q, D]`; values: `[B, H, q, Dv]`.
        start: position of their first column, or an int64 tensor `[1]` on the device, for captured graphs.
        valid: bool `[B, q]`, which of them to take, all when None.
        out_fill: where the new fill goes, made when None; it may be `fill`.

    Returns:
        The new fill, int64 `[B]`.
    """
    if kernels_for(keys.device, keys.dtype) == "triton":
        from hardkv.kernels.triton import append as kernel
        from hardkv.kernels.triton import ops

        with current(keys):
            tensors = dense_keys, dense_values, dense_positions, fill, keys, values
            if torch.compiler.is_compiling() and not isinstance(start, Tensor):
                new_fill = ops.append(*tensors, start, valid)
            else:
                return kernel.append(*tensors, start, valid, out_fill=out_fill)
    else:
        new_fill = append_reference(dense_keys, dense_values, dense_positions, fill, keys, values, start, valid)
    return new_fill if out_fill is None else out_fill.copy_(new_fill)


def append_reference(
    dense_keys: Tensor,
    dense_values: Tensor,
    dense_positions: Tensor,
    fill: Tensor,
    keys: Tensor,
    values: Tensor,
    start: int | Tensor,
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
