"""The PyTorch references of `layout` and `assign`."""

import torch
from torch import Tensor

from hardkv.kernels.rows import Rows, count_per_row


def layout_reference(
    rows: Rows,
    older: Tensor,
    order: Tensor | None,
    positions: Tensor,
    misses: Tensor,
    dense_positions: Tensor,
    fill: Tensor,
    capacity: int,
    window: int,
    sinks: int,
    pinned: int,
    front: int,
) -> tuple[Tensor, ...]:
    """The PyTorch reference of `layout`."""
    row, offset = rows.ids, positions.shape[0]
    sequence = row // ((rows.cu_seqlens.shape[0] - 1) // fill.shape[0])
    token = torch.arange(rows.total, device=row.device) - rows.cu_seqlens[:-1].long()[row]
    ahead = fill.clamp_max(front)[sequence]
    slot = token - torch.where(token < ahead, 0, older.diff()[row])  # slot in the dense tier
    is_dense = (token < ahead) | (slot >= ahead)
    held = slot.clamp_min(0)
    place = (older[:-1].long()[row] + token - ahead).clamp(0, max(offset - 1, 0))
    position, missed = dense_positions[sequence, held], torch.zeros_like(row, dtype=torch.uint8)
    if offset:
        place = place if order is None else order[place]
        position = torch.where(is_dense, position, positions[place])
        missed = torch.where(is_dense, missed, misses[place])
    address = torch.where(is_dense, offset + row * capacity + held, place)
    stays = is_dense & ((slot < ahead) | (slot >= (fill - window)[sequence]))
    window_mask = token >= rows.lengths[row] - window
    protected = window_mask | (token < sinks) | (position < pinned)
    return position, missed, address, stays, window_mask, protected


def assign_reference(
    keep: Tensor, stays: Tensor, misses: Tensor, rows: Rows, patience: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The PyTorch reference of `assign`."""
    counted = torch.where(keep, 0, misses + 1).to(torch.uint8)
    condensed, sparse = keep & ~stays, ~keep & (counted <= patience)
    lengths = [count_per_row(chosen, rows.cu_seqlens).to(torch.int32) for chosen in (condensed, sparse)]
    return counted, condensed, sparse, torch.stack(lengths)
