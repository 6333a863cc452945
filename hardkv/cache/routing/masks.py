"""Attention masks: the object that hardkv returns in their place, and functions that read any mask of a model."""

import functools
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from hardkv.cache.routing.handles import Opaque, UnroutedKVError
from hardkv.cache.storage.hidden import Past


class NewColumns(Protocol):
    """The columns of one `update()`, from `start` to `stop`, for `batch` sequences."""

    start: int

    @property
    def stop(self) -> int:
        """The column after the last one."""
        ...

    @property
    def batch(self) -> int:
        """Number of sequences."""
        ...


class HardKVMask(Opaque):
    """What a wrapped mask function returns for a HardKV layer: the 2D padding, and the original mask on request."""

    what = "attention mask"

    def __init__(self, padding: Tensor | None, layer_idx: int, build: Callable[[], Any]):
        self.padding = padding  # bool [B, columns] or None
        self.layer_idx = layer_idx  # the layer whose length the mask function got
        self._build = build

    def for_plain(self, module: torch.nn.Module) -> Any:
        """Return the original mask, for a layer of the same model that hardkv does not handle.

        Raises:
            NotImplementedError: the layer is a HardKV layer, but its keys come from no cache.
        """
        if getattr(module, "layer_idx", None) == self.layer_idx:
            raise NotImplementedError(
                f"layer {self.layer_idx} of the model was to use this HardKVCache, and {type(module).__name__} runs "
                "without it. Gradient checkpointing drops caches while a model trains, and use_cache=False in some "
                "models: call model.eval() or model.gradient_checkpointing_disable(), pass use_cache=True, or leave "
                "past_key_values out. With neither, this model is not supported: use DynamicCache"
            )
        return self.original

    @functools.cached_property
    def original(self) -> Any:
        """The mask that the wrapped function would have returned."""
        return self._build()

    @functools.cached_property
    def hides_nothing(self) -> bool:
        """Whether every column holds a token. The host waits for the device once, at the first call."""
        return self.padding is None or bool(self.padding.all())

    def to(self, *args: Any, **kwargs: Any) -> "HardKVMask":
        if self.padding is not None:
            padding = self.padding.to(*args, **kwargs)
            if padding is not self.padding:
                return HardKVMask(padding.bool(), self.layer_idx, lambda: self._moved(*args, **kwargs))
        return self

    def _moved(self, *args: Any, **kwargs: Any) -> Any:
        return self.original if self.original is None else self.original.to(*args, **kwargs)

    def contiguous(self, *args: Any, **kwargs: Any) -> "HardKVMask":
        return self


def padding_of(mask: Any, batch: int, new: NewColumns) -> Tensor | None:
    """Return which columns hold tokens, bool `[B, columns]`, from any mask of a model; None if all do."""
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
    check_width(padding, new.stop)
    return padding.expand(batch, -1)


def _seen_by_last(allowed: Tensor, new: NewColumns) -> Tensor:
    """Return the columns that the last token of every sequence sees, bool `[B or 1, columns]`: all that hold tokens.

    Queries of padding may see anything, so they are not used. A sequence without a new token gets no columns.
    """
    check_width(allowed[0, 0], new.stop)
    allowed = allowed.any(1)  # [B or 1, q, columns]
    real = allowed[:, :, new.start :].diagonal(dim1=1, dim2=2)
    last = real.shape[1] - 1 - real.flip(1).to(torch.uint8).argmax(1)
    return allowed[torch.arange(last.shape[0], device=last.device), last] & real.any(1, keepdim=True)


def check_width(padding: Tensor, columns: int) -> None:
    if padding.shape[1] != columns:
        raise ValueError(
            f"attention_mask covers {padding.shape[1]} columns, but the cache will have seen {columns} with this call: "
            f"pass a mask over all {columns} columns, past ones included (this happens too when past tokens are fed "
            "again, as generate(use_cache=False) does)"
        )


def _as_bool(mask: Tensor) -> Tensor:
    """Return an additive or boolean mask as a boolean one.

    Raises:
        NotImplementedError: the mask adds something else to allowed logits, such as a position bias.
    """
    if mask.dtype == torch.bool:
        return mask
    allowed = mask > torch.finfo(mask.dtype).min / 2
    if bool((allowed & (mask != 0)).any()):
        raise NotImplementedError(
            "the attention mask adds biases to attention, which HardKVCache does not support: use DynamicCache"
        )
    return allowed


def mask_of_new(mask: Any, padding: Tensor | None, new: NewColumns) -> tuple[Tensor | None, Past | None]:
    """Return what a later call's mask says about the new tokens and about the past.

    Returns:
        The mask among the new tokens, bool `[B or 1, q, q]`, None if plainly causal; and the past, None if it says
        nothing.

    Raises:
        NotImplementedError: the mask differs between heads.
    """
    given = None if padding is None else padding[:, : new.start]  # a 2D mask says this about the past
    if isinstance(mask, HardKVMask):
        if new.stop - new.start == 1:
            return None, None  # one token that sees all that exists
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
    real = among_new.diagonal(dim1=1, dim2=2)[..., None]  # nobody reads the results of padded queries
    every = (before | ~real).all(1).expand(new.batch, -1)
    if given is None:
        return among_new, Past((before & real).any(1).expand_as(every), every, real[..., 0].any(1))
    return among_new, Past(given, every & given)
