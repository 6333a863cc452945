"""Attention over both tiers through an installed package's variable-length FlashAttention, merged by lse.

Every row is one sequence of one KV head and G query heads. A package is called once for the condensed rows and once
for the dense tier, whose rows have gaps behind their fill: a gap is a sequence of its own, without queries, so that
the buffer is read where it lies and no length is read on the host.

| package        | splits long rows among programs     | softcap | Dv  | reads behind a row's end |
| -------------- | ----------------------------------- | ------- | --- | ------------------------ |
| `flash_attn_3` | as it sees fit                      | yes     | D   | yes                      |
| `flash_attn_2` | condensed ones, if q is 1 and G > 1 | yes     | D   | no                       |
| `flash_attn_4` | no: on Hopper its beta cannot       | yes     | any | yes                      |
| `torch_varlen` | as `flash_attn_2`: a copy of it     | no      | D   | no                       |

All take fp16 and bf16, and head dimensions that are multiples of 8 up to 256. Behind a row's end lies the next row, or
a gap with anything in it. Packages that read values there multiply them by 0, and 0 * NaN is NaN: for these the dense
tier is copied without what is in its gaps, and a condensed row that overflowed reaches the one before it. (PyTorch's
becomes such a package once `torch.nn.attention.activate_flash_attention_impl` is called, but is not treated as one.)
"""

import importlib
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from hardkv.kernels.attention.reference import attend, dense_allowed, merge

DTYPES = (torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 256


@cache
def _takes(function: Callable, parameter: str) -> bool:
    """Whether a function has a parameter: packages' versions differ."""
    return parameter in inspect.signature(function).parameters


def _flash_attn_2(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    scale: float,
    causal: bool,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """`q [total_q, G, D]`, `k [total_k, 1, D]`, `v [total_k, 1, Dv]` -> `out [total_q, G, Dv]`, `lse [total_q, G]`.

    All adapters have this signature. With `causal`, a sequence's last query sees all its keys.
    """
    out, lse, _ = PACKAGES["flash_attn_2"].load()(
        q, k, v, cu_q, cu_k, max_q, max_k,
        softmax_scale=scale, causal=causal, softcap=softcap or 0.0, return_attn_probs=True,
    )  # fmt: skip
    return out, lse.t()


def _flash_attn_3(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    scale: float,
    causal: bool,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    function = PACKAGES["flash_attn_3"].load()
    # Up to July 2025 it always returned the lse; since August 2025 it does when asked; in between it could not.
    ask = {"return_attn_probs": True} if _takes(function, "return_attn_probs") else {}
    result = function(
        q, k, v, cu_q, cu_k, max_seqlen_q=max_q, max_seqlen_k=max_k,
        softmax_scale=scale, causal=causal, softcap=softcap or 0.0, num_splits=0, **ask,
    )  # fmt: skip
    if not isinstance(result, tuple):
        raise RuntimeError(
            "this FlashAttention-3, of July or August 2025, does not return the lse: install a newer one"
        )
    return result[0], result[1].t()


def _flash_attn_4(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    scale: float,
    causal: bool,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    out, lse = PACKAGES["flash_attn_4"].load()(
        q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=max_q, max_seqlen_k=max_k,
        softmax_scale=scale, causal=causal, softcap=softcap or 0.0, return_lse=True,
    )  # fmt: skip
    return out, lse.t()


def _torch_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    max_q: int,
    max_k: int,
    scale: float,
    causal: bool,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    package = PACKAGES["torch_varlen"]
    function = package.load()
    aux = importlib.import_module(package.module).AuxRequest(lse=True)
    # PyTorch 2.11 takes fewer heads of k and v as they come, later versions want to be told.
    gqa = {"enable_gqa": True} if _takes(function, "enable_gqa") else {}
    window = (-1, 0) if causal else (-1, -1)
    out, lse = function(q, k, v, cu_q, cu_k, max_q, max_k, return_aux=aux, scale=scale, window_size=window, **gqa)
    return out, lse.t()  # [G, total_q], whatever its documentation says


@dataclass(frozen=True)
class Package:
    """How to call an installed package, and what it cannot do."""

    attend: Callable[
        [Tensor, Tensor, Tensor, Tensor, Tensor, int, int, float, bool, float | None], tuple[Tensor, Tensor]
    ]
    module: str
    function: str = "flash_attn_varlen_func"
    parameter: str = "causal"  # one that the function's versions before those supported do not have
    softcap: bool = True
    any_value_dim: bool = False  # Dv may differ from D
    whole_tiles: bool = False  # reads values behind a row's end

    def load(self) -> Callable:
        """The package's function; None where a module of that name has none."""
        return getattr(importlib.import_module(self.module), self.function, None)  # type: ignore[return-value]


# In order of preference. FlashAttention-3 is built for the cards it is fastest on; FlashAttention-4 is in beta and
# compiles at the first call; PyTorch's copy comes last since it is always there, whatever the user installed.
PACKAGES = {
    "flash_attn_3": Package(_flash_attn_3, "flash_attn_interface", whole_tiles=True),
    "flash_attn_2": Package(_flash_attn_2, "flash_attn", parameter="softcap"),
    "flash_attn_4": Package(
        _flash_attn_4, "flash_attn.cute", parameter="return_lse", any_value_dim=True, whole_tiles=True
    ),
    "torch_varlen": Package(
        _torch_varlen, "torch.nn.attention.varlen", "varlen_attn", parameter="window_size", softcap=False
    ),
}


@cache
def installed() -> tuple[str, ...]:
    """The packages that can be imported here, in order of preference; a broken one is warned of once."""
    found = []
    for name, package in PACKAGES.items():
        try:
            function = package.load()
        except ModuleNotFoundError:
            continue
        except Exception as error:  # whatever a binary built for another PyTorch raises
            warnings.warn(f"{name} is installed but cannot be imported, so it is not used: {error!r}", stacklevel=2)
            continue
        if function is None or not _takes(function, package.parameter):
            continue  # a namespace left by another package, or a version from before the lse was returned
        if name == "torch_varlen" and not torch.backends.cuda.is_flash_attention_available():
            continue
        found.append(name)
    return tuple(found)


def refusal(name: str, dtype: torch.dtype, head_dim: int, value_dim: int, softcap: float | None) -> str | None:
    """Why a package cannot attend such inputs; None when it can."""
    package = PACKAGES[name]
    if dtype not in DTYPES:
        return f"{name} takes torch.float16 and torch.bfloat16, but the query has dtype={dtype}"
    for dim in (head_dim, value_dim):
        if dim % 8 or not 8 <= dim <= MAX_HEAD_DIM:
            return f"{name} takes head dimensions that are multiples of 8 up to {MAX_HEAD_DIM}, but one is {dim}"
    if head_dim != value_dim and not package.any_value_dim:
        return f"{name} takes values as wide as keys, but keys have {head_dim} and values {value_dim} dimensions"
    if softcap is not None and not package.softcap:
        return f"{name} has no softcap, but softcap={softcap}"
    return None


def resolve_package(
    package: str | None, dtype: torch.dtype, head_dim: int, value_dim: int, softcap: float | None
) -> str:
    """The package that attends such inputs: the named one, or the first installed one that can.

    Raises:
        ValueError: it is not installed, or cannot.
    """
    if package is not None and package not in PACKAGES:
        raise ValueError(f"package={package!r} is not known. Allowed: None, {', '.join(map(repr, PACKAGES))}")
    available = installed()
    if not available or (package is not None and package not in available):
        raise ValueError(
            f"package={package!r} is not installed; installed: {', '.join(map(repr, available)) or 'none'}. "
            "Install one (pip install 'hardkv[flash-attn]'), or use attention='torch'"
        )
    reasons = []
    for name in available if package is None else (package,):
        reason = refusal(name, dtype, head_dim, value_dim, softcap)
        if reason is None:
            return name
        reasons.append(reason)
    raise ValueError(f"{'; '.join(reasons)}. Use another package, or attention='torch'")


def varlen_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    cu_seqlens: Tensor,
    longest: int,
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
    package: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over a condensed ragged tier and the dense tier; see `hardkv.kernels.attention.tiered_attention`.

    Args:
        query: `[B, Hq, q, D]`, fp16 or bf16. keys, values: `[N, D]`, `[N, Dv]`. cu_seqlens: int32 `[R + 1]`.
        longest: a host's bound on the condensed rows' lengths.
        dense_keys, dense_values: `[B, H, C, D]` and `[B, H, C, Dv]`. Contiguous buffers are read where they are, but
            the first `bound` slots of others are copied, and those for packages that read behind a row's end.
        dense_positions: int32 `[B, C]`. fill: int `[B]`, valid slots. bound: a host's bound on fill.
        start: column of the first new query. scale, softcap, sinks: as in `tiered_attention`.
        new_mask: bool `[B, q, C]` or `[B, q, bound]`, dense slots that each query sees, instead of causality.
        padded: True when some of several new tokens may not have been stored (padding). Otherwise they are the last q
            slots of every sequence, which is what the packages take causality to mean. With `padded`, as with
            `new_mask`, the dense tier is attended by the PyTorch reference.
        package: one of `PACKAGES`, or None for the first of `installed()` that can.

    Returns:
        `out [B, Hq, q, Dv]` in the query's dtype and `lse [B, Hq, q]`, float32.

    Raises:
        ValueError: the package is not installed, or cannot do this.
    """
    batch, num_heads, q_len, head_dim = query.shape
    num_kv_heads, value_dim = dense_keys.shape[1], dense_values.shape[-1]
    group, rows = num_heads // num_kv_heads, batch * num_kv_heads
    chosen = PACKAGES[resolve_package(package, query.dtype, head_dim, value_dim, softcap)]
    bound = min(bound, dense_keys.shape[2])

    q = query.unflatten(1, (num_kv_heads, group)).transpose(2, 3).reshape(rows * q_len, group, head_dim).contiguous()
    parts = []  # each out [R, q, G, Dv] and lse [R, q, G], float32
    if longest and keys.shape[0]:
        cu_q = _multiples(rows + 1, q_len, q)
        found = chosen.attend(
            q, keys[:, None], values[:, None], cu_q, cu_seqlens, q_len, longest, scale, False, softcap
        )
        parts.append(_where_seen(*found, group, (cu_seqlens.diff() > 0)[:, None].expand(-1, q_len)))
    if bound and (new_mask is not None or (padded and q_len > 1)):
        if new_mask is None:
            seen = dense_allowed(dense_positions[:, :bound], fill, start, q_len, None)
        else:
            seen = new_mask[..., :bound] & (torch.arange(bound, device=fill.device) < fill[:, None])[:, None]
        out, lse = attend(
            query.reshape(rows, group, q_len, head_dim),
            dense_keys[:, :, :bound].flatten(0, 1),
            dense_values[:, :, :bound].flatten(0, 1),
            seen[:, None, None].expand(-1, num_kv_heads, -1, -1, -1).flatten(0, 1),
            scale=scale,
            softcap=softcap,
        )
        parts.append((out.transpose(1, 2), lse.transpose(1, 2)))
    elif bound:
        parts.append(_attend_dense(chosen, q, dense_keys, dense_values, fill, bound, q_len, scale, softcap))
    if not parts:
        nothing = torch.zeros(rows, q_len, group, value_dim, dtype=torch.float32, device=query.device)
        parts.append((nothing, torch.full_like(nothing[..., 0], -torch.inf)))
    if sinks is not None:
        logit = sinks.float().view(1, num_kv_heads, 1, group).expand(batch, -1, q_len, -1).flatten(0, 1)
        parts.append((torch.zeros_like(parts[0][0]), logit))
    out, lse = merge(parts)
    out = out.to(query.dtype).unflatten(0, (batch, num_kv_heads)).transpose(2, 3)
    lse = lse.unflatten(0, (batch, num_kv_heads)).transpose(2, 3)
    return out.reshape(batch, num_heads, q_len, value_dim), lse.reshape(batch, num_heads, q_len)


def _attend_dense(
    package: Package,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    fill: Tensor,
    bound: int,
    q_len: int,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """The dense tier's part, causal: `q [R * q, G, D]` and the tier as `varlen_attention` takes it."""
    num_kv_heads, group = keys.shape[1], q.shape[1]
    if package.whole_tiles:
        behind = torch.arange(bound, device=fill.device) >= fill[:, None]
        values = values[:, :, :bound].masked_fill(behind[:, None, :, None], 0.0).contiguous()
        keys = keys[:, :, :bound].contiguous()
    elif not (keys.is_contiguous() and values.is_contiguous()):
        keys, values = keys[:, :, :bound].contiguous(), values[:, :, :bound].contiguous()
    capacity = keys.shape[2]
    fill = fill[:, None].expand(-1, num_kv_heads).reshape(-1)  # of rows, [R]
    rows = fill.shape[0]
    # A row, its gap, the next row, its gap, ...; only rows have queries.
    starts = _multiples(rows + 1, capacity, q)
    cu_k = torch.cat([torch.stack([starts[:-1], starts[:-1] + fill.to(torch.int32)], 1).flatten(), starts[-1:]])
    # A single query sees everything, so its group can be a sequence of G queries of one head. It must be, too:
    # FlashAttention-2 takes sequences of at most one query of several heads for sequences of exactly one.
    per_row = group if q_len == 1 else q_len
    if q_len == 1:
        q = q.reshape(rows * group, 1, -1)
    cu_q = torch.arange(1, 2 * rows + 2, dtype=torch.int32, device=q.device) // 2 * per_row
    out, lse = package.attend(
        q, keys.flatten(0, 2)[:, None], values.flatten(0, 2)[:, None],
        cu_q, cu_k, per_row, capacity, scale, q_len > 1, softcap,
    )  # fmt: skip
    last_seen = fill[:, None] - torch.arange(q_len - 1, -1, -1, device=fill.device)  # [R, q], slots that a query sees
    return _where_seen(out, lse, group, last_seen > 0)


def _multiples(count: int, step: int, like: Tensor) -> Tensor:
    """0, step, 2 * step, ...: int32 `[count]` on the device of `like`."""
    return torch.arange(0, count * step, step, dtype=torch.int32, device=like.device)


def _where_seen(out: Tensor, lse: Tensor, group: int, seen: Tensor) -> tuple[Tensor, Tensor]:
    """A package's `out` and `lse` as float32 `[R, q, G, Dv]` and `[R, q, G]`.

    Queries that see no token (`seen [R, q]` False) get 0 and -inf; what packages write for them differs.
    """
    out, lse = out.reshape(*seen.shape, group, -1).float(), lse.reshape(*seen.shape, group)
    return out.masked_fill(~seen[..., None, None], 0.0), lse.masked_fill(~seen[..., None], -torch.inf)
