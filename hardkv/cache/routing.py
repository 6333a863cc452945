"""Everything that touches transformers' attention and mask registries.

A model hands new keys and values to `Cache.update`, then calls the attention function its config names with the
query. Our `update` returns a handle in the keys' place; every registered attention function is wrapped, once and in
place, to look for that handle, and is exactly itself when there is none. Eager attention has no entry in the registry:
a model brings its own as the default when it asks for its function, and gets it wrapped. Models and configs stay as
they are. Mask functions never see the cache, so the length that `get_mask_sizes` reports is a marked integer that the
wrapped mask functions recognise.
"""

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from hardkv.cache import handover, under_way
from hardkv.cache.handles import HardKVMask, KVHandle, LogicalLen, NewTokens, UnroutedKVError
from hardkv.cache.latent import Latent
from hardkv.cache.static import StaticTokens, static_attention
from hardkv.cache.steps import UnknownLength
from hardkv.cache.storage.hidden import Past
from hardkv.kernels.autocast import attended_dtype, suspended

# Attention modules that get what their model got as `use_cache`.
_TOLD: "weakref.WeakSet[torch.nn.Module]" = weakref.WeakSet()


def _wrap_attention(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, except that keys of a HardKVCache go to its layer."""

    def attention(
        module: torch.nn.Module,
        query: Tensor,
        key: Any,
        value: Any,
        attention_mask: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        if isinstance(key, KVHandle) and isinstance(key.new, StaticTokens):
            return _static(name, module, query, key, kwargs)
        if isinstance(key, KVHandle):
            return _routed(name, function, module, query, key, value, attention_mask, args, kwargs)
        if isinstance(attention_mask, HardKVMask):
            attention_mask = attention_mask.for_plain(module)
        if under_way.WAITING:
            handover.check_given(module)
        return function(module, query, key, value, attention_mask, *args, **kwargs)

    return attention


def _wrap_lookup(lookup: Callable[..., Any]) -> Callable[..., Any]:
    """`AttentionInterface.get_interface`, except that a model's own eager attention comes wrapped."""

    def get_interface(self: Any, attn_implementation: Any, default: Any) -> Any:
        function = lookup(self, attn_implementation, default)
        if function is default and function is not None and not hasattr(function, "_hardkv"):
            return _wrap_attention("eager", function)
        return function

    return _mark(get_interface, lookup)


def _static(
    name: str, module: torch.nn.Module, query: Tensor, key: KVHandle, kwargs: dict[str, Any]
) -> tuple[Tensor, None]:
    """`_routed` for the one token of a static step, whose model was seen to be routed in the prefill."""
    query = query.to(attended_dtype(query))
    new, latent = key.new, Latent.of(module, key, query)
    if kwargs.get("sliding_window") != new.window:
        raise NotImplementedError(
            f"{type(module).__name__} attends within another sliding window than its config says "
            f"({kwargs.get('sliding_window')} and {new.window} tokens): leave out custom_generate=graphed"
        )
    scale, store = _scale(query, kwargs), not new.stored
    new.stored = True
    softcap, sinks = _softcap(name, kwargs), kwargs.get("s_aux")
    if latent is not None:
        query = latent.absorb(query)
    out = static_attention(query, new.keys, new.values, new.layer_idx, store, scale, softcap, sinks)  # [B, 1, Hq, Dv]
    return out if latent is None else latent.emit(out.transpose(1, 2)).transpose(1, 2).contiguous(), None


def _scale(query: Tensor, kwargs: dict[str, Any]) -> float:
    scale = kwargs.get("scaling")
    return query.shape[-1] ** -0.5 if scale is None else float(scale)


def _softcap(name: str, kwargs: dict[str, Any]) -> float | None:
    # sdpa has no softcap: transformers ignores it there (or refuses, before we are asked)
    return None if name == "sdpa" else kwargs.get("softcap")


@torch.compiler.disable
def _routed(
    name: str,
    original: Callable[..., Any],
    module: torch.nn.Module,
    query: Tensor,
    key: KVHandle,
    value: Any,
    mask: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> tuple[Any, Any]:
    if not isinstance(value, KVHandle) or value.new is not key.new:
        raise UnroutedKVError("the keys passed to attention come from a HardKVCache, the values do not")
    if args:
        raise UnroutedKVError(
            f"{type(module).__name__} passes positional arguments to attention; hardkv reads keywords"
        )
    _refuse(module, key, kwargs)
    _check_use_cache(module, key.new, kwargs.get("use_cache"))
    new = key.new
    # generate() always brings a mask; asked once, when the device has hardly begun, and never at later steps
    plain = new.start == 0 and isinstance(mask, HardKVMask) and mask.hides_nothing
    padding = None if plain else _padding(mask, query.shape[0], new)
    new.layer.check_module(module)
    scale, softcap = _scale(query, kwargs), _softcap(name, kwargs)
    attended = query.detach().to(new.keys.dtype)
    latent = Latent.of(module, key, attended)
    if new.start == 0:  # the first call: nothing is compressed yet, and the original kernel is exact
        full_mask = mask.original if isinstance(mask, HardKVMask) else mask
        states = new.given if latent is None else latent.expand(new)
        result = original(module, query, *states, full_mask, **kwargs)
        install()  # a kernel of the hub may just have been loaded, and registered, again
        with torch.no_grad(), suspended(query.device):
            attended = attended if latent is None else latent.absorb(attended)
            new.layer.prefill(new, attended, padding, scale=scale, softcap=softcap)
        return result
    (new_mask, past), sinks = _mask_of_new(mask, padding, new), kwargs.get("s_aux")
    with torch.no_grad(), suspended(query.device):
        out = new.layer.decode(
            new,
            attended if latent is None else latent.absorb(attended),
            padding,
            new_mask,
            past,
            scale=scale,
            softcap=softcap,
            sinks=sinks,
        )  # [B, Hq, q, Dv]
        if latent is not None:
            out = latent.emit(out)
    out = out.to(attended_dtype(query))
    inputs = [x for x in (query, *new.given, sinks) if x is not None and x.requires_grad]
    if inputs and torch.is_grad_enabled():
        out = _NoGradient.apply(out, *inputs)
    return out.transpose(1, 2).contiguous(), None


class _NoGradient(torch.autograd.Function):
    """Hands its first argument on; whoever asks for the gradient of the others gets an error."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, *inputs: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError(
            "HardKVCache keeps no graph of past keys and values, so there is no gradient through a forward pass that "
            "continues from it: train with use_cache=False, or on the first forward's loss alone"
        )


def _refuse(module: torch.nn.Module, key: KVHandle, kwargs: dict[str, Any]) -> None:
    """Raise for attention that would silently be wrong over compressed rows."""
    what = type(module).__name__
    for name in ("position_bias", "indices", "block_indices"):
        if kwargs.get(name) is not None:
            raise NotImplementedError(
                f"HardKVCache does not support attention with {name!r} ({what}): use DynamicCache"
            )
    causal = kwargs.get("is_causal")
    if causal is None:
        causal = getattr(module, "is_causal", True)
    if causal is False:
        raise NotImplementedError(
            f"HardKVCache needs causal self-attention, and {what} is not. For an encoder-decoder model pass "
            "EncoderDecoderCache(HardKVCache(...), DynamicCache())"
        )
    sliding_window = kwargs.get("sliding_window")
    if sliding_window is not None:
        if not key.new.layer.knows_model:
            raise ValueError(
                f"{what} uses a sliding window of {sliding_window} tokens, and this HardKVCache was built without a "
                "config: pass HardKVCache(config=model.config), so that sliding layers get a sliding cache"
            )
        if key.shape[2] > sliding_window:
            raise NotImplementedError(
                f"{what} attends within a sliding window of {sliding_window} tokens, and its config does not mark the "
                "layer as sliding, so HardKVCache compresses it: use DynamicCache for this model"
            )


def _check_use_cache(module: torch.nn.Module, new: NewTokens, use_cache: bool | None) -> None:
    """Raise ValueError when past tokens seem to be fed again with `use_cache=False`.

    Layers of most models hand on to attention what their model got as `use_cache`, those of others nothing, or False
    always. So False counts once this module has been told True at a prompt. Within `generate()`, `GivenCache.given`
    looks.
    """
    if new.start == 0:
        if use_cache:
            _TOLD.add(module)
    elif use_cache is False and new.start < new.stop - new.start and module in _TOLD:
        raise ValueError(
            f"use_cache=False, and {new.stop - new.start} tokens come after the {new.start} that this HardKVCache "
            "holds: past tokens seem to be fed again, and would be held twice. Pass only new tokens and use_cache=True "
            "(where nobody passed False, the model's config.use_cache says so), or no past_key_values"
        )


def _padding(mask: Any, batch: int, new: NewTokens) -> Tensor | None:
    """Which columns hold tokens, bool `[B, columns]`, from any mask a model may pass; None when all do."""
    if mask is None:
        return None
    if isinstance(mask, HardKVMask):
        padding = mask.padding
        if padding is None:
            return None
    elif isinstance(mask, Tensor) and mask.dim() == 4:
        padding = _seen_by_last(_as_bool(mask), new)
    elif isinstance(mask, Tensor) and mask.dim() == 2:
        padding = mask.bool()
    else:
        raise UnroutedKVError(f"cannot read padding from an attention mask of type {type(mask).__name__}")
    _check_width(padding, new.stop)
    return padding.expand(batch, -1)


def _seen_by_last(allowed: Tensor, new: NewTokens) -> Tensor:
    """The columns that the last token of every sequence sees, bool `[B or 1, columns]`: all that exist.

    Queries of padding may see anything or nothing. A sequence without a token among the new ones has none.
    """
    _check_width(allowed[0, 0], new.stop)
    allowed = allowed.any(1)  # [B or 1, q, columns]
    real = allowed[:, :, new.start :].diagonal(dim1=1, dim2=2)
    last = real.shape[1] - 1 - real.flip(1).to(torch.uint8).argmax(1)
    return allowed[torch.arange(last.shape[0], device=last.device), last] & real.any(1, keepdim=True)


def _check_width(padding: Tensor, columns: int) -> None:
    if padding.shape[1] != columns:
        raise ValueError(
            f"attention_mask covers {padding.shape[1]} columns, but the cache will have seen {columns} with this call: "
            f"pass a mask over all {columns} columns, past ones included (this happens too when past tokens are fed "
            "again, as generate(use_cache=False) does)"
        )


def _as_bool(mask: Tensor) -> Tensor:
    """An additive or boolean mask as a boolean one.

    Raises:
        NotImplementedError: it adds anything else to what it allows, such as a position bias.
    """
    if mask.dtype == torch.bool:
        return mask
    allowed = mask > torch.finfo(mask.dtype).min / 2
    if bool((allowed & (mask != 0)).any()):
        raise NotImplementedError(
            "the attention mask adds biases to attention, which HardKVCache does not support: use DynamicCache"
        )
    return allowed


def _mask_of_new(mask: Any, padding: Tensor | None, new: NewTokens) -> tuple[Tensor | None, Past | None]:
    """What a later call's mask says of its own tokens, bool `[B or 1, q, q]`, None if plainly causal, and of the past.

    Raises:
        NotImplementedError: the mask differs between heads.
    """
    given = None if padding is None else padding[:, : new.start]  # what a mask of two dimensions says of the past
    if isinstance(mask, HardKVMask):
        if new.stop - new.start == 1:
            return None, None  # one token that sees what exists
        mask = mask.original
    elif isinstance(mask, Tensor) and mask.dim() == 4:
        given = None
    if mask is None or (isinstance(mask, Tensor) and mask.dim() == 2):
        several = new.stop - new.start > 1
        return None, Past(given, given) if given is not None and several else None
    if not isinstance(mask, Tensor):
        raise NotImplementedError(
            f"HardKVCache cannot read a {type(mask).__name__} for a chunk of several tokens after the first: use "
            "attn_implementation='sdpa'"
        )
    allowed = _as_bool(mask)
    if allowed.shape[1] > 1 and not bool((allowed == allowed[:, :1]).all()):
        raise NotImplementedError("HardKVCache does not support attention masks that differ between heads")
    allowed = allowed[:, 0]  # [B or 1, q, columns]
    among_new, before = allowed[..., new.start :], allowed[..., : new.start]
    real = among_new.diagonal(dim1=1, dim2=2)[..., None]  # what padded queries see nobody reads
    every = (before | ~real).all(1).expand(new.keys.shape[0], -1)
    if given is None:
        return among_new, Past((before & real).any(1).expand_as(every), every, real[..., 0].any(1))
    return among_new, Past(given, every & given)


def _wrap_mask(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, except that it returns a HardKVMask when the length belongs to a HardKV layer."""

    def mask(*args: Any, **kwargs: Any) -> Any:
        if isinstance(kwargs.get("q_offset"), UnknownLength):
            return None  # a static step reads no mask
        length = kwargs.get("kv_length", args[2] if len(args) > 2 else None)
        if not isinstance(length, LogicalLen):
            return function(*args, **kwargs)
        if args:
            raise UnroutedKVError("mask functions of HardKVCache layers must be called with keywords")
        kwargs["kv_length"] = int(length)
        padding = kwargs.get("attention_mask")
        if padding is not None:
            _check_width(padding, int(length))
        return HardKVMask(padding, length.layer_idx, lambda: function(**kwargs))

    return _mark(mask, function)


def _mark(wrapper: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    functools.update_wrapper(wrapper, function)
    wrapper._hardkv = True  # type: ignore[attr-defined]
    return wrapper


def install() -> None:
    """Wrap in place what hardkv needs of transformers: registries of attention and masks, and `generate()`. Idempotent.

    Called at import, by every HardKVCache and in prefill, so that what is registered in between is wrapped too.
    """
    for interface in (AttentionInterface, AttentionMaskInterface):
        if not isinstance(getattr(interface, "_global_mapping", None), dict):
            import transformers

            raise ImportError(
                f"transformers {transformers.__version__} keeps its attention registry differently from the versions "
                "hardkv was tested with: please report it and use a tested version (see the README)"
            )
    entries: list[tuple[str, Any]] = list(AttentionInterface._global_mapping.items())
    for name, function in entries:
        if not name.startswith("paged|") and not hasattr(function, "_hardkv"):
            AttentionInterface.register(name, _mark(_wrap_attention(name, function), function))
    for name, function in list(AttentionMaskInterface._global_mapping.items()):
        if not name.startswith("paged|") and not hasattr(function, "_hardkv"):
            AttentionMaskInterface.register(name, _wrap_mask(function))  # type: ignore[arg-type]
    if not hasattr(AttentionInterface.get_interface, "_hardkv"):
        AttentionInterface.get_interface = _wrap_lookup(AttentionInterface.get_interface)  # type: ignore[method-assign]
    under_way.install()
    handover.install()
