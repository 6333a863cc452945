"""transformers' sliding-window layers during static steps: a ring of tokens at fixed addresses."""

import torch
from torch import Tensor
from transformers.cache_utils import DynamicSlidingWindowLayer

from hardkv.kernels.attention import attend_tiers
from hardkv.kernels.rows import Rows

# A position after every column: queries never see a token with it.
LAST = torch.iinfo(torch.int32).max


class StaticWindow:
    """The newest W columns of a layer. Column c lies in slot c % W; a step overwrites a column that it does not see.

    A query sees its own column and the W - 1 before it, which are the ones that transformers holds. Pads are stored
    like other columns, with a position that hides them, so the layer gets back exactly what it would have held.

    Args:
        layer: after a prefill. attention: see `kernels.attention.backend_for`.
    """

    def __init__(self, layer: DynamicSlidingWindowLayer, attention: str):
        assert layer.keys is not None
        assert layer.values is not None
        self.layer, self.attention, self.size = layer, attention, layer.sliding_window
        batch, heads, _, _ = layer.keys.shape
        dtype, device = self._dtype(layer), layer.keys.device
        with torch.inference_mode(False):
            self.keys, self.values = (  # [B, H, W, D]
                torch.empty(*states.shape[:2], self.size, states.shape[3], dtype=dtype, device=device)
                for states in (layer.keys, layer.values)
            )
            self.positions = torch.zeros(batch, self.size, dtype=torch.int32, device=device)
            self.fill = torch.zeros(batch, dtype=torch.int64, device=device)
            self.nothing = Rows(torch.zeros(batch * heads + 1, dtype=torch.int32, device=device), 0, 0)
            self._hidden = torch.zeros(1, 1, 1, dtype=torch.bool, device=device)
        self.padded = False  # whether any column may be hidden

    @staticmethod
    def _dtype(layer: DynamicSlidingWindowLayer) -> torch.dtype:
        """Return one dtype for keys and values. Under autocast they may have two."""
        assert layer.keys is not None
        assert layer.values is not None
        return torch.promote_types(layer.keys.dtype, layer.values.dtype)

    def fits(self, layer: DynamicSlidingWindowLayer) -> bool:
        """Return whether the ring fits the layer as it is now."""
        keys = layer.keys
        return (
            layer is self.layer
            and keys is not None
            and keys.shape[:2] == self.keys.shape[:2]
            and self._dtype(layer) == self.keys.dtype
            and keys.device == self.keys.device
        )

    def load(self, padding: Tensor | None) -> None:
        """Copy the layer's tokens. `padding`, bool `[B, columns so far]`, says which columns hold tokens; None: all."""
        slots, columns = self._newest(self.layer.cumulative_length)
        if padding is not None:
            padding = padding[:, columns]
        self.padded = padding is not None and not bool(padding.all())
        for ring, states in ((self.keys, self.layer.keys), (self.values, self.layer.values)):
            assert states is not None
            ring.index_copy_(2, slots, states[:, :, states.shape[2] - slots.shape[0] :].to(ring.dtype))
        positions = columns.to(torch.int32).expand(self.fill.shape[0], -1)
        self.positions[:, slots] = positions if padding is None else positions.masked_fill(~padding, LAST)

    def give_back(self, seen: int) -> None:
        """Give the layer the tokens that it would hold after `seen` columns."""
        if self.layer.cumulative_length != seen:
            slots, _ = self._newest(seen)
            assert self.layer.keys is not None
            assert self.layer.values is not None
            keys = self.keys.index_select(2, slots).to(self.layer.keys.dtype)
            values = self.values.index_select(2, slots).to(self.layer.values.dtype)
            self.layer.keys, self.layer.values, self.layer.cumulative_length = keys, values, seen

    def _newest(self, seen: int) -> tuple[Tensor, Tensor]:
        """Return slots and columns, both int64 `[min(seen, W - 1)]`, of what the layer holds after `seen` columns."""
        columns = torch.arange(max(0, seen - self.size + 1), seen, device=self.keys.device)
        return columns % self.size, columns

    def attend(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        column: Tensor,
        store: bool,
        *,
        scale: float,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """Attend as `StaticDecoding.attend` does; the token is that of `column`, int64 `[1]`."""
        if store:
            slot, batch = column % self.size, self.fill.shape[0]
            self.keys.index_copy_(2, slot, keys)
            self.values.index_copy_(2, slot, values)
            self.positions.index_copy_(1, slot, column.to(torch.int32).expand(batch, 1))
            self.fill.copy_((column + 1).clamp_max(self.size).expand(batch))
        out, _ = attend_tiers(
            query,
            keys.new_empty(0, keys.shape[3]),
            values.new_empty(0, values.shape[3]),
            self.nothing,
            self.keys,
            self.values,
            self.positions,
            self.fill,
            bound=self.size,
            start=LAST,
            scale=scale,
            softcap=softcap,
            sinks=sinks,
            new_mask=self._hidden if self.padded else None,
            attention=self.attention,
        )
        return out

    def tensors(self) -> list[Tensor]:
        """Return all tensors held, for counting bytes."""
        return [self.keys, self.values, self.positions, self.fill, self._hidden, *self.nothing.tensors()]
