"""Append new tokens in place to a rectangular buffer with one fill per sequence; a captured step stores queries too."""

from torch import Tensor

from hardkv.kernels.append.reference import append_reference, append_step_reference
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
    """Write new tokens in order after the filled slots of every sequence.

    Args:
        dense_keys: `[B, H, C, D]`; dense_values: `[B, H, C, Dv]`; dense_positions: int32 `[B, C]`; written in place;
            slots after the new fill may be overwritten too.
        fill: int64 `[B]`, filled slots per sequence; all new tokens must fit after them.
        keys: `[B, H, q, D]`; values: `[B, H, q, Dv]`; start: position of the first column.
        valid: bool `[B, q]`, the tokens to write; None means all.

    Returns:
        The new fill, int64 `[B]`.
    """
    if kernels_for(keys.device, keys.dtype) == "triton":
        from hardkv.kernels.append import triton as kernel

        with current(keys):
            return kernel.append(dense_keys, dense_values, dense_positions, fill, keys, values, start, valid)
    return append_reference(dense_keys, dense_values, dense_positions, fill, keys, values, start, valid)


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
    """Write one token per sequence, in place and without the host, so that a graph can capture it.

    Args:
        dense_keys, dense_values, dense_positions: as in `append`; written at every sequence's fill.
        fill: int64 `[B]`, increased by one in place; one slot must be free.
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
