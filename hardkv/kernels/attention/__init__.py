"""Attend new queries to a layer's tiers: the ragged condensed rows and the dense tail, merged by log-sum-exp."""

import difflib
import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor

from hardkv.kernels.attention import packages
from hardkv.kernels.attention.reference import attend, dense_allowed, merge, tiered_attention
from hardkv.kernels.attention.varlen import varlen_attention
from hardkv.kernels.backends import current, has_triton, kernels_for, why_not_triton
from hardkv.kernels.codes import Coding
from hardkv.kernels.rows import Rows

__all__ = [
    "BACKENDS",
    "attend",
    "attend_tiers",
    "backend_for",
    "check_backend",
    "dense_allowed",
    "merge",
    "tiered_attention",
]

BACKENDS = ("torch", "triton", "flash_attn")


def check_backend(attention: str) -> None:
    """Raise ValueError unless `attention` is "auto" or the name of a backend that is installed."""
    if attention not in ("auto", *BACKENDS):
        close = difflib.get_close_matches(str(attention).lower(), ("auto", *BACKENDS), n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"attention={attention!r} is not available.{hint} Allowed: 'auto', {', '.join(BACKENDS)}")
    if attention == "triton" and not has_triton():
        raise ValueError("attention='triton' needs Triton: pip install 'hardkv[triton]', or take attention='auto'")
    if attention == "flash_attn" and not packages.installed():
        raise ValueError(
            "attention='flash_attn' needs a flash_attn_varlen_func, of FlashAttention or of PyTorch's own "
            "torch.nn.attention.varlen: pip install 'hardkv[flash-attn]', or take attention='auto'"
        )


def backend_for(attention: str, device: torch.device, dtype: torch.dtype) -> str:
    """Return the attention backend for a device, given "auto" or a backend's name.

    "auto" means Triton where it runs. It was the fastest on every measured shape, for decoding and chunks, against
    FlashAttention-4 and PyTorch's varlen on an H200 (eval/results/kernels.md).

    Raises:
        ValueError: the backend cannot run there.
    """
    if attention == "auto":
        return kernels_for(device, dtype)
    if attention == "triton" and (reason := why_not_triton(device, dtype)):
        raise ValueError(f"attention='triton' cannot run here: {reason}; take attention='auto'")
    if attention == "flash_attn" and (device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16)):
        raise ValueError(
            f"attention='flash_attn' needs float16 or bfloat16 on a GPU, got {dtype} on {device.type!r}: take "
            "attention='auto'"
        )
    return attention


@cache
def _warn_of_decoding(backend: str) -> None:
    warnings.warn(
        f"attention={backend!r} does not read quantised tokens: hardkv decodes a layer's tokens at every step, so "
        "bits save memory here, but no time",
        stacklevel=2,
    )


def attend_tiers(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    rows: Rows,
    dense_keys: Tensor,
    dense_values: Tensor,
    dense_positions: Tensor,
    fill: Tensor,
    *,
    bound: int,
    start: int,
    scale: float,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    new_mask: Tensor | None = None,
    padded: bool = False,
    coding: Coding | None = None,
    attention: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attend `q` new queries to a condensed ragged tier and a dense tier that already holds the new tokens.

    Args:
        query: `[B, Hq, q, D]`, after RoPE.
        keys, values: condensed tier, `[N, D]` and `[N, Dv]`; rows: its rows; row b * H + h holds head h of sequence b.
        dense_keys, dense_values: `[B, H, C, D]` and `[B, H, C, Dv]`; dense_positions: int32 `[B, C]`.
        fill: int64 `[B]`, valid dense slots; bound: upper bound on fill, known on the host.
        start: column of the first new query.
        scale: factor on the dot products. softcap: as in `attend`.
        sinks: `[Hq]`, learned logits that take part in the softmax with zero output (GPT-OSS).
        new_mask: bool `[B or 1, q, q]`, mask among the new tokens; None means causal.
        padded: whether some new tokens may be padding, which is not stored.
        coding: how to read `keys` and `values` that are codes; None: they are states.
        attention: "auto" or a backend.

    Returns:
        `out [B, Hq, q, Dv]` in the query's dtype and `lse [B, Hq, q]` in the accumulation dtype.

    Raises:
        ValueError: the backend cannot run on these tensors.
    """
    backend = backend_for(attention, query.device, query.dtype)
    q_len = query.shape[2]
    options: dict[str, Any] = {"scale": scale, "softcap": softcap, "sinks": sinks}
    if backend == "torch" or new_mask is not None:
        mask = dense_allowed(dense_positions[:, :bound], fill, start, q_len, new_mask)
    if backend == "torch":
        dense = dense_keys[:, :, :bound], dense_values[:, :, :bound]
        return tiered_attention(query, keys, values, rows, *dense, mask, coding=coding, **options)
    tail = dense_keys, dense_values, dense_positions, fill
    options |= {"start": start, "bound": bound, "new_mask": None if new_mask is None else mask}
    if backend == "triton":
        from hardkv.kernels.attention.triton import ragged_attention

        with current(query):
            return ragged_attention(query, keys, values, rows, *tail, coding=coding, **options)
    if coding is not None:
        _warn_of_decoding(backend)
        keys, values = coding.decoded(keys, values, rows.cu_seqlens)
    return varlen_attention(query, keys, values, rows.cu_seqlens, rows.longest, *tail, padded=padded, **options)
