"""Measure how much the last queries attend to held tokens: window queries x ragged keys -> one number per token."""

from torch import Tensor

from hardkv.kernels.autocast import suspended
from hardkv.kernels.backends import current, kernels_for
from hardkv.kernels.rows import Rows
from hardkv.kernels.scoring.reference import Reduce, pool_rows_reference, window_attention_reference


def window_attention(
    queries: Tensor,
    query_positions: Tensor,
    query_valid: Tensor,
    keys: Tensor,
    positions: Tensor,
    rows: Rows,
    *,
    num_kv_heads: int,
    scale: float,
    softcap: float | None = None,
    reduce: Reduce = "mean",
    exclude: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Return the attention that each token of each row receives, averaged over the valid queries.

    Args:
        queries: `[B, Hq, W, D]`, after RoPE. query_positions: int64 `[W]`, the queries' columns.
        query_valid: bool `[B, W]`; padded queries do not count.
        keys: `[N, D]`; positions: int32 `[N]`; rows: rows of the keys.
        num_kv_heads: H; row b * H + h holds head h of sequence b.
        scale, softcap: as in the model's attention.
        reduce: over the G query heads of a group: "mean" or "max" of the averaged probabilities, or "max_logits":
            the largest logit of the group before one shared softmax (R-KV). "mean_square": the mean over queries and
            group of the squared probabilities.
        exclude: bool `[N]`, tokens left out of the softmax; they receive 0.
        sinks: `[Hq]`, learned logits that take part in the softmax (GPT-OSS).

    Returns:
        `[N]` in the accumulation dtype (float32 or float64).
    """
    tensors = queries, query_positions, query_valid, keys, positions
    if kernels_for(keys.device, keys.dtype, keys.shape[1]) == "triton":
        from hardkv.kernels.scoring import triton as kernel

        with current(keys):
            return kernel.window_attention(
                *tensors,
                rows.cu_seqlens,
                num_kv_heads=num_kv_heads,
                scale=scale,
                softcap=softcap,
                reduce=reduce,
                exclude=exclude,
                sinks=sinks,
            )
    with suspended(keys.device):
        return window_attention_reference(*tensors, rows, num_kv_heads, scale, softcap, reduce, exclude, sinks)


def pool_rows(score: Tensor, exclude: Tensor, rows: Rows, *, kernel_size: int, pooling: str) -> Tensor:
    """Smooth scores along each row.

    Args:
        score: `[N]`, >= 0. exclude: bool `[N]`, tokens that count as 0 and get 0. rows: rows of the tokens.
        kernel_size: odd. pooling: "max" or "avg" (zeros beyond the ends of the row count).

    Returns:
        `[N]` in score's dtype.
    """
    if kernels_for(score.device, score.dtype) == "triton":
        from hardkv.kernels.scoring import triton_pooling as kernel

        with current(score):
            return kernel.pool_rows(score, exclude, rows.cu_seqlens, kernel_size=kernel_size, pooling=pooling)
    return pool_rows_reference(score, exclude, rows, kernel_size, pooling)
