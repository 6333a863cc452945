"""Detect a forward pass that failed between two layers, or an operation that changed only some of the layers."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import dropwhile
from typing import Any

import torch
import transformers.cache_utils
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicCache, LinearAttentionCacheLayerMixin

HALF_DONE = (
    "an earlier call on this HardKVCache stopped midway (an error, out of memory or an interrupt), so its layers no "
    "longer fit together: reset() it or build a new one"
)


class WholeCache(DynamicCache):
    """A DynamicCache that detects layers that do not fit together, and refuses to work until `reset()`.

    It compares the lengths of layers with keys. Linear-attention layers have no length, so it notes each time the model
    uses one.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        self._broken: str | None = None  # why the cache is unusable
        self._start = 0  # logical length before the current forward pass
        self._linear_starts: dict[int, int] = {}  # the same, per linear-attention layer, for its last forward
        self._cross: frozenset[int] = frozenset()  # layers that read a picture: they store it once and have no events
        super().__init__(*args, **kwargs)

    @property
    def _attention(self) -> Iterator[int]:
        """Indices of the layers that see every column. A generator, as every layer of every step needs the first."""
        return (
            idx
            for idx, layer in enumerate(self.layers)
            if isinstance(layer, CacheLayerMixin) and idx not in self._cross
        )

    @torch.compiler.disable
    def _check_whole(self, layer: CacheLayerMixin | None = None) -> None:
        """Raise RuntimeError if the last forward did not reach every layer. `layer` is the next one to be updated.

        At the start of a forward all layers must have seen the same columns. Layers that a model never uses stay at 0.
        """
        if layer is None or layer is self.layers[next(self._attention)]:
            lengths = [int(self.layers[idx].get_seq_length()) for idx in self._attention]  # type: ignore[union-attr]
            used = list(dropwhile(lambda length: length == 0, lengths))
            self._start = max(lengths, default=0)
        else:
            used = [int(layer.get_seq_length()), self._start]
        if len(set(used)) > 1 and self._broken is None:
            self._broken = (
                "an earlier forward pass stopped between layers (an error, out of memory or an interrupt), so layers "
                f"of this HardKVCache hold different lengths ({min(used)} to {max(used)}): reset() it or build a new "
                "one. Encoder-decoder models need EncoderDecoderCache(HardKVCache(...), DynamicCache()); a model that "
                "skips layers, DynamicCache"
            )
        if layer is None and self._broken is None and not self._linear_whole():
            self._broken = HALF_DONE
        if self._broken is not None:
            raise RuntimeError(self._broken)

    def _is_next(self, layer_idx: int) -> bool:
        """Return whether a forward pass is running that has not reached the layer yet."""
        layer = self.layers[layer_idx] if layer_idx < len(self.layers) else None
        if not isinstance(layer, CacheLayerMixin):
            return False
        first = self.layers[next(self._attention)]
        return layer.get_seq_length() == self._start < first.get_seq_length()  # type: ignore[union-attr]

    @contextmanager
    def _whole_or_broken(self) -> Iterator[None]:
        """Change layers one by one inside this block. If it fails, the cache is unusable until it is reset."""
        self._broken = HALF_DONE
        yield
        self._broken = None

    # Linear-attention layers: note how far the forward came, then call transformers' own method. Reading a state counts
    # too, because decoding kernels write into the state that they get.

    def has_previous_state(self, layer_idx: int | None = None, *args: Any, **kwargs: Any) -> bool:
        """As in transformers."""
        if layer_idx is not None:
            self._reached(layer_idx)
        return super().has_previous_state(layer_idx, *args, **kwargs)

    def get_conv_state(self, layer_idx: int, *args: Any, **kwargs: Any) -> Tensor | None:
        """As in transformers."""
        self._reached(layer_idx)
        return super().get_conv_state(layer_idx, *args, **kwargs)

    def get_recurrent_state(self, layer_idx: int, *args: Any, **kwargs: Any) -> Tensor | None:
        """As in transformers."""
        self._reached(layer_idx)
        return super().get_recurrent_state(layer_idx, *args, **kwargs)

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Tensor:
        """As in transformers."""
        with self._whole_or_broken():
            self._reached(layer_idx)
            return super().update_conv_state(conv_states, layer_idx, *args, **kwargs)

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Tensor:
        """As in transformers."""
        with self._whole_or_broken():
            self._reached(layer_idx)
            return super().update_recurrent_state(recurrent_states, layer_idx, *args, **kwargs)

    @torch.compiler.disable
    def _reached(self, layer_idx: int) -> None:
        first = next(self._attention, None)
        if first is not None and layer_idx < len(self.layers) and _is_linear(self.layers[layer_idx]):
            # the length before this forward: the first attention layer noted it if it has run, and still has it if not
            start = self._start if first < layer_idx else int(self.get_seq_length())
            self._linear_starts[layer_idx] = start

    def _linear_whole(self) -> bool:
        """Return whether the last forward reached all linear-attention layers or none."""
        starts = set(self._linear_starts.values())
        if not starts:
            return True
        # transformers 5.17 makes such layers even for a model without any
        all_used = hasattr(transformers.cache_utils, "DummyLayer")
        told = len(self._linear_starts) == sum(_is_linear(layer) for layer in self.layers)
        return starts != {self._start} and len(starts) == 1 and (told or not all_used)


def _is_linear(layer: Any) -> bool:
    """Return whether a layer holds only states, which have no length."""
    return isinstance(layer, LinearAttentionCacheLayerMixin) and not isinstance(layer, CacheLayerMixin)
