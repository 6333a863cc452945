"""All code that touches transformers' attention and mask registries.

A model passes new keys and values to `Cache.update`. Then it looks up the attention function that its config names and
calls it with the query. Our `update` returns a handle in place of the keys. Every registered attention function is
wrapped once, in place: the wrapper looks for a handle and, without one, only calls the original function. Eager
attention has no registry entry: a model passes its own function as the default of the lookup, and the lookup returns it
wrapped. Models and configs do not change. Mask functions never see the cache, so `get_mask_sizes` returns the length as
a marked integer that the wrapped mask functions recognise.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from hardkv.cache import handover
from hardkv.cache.routing import under_way
from hardkv.cache.routing.call import AttentionCall
from hardkv.cache.routing.handles import KVHandle, LogicalLen, UnmaskedLength, UnroutedKVError
from hardkv.cache.routing.masks import HardKVMask, check_width


def _wrap_attention(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `function` so that keys of a HardKVCache go to their layer."""

    def attention(
        module: torch.nn.Module,
        query: Tensor,
        key: Any,
        value: Any,
        attention_mask: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        if isinstance(key, KVHandle):
            call = AttentionCall(name, function, module, query, key, value, attention_mask, args, kwargs)
            return key.new.attend(call)
        if isinstance(attention_mask, HardKVMask):
            attention_mask = attention_mask.for_plain(module)
        if under_way.WAITING:
            handover.check_given(module)
        return function(module, query, key, value, attention_mask, *args, **kwargs)

    return attention


def _wrap_lookup(lookup: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `AttentionInterface.get_interface` so that it returns a model's own eager attention wrapped."""

    def get_interface(self: Any, attn_implementation: Any, default: Any) -> Any:
        function = lookup(self, attn_implementation, default)
        if function is default and function is not None and not hasattr(function, "_hardkv"):
            return _wrap_attention("eager", function)
        return function

    return _mark(get_interface, lookup)


def _wrap_mask(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `function` so that it returns a HardKVMask if the length belongs to a HardKV layer."""

    def mask(*args: Any, **kwargs: Any) -> Any:
        if isinstance(kwargs.get("q_offset"), UnmaskedLength):
            return None  # a static step reads no mask
        length = kwargs.get("kv_length", args[2] if len(args) > 2 else None)
        if not isinstance(length, LogicalLen):
            return function(*args, **kwargs)
        if args:
            raise UnroutedKVError("mask functions of HardKVCache layers must be called with keywords")
        kwargs["kv_length"] = int(length)
        padding = kwargs.get("attention_mask")
        if padding is not None:
            check_width(padding, int(length))
        return HardKVMask(padding, length.layer_idx, lambda: function(**kwargs))

    return _mark(mask, function)


def _mark(wrapper: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    functools.update_wrapper(wrapper, function)
    wrapper._hardkv = True  # type: ignore[attr-defined]
    return wrapper


def install() -> None:
    """Wrap transformers' attention and mask registries and `generate()` in place. Idempotent.

    It runs at import, in every HardKVCache constructor and in prefill, so that functions registered meanwhile are
    wrapped too.
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
