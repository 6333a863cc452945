"""Fakes of the FlashAttention packages.

Functions in PyTorch with the signatures, layouts, checks and oddities of the real packages' `flash_attn_varlen_func`,
as read from their sources.
"""

from typing import NamedTuple

import torch
from torch.utils._python_dispatch import _disable_current_modes

INF, NAN = float("inf"), float("nan")


class Contract(NamedTuple):
    """Hold the checks and behaviour that all fakes share, and the differences between the packages."""

    unseen_out: float  # the output for queries that see no key
    unseen_lse: float
    any_value_dim: bool = False
    tile: int = 0  # values after a sequence's end are multiplied by 0, not skipped
    swaps: bool = False  # treats one query with several heads as several queries with one head, like FlashAttention-2


FLASH_2 = Contract(unseen_out=0.0, unseen_lse=INF, swaps=True)
FLASH_3 = Contract(unseen_out=0.0, unseen_lse=-INF, tile=128)
FLASH_4 = Contract(unseen_out=NAN, unseen_lse=NAN, any_value_dim=True, tile=128)


def check(contract, q, k, v, cu_q, cu_k, max_q, max_k):
    """Check what the packages' sources check, or assume without checking."""
    assert q.dtype in (torch.float16, torch.bfloat16)
    assert k.dtype == v.dtype == q.dtype
    assert q.dim() == k.dim() == v.dim() == 3
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    assert k.shape[:2] == v.shape[:2]
    assert q.shape[1] % k.shape[1] == 0
    assert k.shape[2] == q.shape[2]
    assert v.shape[2] == q.shape[2] or contract.any_value_dim
    for dim in (q.shape[2], v.shape[2]):
        assert dim % 8 == 0
        assert 0 < dim <= 256
    assert cu_q.shape == cu_k.shape
    for cu, tokens, longest in ((cu_q, q.shape[0], max_q), (cu_k, k.shape[0], max_k)):
        assert cu.dtype == torch.int32
        assert cu.is_contiguous()
        assert cu[0] == 0
        assert cu[-1] == tokens
        assert type(longest) is int
        assert cu.diff().min() >= 0
        assert cu.diff().max() <= longest


def fake_attention(contract, q, k, v, cu_q, cu_k, max_q, max_k, *, scale, causal, softcap):
    """Compute `out [total_q, G, Dv]` and `lse [G, total_q]`, one sequence after another."""
    with _disable_current_modes():  # this would happen on a device
        check(contract, q, k, v, cu_q, cu_k, max_q, max_k)
        batch, (_, heads, head_dim), kv_heads = cu_q.shape[0] - 1, q.shape, k.shape[1]
        if contract.swaps and max_q == 1 and heads > kv_heads:
            q.reshape(batch, kv_heads, heads // kv_heads, head_dim)  # fails for a sequence without a query
        out = torch.full((*q.shape[:2], v.shape[2]), contract.unseen_out, dtype=q.dtype)
        lse = torch.full((heads, q.shape[0]), contract.unseen_lse)
        starts_q, starts_k = cu_q.tolist(), cu_k.tolist()
        for sequence in range(batch):
            first, last = starts_k[sequence : sequence + 2]
            behind = v[last : last + contract.tile].double()  # [n, heads of k, Dv]
            for at in range(*starts_q[sequence : sequence + 2]):
                stop = last - (starts_q[sequence + 1] - 1 - at) if causal else last
                if stop <= first:
                    continue
                for head in range(heads):
                    kv_head = head // (heads // kv_heads)
                    logits = k[first:stop, kv_head].double() @ q[at, head].double() * scale
                    if softcap:
                        logits = softcap * torch.tanh(logits / softcap)
                    weights = torch.softmax(logits, 0)
                    found = weights @ v[first:stop, kv_head].double() + (0.0 * behind[:, kv_head]).sum(0)
                    out[at, head], lse[head, at] = found.to(q.dtype), torch.logsumexp(logits, 0)
        return out, lse


def flash_attn_2(calls):
    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
        return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        calls.append(max_seqlen_q)
        assert dropout_p == 0.0
        assert window_size == (-1, -1)
        tensors = q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        out, lse = fake_attention(FLASH_2, *tensors, scale=softmax_scale, causal=causal, softcap=softcap)
        return (out, lse, None) if return_attn_probs else out

    return {"flash_attn_varlen_func": flash_attn_varlen_func}


def flash_attn_3(calls):
    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
        softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
        window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
        sm_margin=0, return_attn_probs=False,
    ):  # fmt: skip
        calls.append(max_seqlen_q)
        assert num_splits == 0
        tensors = q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        out, lse = fake_attention(FLASH_3, *tensors, scale=softmax_scale, causal=causal, softcap=softcap)
        return (out, lse) if return_attn_probs else out

    return {"flash_attn_varlen_func": flash_attn_varlen_func}


def flash_attn_3_early(calls, returns_lse=True):
    """Fake versions before July 2025, which always return the lse, or from July to August 2025, which never do."""

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
        softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None,
        window_size=(-1, -1), attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False,
        sm_margin=0,
    ):  # fmt: skip
        calls.append(max_seqlen_q)
        tensors = q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        out, lse = fake_attention(FLASH_3, *tensors, scale=softmax_scale, causal=causal, softcap=softcap)
        return (out, lse) if returns_lse else out

    return {"flash_attn_varlen_func": flash_attn_varlen_func}


def flash_attn_4(calls):
    def flash_attn_varlen_func(
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
        min_seqlen_k=None, seqused_q=None, seqused_k=None, gather_kv_indices=None, page_table=None,
        softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1,
        pack_gqa=None, deterministic=False, score_mod=None, score_mod_bwd=None, mask_mod=None,
        block_sparse_tensors=None, aux_tensors=None, aux_scalars=None, return_lse=False, scheduler_metadata=None,
        seqlen_k_per_split=None, disable_scheduler_metadata=False, gather_bwd_recompute_p=False,
        gather_bwd_token_chunk=None,
    ):  # fmt: skip
        calls.append(max_seqlen_q)
        assert qv is None
        assert num_splits == 1
        tensors = q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        out, lse = fake_attention(FLASH_4, *tensors, scale=softmax_scale, causal=causal, softcap=softcap)
        return out, lse if return_lse else None

    return {"flash_attn_varlen_func": flash_attn_varlen_func}


class AuxRequest(NamedTuple):
    lse: bool = False


def torch_varlen(calls):
    """Fake PyTorch 2.12 and later."""

    def varlen_attn(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
        enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
    ):  # fmt: skip
        calls.append(max_q)
        assert window_size in ((-1, -1), (-1, 0))
        assert enable_gqa or query.shape[1] == key.shape[1]
        tensors = query, key, value, cu_seq_q, cu_seq_k, max_q, max_k
        out, lse = fake_attention(FLASH_2, *tensors, scale=scale, causal=window_size == (-1, 0), softcap=None)
        return (out, lse) if return_aux is not None and return_aux.lse else out

    return {"varlen_attn": varlen_attn, "AuxRequest": AuxRequest}


def torch_varlen_2_11(calls):
    """Fake PyTorch 2.11, which has no `enable_gqa` and accepts fewer heads of k and v without it."""

    def varlen_attn(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
    ):
        calls.append(max_q)
        tensors = query, key, value, cu_seq_q, cu_seq_k, max_q, max_k
        out, lse = fake_attention(FLASH_2, *tensors, scale=scale, causal=window_size == (-1, 0), softcap=None)
        return (out, lse) if return_aux is not None and return_aux.lse else out

    return {"varlen_attn": varlen_attn, "AuxRequest": AuxRequest}


FAKES = {
    "flash_attn_2": flash_attn_2,
    "flash_attn_3": flash_attn_3,
    "flash_attn_3 before July 2025": flash_attn_3_early,
    "flash_attn_4": flash_attn_4,
    "torch_varlen": torch_varlen,
    "torch_varlen 2.11": torch_varlen_2_11,
}
