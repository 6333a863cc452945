"""Call the installed packages that have a variable-length FlashAttention, and know what each cannot do.

| package        | splits long rows among programs     | softcap | Dv  | reads behind a row's end |
| -------------- | ----------------------------------- | ------- | --- | ------------------------ |
| `flash_attn_3` | as it sees fit                      | yes     | D   | yes                      |
| `flash_attn_2` | condensed ones, if q is 1 and G > 1 | yes     | D   | no                       |
| `flash_attn_4` | no: on Hopper its beta cannot       | yes     | any | yes                      |
| `torch_varlen` | as `flash_attn_2`: a copy of it     | no      | D   | no                       |

All accept fp16 and bf16, and head dimensions that are multiples of 8 up to 256. After a row's end comes the next row or
a gap with arbitrary contents. Packages that read values there multiply them by 0, but 0 * NaN is NaN. For these, the
dense tier is copied with its gaps cleared; a condensed row that overflowed still affects the row before it. (PyTorch's
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

DTYPES = (torch.float16, torch.bfloat16)
MAX_HEAD_DIM = 256


@cache
def _takes(function: Callable, parameter: str) -> bool:
    """Return whether a function has a parameter; this differs between versions of a package."""
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
    # Until July 2025 it always returned the lse; since August 2025 it does so on request; versions in between cannot.
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
    # PyTorch 2.11 accepts fewer heads in k and v without a flag; later versions need the flag.
    gqa = {"enable_gqa": True} if _takes(function, "enable_gqa") else {}
    window = (-1, 0) if causal else (-1, -1)
    out, lse = function(q, k, v, cu_q, cu_k, max_q, max_k, return_aux=aux, scale=scale, window_size=window, **gqa)
    return out, lse.t()  # [G, total_q], although its documentation says otherwise


@dataclass(frozen=True)
class Package:
    """Describe how to call an installed package, and what it cannot do."""

    attend: Callable[
        [Tensor, Tensor, Tensor, Tensor, Tensor, int, int, float, bool, float | None], tuple[Tensor, Tensor]
    ]
    module: str
    function: str = "flash_attn_varlen_func"
    parameter: str = "causal"  # a parameter that versions too old to support lack
    softcap: bool = True
    any_value_dim: bool = False  # Dv may differ from D
    whole_tiles: bool = False  # reads values behind a row's end

    def load(self) -> Callable:
        """Return the package's function, or None when its module has none."""
        return getattr(importlib.import_module(self.module), self.function, None)  # type: ignore[return-value]


# In order of preference. FlashAttention-3 is built for the GPUs it is fastest on; FlashAttention-4 is in beta and
# compiles at the first call; PyTorch's copy comes last because it is always present.
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
    """Return the packages that can be imported, in order of preference; warn once about a broken one."""
    found = []
    for name, package in PACKAGES.items():
        try:
            function = package.load()
        except ModuleNotFoundError:
            continue
        except Exception as error:  # a binary built for another PyTorch may raise anything
            warnings.warn(f"{name} is installed but cannot be imported, so it is not used: {error!r}", stacklevel=2)
            continue
        if function is None or not _takes(function, package.parameter):
            continue  # a namespace that another package left, or a version that does not return the lse
        if name == "torch_varlen" and not torch.backends.cuda.is_flash_attention_available():
            continue
        found.append(name)
    return tuple(found)


def refusal(name: str, dtype: torch.dtype, head_dim: int, value_dim: int, softcap: float | None) -> str | None:
    """Return why a package cannot attend such inputs, or None when it can."""
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
    """Return the package to use for such inputs: the named one, or the first installed one that supports them.

    Raises:
        ValueError: the package is not installed or does not support the inputs.
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
