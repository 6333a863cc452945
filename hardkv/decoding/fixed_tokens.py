"""The new token of a static step on its way to attention, and the operator that stores it and attends."""

import threading
from collections.abc import Callable

import torch
from torch import Tensor

from hardkv.cache.routing.call import AttentionCall
from hardkv.cache.routing.latent import Latent
from hardkv.kernels.autocast import attended_dtype


class Current(threading.local):
    """`StaticDecoding.attend` of the step under way in this thread."""

    attend: Callable[..., Tensor] | None = None


current = Current()


class StaticTokens:
    """The new token of every sequence in a static step, until attention reads it. It takes the place of `NewTokens`.

    Args:
        layer_idx: index of the layer. keys: `[B, H, 1, D]`; values: `[B, H, 1, Dv]`.
        window: tokens that the layer's sliding window covers; None: all tokens. latent: see `HardKVLayer`.
    """

    stop = 1  # tokens that handles show

    def __init__(self, layer_idx: int, keys: Tensor, values: Tensor, window: int | None = None, latent: bool = False):
        self.layer_idx, self.window, self.latent = layer_idx, window, latent
        self.given = keys, values
        self.keys, self.values = (torch.cat(self.given, -1), keys) if latent else self.given
        self.stored = False  # set when attention first reads them

    def attend(self, call: AttentionCall) -> tuple[Tensor, None]:
        """Attend with the query `[B, Hq, 1, D]`. The prefill has checked that the model's attention is routed.

        Returns:
            `[B, 1, Hq, Dv]`, and None for the weights.

        Raises:
            NotImplementedError: the layer's sliding window differs from its config.
        """
        query = call.query.to(attended_dtype(call.query))
        latent = Latent.of(call.module, call.key, query)
        if call.kwargs.get("sliding_window") != self.window:
            raise NotImplementedError(
                f"{type(call.module).__name__} attends within another sliding window than its config says "
                f"({call.kwargs.get('sliding_window')} and {self.window} tokens): leave out custom_generate=graphed"
            )
        store, self.stored = not self.stored, True
        layer_idx, scale, softcap = self.layer_idx, call.scale, call.softcap
        if latent is not None:
            query = latent.absorb(query)
        out = static_attention(query, self.keys, self.values, layer_idx, store, scale, softcap, call.sinks)
        return out if latent is None else latent.emit(out.transpose(1, 2)).transpose(1, 2).contiguous(), None


@torch.library.custom_op("hardkv::static_attention", mutates_args=())
def static_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    layer_idx: int,
    store: bool,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Call `StaticDecoding.attend` of the current step and return `[B, 1, Hq, Dv]`. torch.compile traces this operator.

    It writes only to the pools, which no other operator of a forward reads.
    """
    attend = current.attend
    if attend is None:
        raise RuntimeError("hardkv::static_attention works within StaticDecoding.step() only")
    out = attend(layer_idx, query, keys, values, store, scale=scale, softcap=softcap, sinks=sinks)
    return out.transpose(1, 2).contiguous()


@static_attention.register_fake
def _(query: Tensor, keys: Tensor, values: Tensor, *rest: object) -> Tensor:
    return query.new_empty(query.shape[0], 1, query.shape[1], values.shape[-1])
