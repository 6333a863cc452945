"""Checks of arguments that a cache cannot take. The errors say what to do."""

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin


def check_numbers(keys: Tensor, layer_idx: int) -> None:
    """Raise NotImplementedError for keys that have no numbers, which decide what a cache keeps."""
    if keys.device.type == "meta":
        kind = "on the meta device"
    elif type(keys).__name__ == "FakeTensor":  # whose module imports much
        kind = "of FakeTensorMode"
    else:
        return
    raise NotImplementedError(
        f"layer {layer_idx} gets keys {kind}, which have no numbers, and a HardKVCache keeps tokens by numbers: run "
        "the model with DynamicCache there, or ask hardkv.plan(model.config) for the cache's bytes"
    )


def check_dims(bits: tuple[int, int], keys: int, values: int, layer_idx: int) -> None:
    """Raise ValueError if the head dim of keys or values cannot be quantised to the bits of keys and of values."""
    for dim, each in zip((keys, values), bits, strict=True):
        if each != 16 and dim % 8:
            raise ValueError(
                f"bits={each} needs head dims that are multiples of 8, and those of layer {layer_idx} are {keys} for "
                f"keys and {values} for values: use bits=16"
            )


def check_alike(keys: Tensor, values: Tensor, layer_idx: int) -> None:
    """Raise ValueError unless keys and values agree in batch, heads, tokens and dtype. Call it if they differ.

    Under autocast the dtypes may differ: a norm leaves keys in its own dtype.
    """
    if keys.shape[:-1] == values.shape[:-1] and torch.is_autocast_enabled(keys.device.type):
        return
    raise ValueError(
        f"layer {layer_idx} gets keys {tuple(keys.shape)} in {keys.dtype} and values {tuple(values.shape)} in "
        f"{values.dtype}: both must have the same batch, KV heads, tokens and dtype, [B, H, q, D] and [B, H, q, Dv]"
    )


def check_shape(layer: CacheLayerMixin, layer_idx: int, keys: Tensor) -> None:
    """Raise ValueError unless keys `[B, H, q, D]` fit the tokens of a transformers layer, which does not check them."""
    if layer.is_initialized and layer.keys is not None and layer.keys.dim() == 4:
        has, got = ((each.shape[0], each.shape[1], each.shape[3]) for each in (layer.keys, keys))
        if has != got:
            raise ValueError(
                f"layer {layer_idx} holds batch, KV heads, head_dim = {has} and gets {got}: {what_else(has, got)}"
            )


def what_else(held: tuple[int, ...], got: tuple[int, ...]) -> str:
    """Return advice for keys whose shape (batch first) differs from what a layer holds."""
    advice = (
        "this cache belongs to another batch or model, or was begun under torch.autocast and does not go on under it; "
        "use a new HardKVCache, or reset() this one"
    )
    if held[1:] == got[1:] and 0 < held[0] < got[0] and got[0] % held[0] == 0:
        times = got[0] // held[0]
        advice += f". For beams, or several answers to each prompt, that go on: cache.batch_repeat_interleave({times})"
    return advice


def check_rows(indices: Tensor, batch: int) -> None:
    """Raise IndexError if `indices`, int64 or bool over the batch, name sequences that the batch does not have."""
    indices = torch.as_tensor(indices)
    if not batch:
        return
    if indices.dtype == torch.bool:
        fits = indices.shape[0] == batch
    else:
        fits = indices.device.type != "cpu" or bool(((indices >= -batch) & (indices < batch)).all())
    if not fits:
        raise IndexError(f"indices {indices.tolist()} do not fit the {batch} sequences that this HardKVCache holds")
