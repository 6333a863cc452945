"""New keys and values on their way to a layer: `update()` wraps them, and attention stores and reads them."""

import weakref
from typing import Any, Protocol

import torch
from torch import Tensor

from hardkv.cache.routing.call import AttentionCall
from hardkv.cache.routing.handles import KVHandle, UnroutedKVError
from hardkv.cache.routing.latent import Latent
from hardkv.cache.routing.masks import HardKVMask, mask_of_new, padding_of
from hardkv.cache.routing.registry import install
from hardkv.cache.schedule import EventSchedule
from hardkv.cache.storage.hidden import Past
from hardkv.kernels.autocast import attended_dtype, suspended

# Attention modules that receive the model's `use_cache` argument.
_TOLD: "weakref.WeakSet[torch.nn.Module]" = weakref.WeakSet()


class StoringLayer(Protocol):
    """What new tokens need from the layer that stores them."""

    dtype: torch.dtype
    latent: bool
    knows_model: bool

    def check_module(self, module: torch.nn.Module) -> None:
        """Raise ValueError if the query comes from another model's layer than before."""
        ...

    def prefill(self, new: Any, query: Tensor, padding: Tensor | None, *, scale: float, softcap: float | None) -> None:
        """Store the first tokens. The model's own kernel has already attended to them."""
        ...

    def decode(
        self,
        new: Any,
        query: Tensor,
        padding: Tensor | None,
        new_mask: Tensor | None,
        past: Past | None,
        *,
        scale: float,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """Store later tokens and attend over all tokens."""
        ...


class NewTokens:
    """The keys and values of one `update()`, `[B, H, q, D]` and `[B, H, q, Dv]`, until attention reads them.

    They are stored in the layer's dtype; attention of the first forward gets them as given. With latent attention,
    `keys` hold the latents joined with the rotated keys. `values` then have width 0, because they are the first part of
    the keys.
    """

    def __init__(
        self,
        layer: StoringLayer,
        keys: Tensor,
        values: Tensor,
        start: int,
        schedule: EventSchedule | None = None,
    ):
        self.layer, self.latent = layer, layer.latent
        self.given = (keys, values)  # with their autograd graph
        self.keys = keys.detach().to(layer.dtype)
        self.values = values.detach().to(layer.dtype)
        if self.latent:
            self.keys = torch.cat([self.keys, self.values], -1)
            self.values = self.keys[..., :0]
        self.start = start  # column of the first token
        self.ingested_at: int | None = None  # the layer's event count when the tokens were stored
        self.schedule = schedule  # when the layer's events run; None: alone, at once

    @property
    def stop(self) -> int:
        return self.start + self.keys.shape[2]

    @property
    def batch(self) -> int:
        """Number of sequences."""
        return self.keys.shape[0]

    @torch.compiler.disable
    def attend(self, call: AttentionCall) -> tuple[Any, Any]:
        """Store these tokens and attend over them and all earlier ones.

        Returns:
            `[B, q, Hq, Dv]`, and the attention weights that the model's kernel gave in the first forward, else None.

        Raises:
            UnroutedKVError, NotImplementedError, ValueError: the cache cannot compute this attention correctly.
        """
        module, query, mask = call.module, call.query, call.mask
        if not isinstance(call.value, KVHandle) or call.value.new is not self:
            raise UnroutedKVError("the keys passed to attention come from a HardKVCache, the values do not")
        if call.args:
            raise UnroutedKVError(
                f"{type(module).__name__} passes positional arguments to attention; hardkv reads keywords"
            )
        _refuse(call, self.layer.knows_model)
        _check_use_cache(module, self, call.kwargs.get("use_cache"))
        # generate() always passes a mask. Read it only at the prompt, when the device has little work: later steps must
        # not wait for it.
        plain = self.start == 0 and isinstance(mask, HardKVMask) and mask.hides_nothing
        padding = None if plain else padding_of(mask, query.shape[0], self)
        self.layer.check_module(module)
        attended = query.detach().to(self.keys.dtype)
        latent = Latent.of(module, call.key, attended)
        if self.start == 0:  # the first call: nothing is compressed yet, so the original kernel is exact
            full_mask = mask.original if isinstance(mask, HardKVMask) else mask
            states = self.given if latent is None else latent.expand(self.given)
            result = call.function(module, query, *states, full_mask, **call.kwargs)
            install()  # attention may just have loaded and registered a kernel from the hub
            with torch.no_grad(), suspended(query.device):
                attended = attended if latent is None else latent.absorb(attended)
                self.layer.prefill(self, attended, padding, scale=call.scale, softcap=call.softcap)
            return result
        (new_mask, past), sinks = mask_of_new(mask, padding, self), call.sinks
        with torch.no_grad(), suspended(query.device):
            out = self.layer.decode(
                self,
                attended if latent is None else latent.absorb(attended),
                padding,
                new_mask,
                past,
                scale=call.scale,
                softcap=call.softcap,
                sinks=sinks,
            )  # [B, Hq, q, Dv]
            if latent is not None:
                out = latent.emit(out)
        out = out.to(attended_dtype(query))
        inputs = [x for x in (query, *self.given, sinks) if x is not None and x.requires_grad]
        if inputs and torch.is_grad_enabled():
            out = _NoGradient.apply(out, *inputs)
        return out.transpose(1, 2).contiguous(), None


class _NoGradient(torch.autograd.Function):
    """Return the first argument. Asking for gradients of the other arguments raises an error."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, *inputs: Tensor) -> Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError(
            "HardKVCache keeps no graph of past keys and values, so there is no gradient through a forward pass that "
            "continues from it: train with use_cache=False, or on the first forward's loss alone"
        )


def _refuse(call: AttentionCall, knows_model: bool) -> None:
    """Raise for attention that would silently be wrong over compressed rows."""
    what, kwargs = type(call.module).__name__, call.kwargs
    for name in ("position_bias", "indices", "block_indices"):
        if kwargs.get(name) is not None:
            raise NotImplementedError(
                f"HardKVCache does not support attention with {name!r} ({what}): use DynamicCache"
            )
    causal = kwargs.get("is_causal")
    if causal is None:
        causal = getattr(call.module, "is_causal", True)
    if causal is False:
        raise NotImplementedError(
            f"HardKVCache needs causal self-attention, and {what} is not. For an encoder-decoder model pass "
            "EncoderDecoderCache(HardKVCache(...), DynamicCache())"
        )
    sliding_window = kwargs.get("sliding_window")
    if sliding_window is not None:
        if not knows_model:
            raise ValueError(
                f"{what} uses a sliding window of {sliding_window} tokens, and this HardKVCache was built without a "
                "config: pass HardKVCache(config=model.config), so that sliding layers get a sliding cache"
            )
        if call.key.shape[2] > sliding_window:
            raise NotImplementedError(
                f"{what} attends within a sliding window of {sliding_window} tokens, and its config does not mark the "
                "layer as sliding, so HardKVCache compresses it: use DynamicCache for this model"
            )


def _check_use_cache(module: torch.nn.Module, new: NewTokens, use_cache: bool | None) -> None:
    """Raise ValueError if past tokens seem to be fed again with `use_cache=False`.

    Most models pass their `use_cache` on to attention; others pass nothing, or always False. So False counts only if
    this module got True at a prompt before. Within `generate()`, `GivenCache.given` checks instead.
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
