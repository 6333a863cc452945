"""Everything that touches transformers' attention and mask registries.

A model hands new keys and values to `Cache.update`, then calls the attention function its config names with the
query. Our `update` returns a handle in the keys' place; every registered attention function is wrapped, once and in
place, to look for that handle, and is exactly itself when there is none. Eager attention has no entry in the registry:
a model brings its own as the default when it asks for its function, and gets it wrapped. Models and configs stay as
they are. Mask functions never see the cache, so the length that `get_mask_sizes` reports is a marked integer that the
wrapped mask functions recognise.
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
    """`AttentionInterface.get_interface`, except that a model's own eager attention comes wrapped."""

    def get_interface(self: Any, attn_implementation: Any, default: Any) -> Any:
        function = lookup(self, attn_implementation, default)
        if function is default and function is not None and not hasattr(function, "_hardkv"):
            return _wrap_attention("eager", function)
        return function

    return _mark(get_interface, lookup)


def _wrap_mask(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, except that it returns a HardKVMask when the length belongs to a HardKV layer."""

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
