"""The PyTorch references of `append` and `append_step`."""

import torch
from torch import Tensor


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
        # valid tokens first: padding is written after the new fill, never counts, and is overwritten next time
        order = torch.argsort(valid.logical_not().to(torch.uint8), dim=1, stable=True)
        new_fill = fill + valid.sum(1)
        keys, values = keys[sequence, order], values[sequence, order]
    dense_keys[sequence, :, slot] = keys
    dense_values[sequence, :, slot] = values
    dense_positions[sequence, slot] = (start + order).to(torch.int32)
    return new_fill


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
