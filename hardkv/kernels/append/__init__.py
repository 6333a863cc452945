"""New tokens into a rectangular buffer with a fill per sequence, in place; of a captured step, its queries too."""

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
