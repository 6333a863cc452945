"""A compressed layer that also carries the state of a linear attention or a convolution, which stays as it is."""

from typing import Any

from torch import Tensor
from transformers.cache_utils import LinearAttentionAndFullAttentionLayer, LinearAttentionLayer

from hardkv.cache.layer import HardKVLayer
from hardkv.cache.storage.memory import storage_nbytes
from hardkv.cache.storage.tiers import sequences_of
from hardkv.config import HardKVConfig
from hardkv.selectors.budgets import Budget


class HybridLayer(HardKVLayer, LinearAttentionAndFullAttentionLayer):  # type: ignore[misc]
    """`HardKVLayer` for the keys and values, transformers' own layer for the states; of the type that models look for.

    Args:
        settings, budget, layer_idx: see `HardKVLayer`. number_of_states: of the linear part.
    """

    def __init__(self, settings: HardKVConfig, budget: Budget, layer_idx: int, number_of_states: int = 1):
        HardKVLayer.__init__(self, settings, budget, layer_idx)
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)

    def lazy_initialization(self, *args: Tensor, **kwargs: Any) -> None:  # type: ignore[override]
        """Of the keys and values, positional, or of a state, by keyword: as transformers calls it."""
        if args:
            HardKVLayer.lazy_initialization(self, *args)
        else:
            LinearAttentionLayer.lazy_initialization(self, **kwargs)

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        """A recurrent state cannot go back."""
        return LinearAttentionLayer.is_croppable.fget(self)  # type: ignore[attr-defined]

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the newest columns of both parts; see `HardKVLayer.crop`."""
        self.check_crop(tokens_to_remove)
        LinearAttentionLayer.crop(self, tokens_to_remove)
        HardKVLayer.crop(self, tokens_to_remove)

    def reset(self) -> None:
        """Forget everything, settings apart."""
        LinearAttentionLayer.reset(self)
        HardKVLayer.reset(self)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given sequences of the batch, in that order (int64, or bool over the batch)."""
        HardKVLayer.batch_select_indices(self, indices)
        LinearAttentionLayer.reorder_cache(self, sequences_of(indices, self.device))  # type: ignore[arg-type]

    def states(self) -> list[Tensor]:
        """What the linear part holds."""
        groups = [*self.conv_states.values(), *self.recurrent_states.values()]
        return [state for state in groups if state is not None]

    def tensors(self) -> list[Tensor]:
        """Every tensor held by either part."""
        return [*HardKVLayer.tensors(self), *self.states()]

    def dense_nbytes(self) -> int:
        """Bytes that DynamicCache would hold for the same columns."""
        return HardKVLayer.dense_nbytes(self) + storage_nbytes(self.states())
