"""What a layer of a cache holds, for our layers and for those of transformers."""

from typing import Any

from torch import Tensor

from hardkv.cache.layer import HardKVLayer


def tensors_of(layer: Any) -> list[Tensor]:
    """Return every tensor that a layer holds."""
    if isinstance(layer, HardKVLayer):
        return layer.tensors()
    states = [getattr(layer, name, None) for name in ("keys", "values", "conv_states", "recurrent_states")]
    flat = [state for group in states for state in (group.values() if isinstance(group, dict) else [group])]
    return [state for state in flat if isinstance(state, Tensor)]


def batch_size_of(layer: Any) -> int:
    """Return the number of sequences that a layer holds; 0 before the first token."""
    if isinstance(layer, HardKVLayer):
        return layer.batch_size if layer.seen else 0
    return next((tensor.shape[0] for tensor in tensors_of(layer)), 0)
