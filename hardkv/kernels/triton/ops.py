"""The kernels as `torch.ops.hardkv.*`, with fake implementations: what torch.compile traces in their place.

Calling through the dispatcher costs tens of microseconds a call, so eager code calls the launchers themselves.
"""

import torch
from torch import Tensor

from hardkv.kernels.triton import append as append_kernel
from hardkv.kernels.triton import attention, compaction, schedule, scoring, similarity


@torch.library.custom_op("hardkv::cut", mutates_args=("row_start", "first_row", "share"))
def cut(row_start: Tensor, first_row: Tensor, share: Tensor, cu_seqlens: Tensor, dense: int) -> None:
    """`schedule.cut`."""
    schedule.cut(row_start, first_row, share, cu_seqlens, dense)


@cut.register_fake
def _(*args: object) -> None:
    return None


@torch.library.custom_op("hardkv::ragged_attention", mutates_args=("arrived",))
def ragged_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    dense_keys: Tensor,
    dense_values: Tensor,
    dense_positions: Tensor,
    fill: Tensor,
    row_start: Tensor,
    first_row: Tensor,
    share: Tensor,
    arrived: Tensor,
    start: int,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    new_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`attention.launch` with the parts of its schedule."""
    parts = schedule.Schedule(row_start, first_row, share, arrived)
    tensors = query, keys, values, cu_seqlens, dense_keys, dense_values, dense_positions, fill
    return attention.launch(*tensors, parts, start=start, scale=scale, softcap=softcap, sinks=sinks, new_mask=new_mask)


@ragged_attention.register_fake
def _(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    dense_keys: Tensor,
    dense_values: Tensor,
    *rest: object,
) -> tuple[Tensor, Tensor]:
    return attention.outputs(query, dense_values)


@torch.library.custom_op("hardkv::window_attention", mutates_args=())
def window_attention(
    queries: Tensor,
    query_positions: Tensor,
    query_valid: Tensor,
    keys: Tensor,
    positions: Tensor,
    cu_seqlens: Tensor,
    num_kv_heads: int,
    scale: float,
    softcap: float | None,
    reduce: str,
    exclude: Tensor | None,
    sinks: Tensor | None,
) -> Tensor:
    """`scoring.window_attention`."""
    return scoring.window_attention(
        queries,
        query_positions,
        query_valid,
        keys,
        positions,
        cu_seqlens,
        num_kv_heads=num_kv_heads,
        scale=scale,
        softcap=softcap,
        reduce=reduce,  # type: ignore[arg-type]  # an operator's schema knows no literals
        exclude=exclude,
        sinks=sinks,
    )


@window_attention.register_fake
def _(queries: Tensor, query_positions: Tensor, query_valid: Tensor, keys: Tensor, *rest: object) -> Tensor:
    return keys.new_empty(keys.shape[0], dtype=torch.float32)


@torch.library.custom_op("hardkv::pool_rows", mutates_args=())
def pool_rows(score: Tensor, exclude: Tensor, cu_seqlens: Tensor, kernel_size: int, pooling: str) -> Tensor:
    """`scoring.pool_rows`."""
    return scoring.pool_rows(score, exclude, cu_seqlens, kernel_size=kernel_size, pooling=pooling)


@pool_rows.register_fake
def _(score: Tensor, *rest: object) -> Tensor:
    return torch.empty_like(score)


@torch.library.custom_op("hardkv::mean_cosine", mutates_args=())
def mean_cosine(keys: Tensor, cu_seqlens: Tensor, longest: int, threshold: float, eps: float) -> Tensor:
    """`similarity.mean_cosine`."""
    return similarity.mean_cosine(keys, cu_seqlens, longest, threshold=threshold, eps=eps)


@mean_cosine.register_fake
def _(keys: Tensor, *rest: object) -> Tensor:
    return keys.new_empty(keys.shape[0], dtype=torch.float32)


@torch.library.custom_op("hardkv::gather_tokens", mutates_args=())
def gather_tokens(sources: list[Tensor], address: Tensor) -> Tensor:
    """`compaction.gather_keys`."""
    return compaction.gather_keys(sources, address)


@gather_tokens.register_fake
def _(sources: list[Tensor], address: Tensor) -> Tensor:
    return sources[-1].new_empty(address.shape[0], sources[-1].shape[-1])


@torch.library.custom_op("hardkv::gather_tiers", mutates_args=())
def gather_tiers(
    keys: list[Tensor], values: list[Tensor], address: Tensor, index: Tensor, positions: Tensor, misses: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`compaction.gather_tiers`."""
    return compaction.gather_tiers(list(zip(keys, values, strict=True)), address, index, positions, misses)


@gather_tiers.register_fake
def _(
    keys: list[Tensor], values: list[Tensor], address: Tensor, index: Tensor, positions: Tensor, misses: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n = index.shape[0]
    return (
        keys[-1].new_empty(n, keys[-1].shape[-1]),
        values[-1].new_empty(n, values[-1].shape[-1]),
        positions.new_empty(n),
        misses.new_empty(n),
    )


@torch.library.custom_op("hardkv::compact", mutates_args=("held_keys", "held_values", "held_positions", "held_misses"))
def compact(
    held_keys: Tensor,
    held_values: Tensor,
    held_positions: Tensor,
    held_misses: Tensor,
    dense_keys: Tensor,
    dense_values: Tensor,
    cu_seqlens: Tensor,
    address: Tensor,
    index: Tensor,
    positions: Tensor,
    misses: Tensor,
) -> None:
    """`compaction.compact`."""
    held, dense = (held_keys, held_values, held_positions, held_misses), (dense_keys, dense_values)
    compaction.compact(held, dense, cu_seqlens, address, index, positions, misses)


@compact.register_fake
def _(*args: object) -> None:
    return None


@torch.library.custom_op("hardkv::append", mutates_args=("dense_keys", "dense_values", "dense_positions"))
def append(
    dense_keys: Tensor,
    dense_values: Tensor,
    dense_positions: Tensor,
    fill: Tensor,
    keys: Tensor,
    values: Tensor,
    start: int,
    valid: Tensor | None,
) -> Tensor:
    """`append.append`."""
    return append_kernel.append(dense_keys, dense_values, dense_positions, fill, keys, values, start, valid)


@append.register_fake
def _(dense_keys: Tensor, dense_values: Tensor, dense_positions: Tensor, fill: Tensor, *rest: object) -> Tensor:
    return torch.empty_like(fill)


@torch.library.custom_op(
    "hardkv::append_step", mutates_args=("dense_keys", "dense_values", "dense_positions", "fill", "ring")
)
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
    """`append.append_step`."""
    append_kernel.append_step(dense_keys, dense_values, dense_positions, fill, ring, column, query, keys, values)


@append_step.register_fake
def _(*args: object) -> None:
    return None
