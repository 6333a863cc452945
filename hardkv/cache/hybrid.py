"""A compressed layer that also holds the state of a linear attention or a convolution. That state is not compressed."""

from typing import Any

from torch import Tensor
from transformers.cache_utils import LinearAttentionAndFullAttentionLayer, LinearAttentionLayer

from hardkv.cache.layer import HardKVLayer
from hardkv.cache.storage.memory import storage_nbytes
from hardkv.cache.storage.tiers import sequences_of
from hardkv.config import HardKVConfig
from hardkv.selectors.budgets import Budget


class HybridLayer(HardKVLayer, LinearAttentionAndFullAttentionLayer):  # type: ignore[misc]
    """A `HardKVLayer` for keys and values, and transformers' own layer for the states. Models check for its base type.

    Args:
        settings, budget, layer_idx: see `HardKVLayer`. number_of_states: of the linear part.
    """

    def __init__(self, settings: HardKVConfig, budget: Budget, layer_idx: int, number_of_states: int = 1):
        HardKVLayer.__init__(self, settings, budget, layer_idx)
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)

    def lazy_initialization(self, *args: Tensor, **kwargs: Any) -> None:  # type: ignore[override]
        """Initialize for keys and values (positional arguments) or for a state (keywords), as transformers calls it."""
        if args:
            HardKVLayer.lazy_initialization(self, *args)
        else:
            LinearAttentionLayer.lazy_initialization(self, **kwargs)

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """Whether the states allow a crop; a recurrent state cannot go back."""
        return LinearAttentionLayer.is_croppable.fget(self)  # type: ignore[attr-defined]

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest columns of both parts; see `HardKVLayer.crop`."""
        self.check_crop(tokens_to_remove)
        LinearAttentionLayer.crop(self, tokens_to_remove)
        HardKVLayer.crop(self, tokens_to_remove)

    def reset(self) -> None:
        """Forget everything except settings."""
        LinearAttentionLayer.reset(self)
        HardKVLayer.reset(self)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given sequences of the batch, in that order (int64, or bool over the batch)."""
        HardKVLayer.batch_select_indices(self, indices)
        LinearAttentionLayer.reorder_cache(self, sequences_of(indices, self.device))  # type: ignore[arg-type]

    def states(self) -> list[Tensor]:
        """Return the states of the linear part."""
        groups = [*self.conv_states.values(), *self.recurrent_states.values()]
        return [state for state in groups if state is not None]

    def tensors(self) -> list[Tensor]:
        """Return every tensor held by either part."""
        return [*HardKVLayer.tensors(self), *self.states()]

    def dense_nbytes(self) -> int:
        """Return the bytes that DynamicCache would hold for the same columns."""
        return HardKVLayer.dense_nbytes(self) + storage_nbytes(self.states())
