"""Noticing what died midway: a forward pass between two layers, or an operation that changes layers one by one."""

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
    """A DynamicCache that can tell whether its layers fit together, and is unusable until `reset()` when they do not.

    Layers with keys are told apart by their lengths. Linear-attention layers have none, so what the model asks of them
    is noted.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        self._broken: str | None = None  # why it is unusable
        self._start = 0  # logical length before the forward pass under way
        self._linear_starts: dict[int, int] = {}  # the same, of the last forward that came to a linear-attention layer
        self._cross: frozenset[int] = frozenset()  # layers that read a picture: they hold it once, and see no events
        super().__init__(*args, **kwargs)

    @property
    def _attention(self) -> Iterator[int]:
        """The layers, by index, that see every column. Every layer of every step asks for the first."""
        return (
            idx
            for idx, layer in enumerate(self.layers)
            if isinstance(layer, CacheLayerMixin) and idx not in self._cross
        )

    @torch.compiler.disable
    def _check_whole(self, layer: CacheLayerMixin | None = None) -> None:
        """Raise RuntimeError when the last forward did not reach every layer; `layer` is the next to be updated.

        At the start of a forward all layers must have seen the same columns. Layers a model never uses stay at 0.
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
        """Whether a forward pass is under way that has not come to the layer yet."""
        layer = self.layers[layer_idx] if layer_idx < len(self.layers) else None
        if not isinstance(layer, CacheLayerMixin):
            return False
        first = self.layers[next(self._attention)]
        return layer.get_seq_length() == self._start < first.get_seq_length()  # type: ignore[union-attr]

    @contextmanager
    def _whole_or_broken(self) -> Iterator[None]:
        """What fails within changes the layers one by one: the cache is then unusable until it is reset."""
        self._broken = HALF_DONE
        yield
        self._broken = None

    # Linear-attention layers: transformers' own, and a note of how far a forward came. Decoding kernels write into the
    # state that they get.

    def has_previous_state(self, layer_idx: int | None = None, *args: Any, **kwargs: Any) -> bool:
        """As transformers' own."""
        if layer_idx is not None:
            self._reached(layer_idx)
        return super().has_previous_state(layer_idx, *args, **kwargs)

    def get_conv_state(self, layer_idx: int, *args: Any, **kwargs: Any) -> Tensor | None:
        """As transformers' own."""
        self._reached(layer_idx)
        return super().get_conv_state(layer_idx, *args, **kwargs)

    def get_recurrent_state(self, layer_idx: int, *args: Any, **kwargs: Any) -> Tensor | None:
        """As transformers' own."""
        self._reached(layer_idx)
        return super().get_recurrent_state(layer_idx, *args, **kwargs)

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Tensor:
        """As transformers' own."""
        with self._whole_or_broken():
            self._reached(layer_idx)
            return super().update_conv_state(conv_states, layer_idx, *args, **kwargs)

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Tensor:
        """As transformers' own."""
        with self._whole_or_broken():
            self._reached(layer_idx)
            return super().update_recurrent_state(recurrent_states, layer_idx, *args, **kwargs)

    @torch.compiler.disable
    def _reached(self, layer_idx: int) -> None:
        first = next(self._attention, None)
        if first is not None and layer_idx < len(self.layers) and _is_linear(self.layers[layer_idx]):
            # the length before this forward: the first attention layer noted it, or still has it
            start = self._start if first < layer_idx else int(self.get_seq_length())
            self._linear_starts[layer_idx] = start

    def _linear_whole(self) -> bool:
        """Whether the last forward came to all linear-attention layers or to none."""
        starts = set(self._linear_starts.values())
        if not starts:
            return True
        # transformers 5.17 makes such layers even where a model has none at all
        all_used = hasattr(transformers.cache_utils, "DummyLayer")
        told = len(self._linear_starts) == sum(_is_linear(layer) for layer in self.layers)
        return starts != {self._start} and len(starts) == 1 and (told or not all_used)


def _is_linear(layer: Any) -> bool:
    """Whether a layer has states without a length, and nothing else."""
    return isinstance(layer, LinearAttentionCacheLayerMixin) and not isinstance(layer, CacheLayerMixin)
