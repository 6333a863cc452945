"""The methods that transformers' caches call on their layers: lengths, crop, reorder, repeat, reset."""

import torch
from torch import Tensor

from hardkv.cache.routing.handles import HeldStates, LogicalLen
from hardkv.cache.state import LayerState
from hardkv.cache.storage.tiers import sequences_of


class LayerProtocol(LayerState):
    """A layer as transformers' caches and models see it. `LayerState` has the data."""

    is_compileable = False  # otherwise generate() compiles the model although shapes depend on data
    is_croppable = True
    is_sliding = False

    # Some models check whether a layer has keys; transformers' constructors set None.
    keys = property(lambda self: self._show("head_dim"), lambda self, states: None)
    values = property(lambda self: self._show("value_dim"), lambda self, states: None)

    def _show(self, width: str) -> HeldStates | None:
        if not self.seen:
            return None
        shape = torch.Size((self.batch_size, self.num_kv_heads, self.seen, getattr(self, width)))
        return HeldStates(shape, self.dtype, self.device)

    def get_seq_length(self) -> int:
        """Return the logical length; padding and evicted tokens count."""
        return self.seen

    def get_max_length(self) -> int:
        """Return -1: there is no maximum."""
        return -1

    @torch.compiler.disable
    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the logical key length of the next forward, marked as ours, and offset 0."""
        return LogicalLen(self.seen + query_length, self.layer_idx), 0

    def activate_past_recording(self) -> None:
        """Hold events until `crop()` or the next forward, so that a draft can be removed (assisted decoding)."""
        self.record_past = True
        self.committed = self.seen

    def check_crop(self, tokens_to_remove: int) -> int:
        """Return the logical length after `crop(tokens_to_remove)`.

        Raises:
            ValueError: the number is positive, or goes back beyond the newest `window` columns before the last event.
        """
        remove = -int(tokens_to_remove)
        if remove < 0:
            raise ValueError(
                f"crop({-remove}): pass minus the number of tokens to remove; an absolute length is not supported"
            )
        length = max(0, self.seen - remove)
        last = None if self.tiers is None else self.tiers.compressed_at
        kept_from = 0 if last is None else last - self.settings.window
        if remove and 0 < length < kept_from:
            raise ValueError(
                f"crop({-remove}) would go back to {length} tokens, but tokens before {kept_from} are already "
                "compressed: crop less, use a larger window, or reset()"
            )
        return length

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest columns. The cache then runs the events that were held back.

        Args:
            tokens_to_remove: minus the number of columns to remove; zero or negative.

        Raises:
            ValueError: see `check_crop`.
        """
        length = self.check_crop(tokens_to_remove)
        if self.seen and length == 0:
            return self._clear()  # and continue recording
        tiers, prompt_length = self.tiers, self.prompt_length
        if tiers is not None and length < tiers.seen:
            tiers = tiers.cropped(length)
            prompt_length = None if prompt_length is None else min(prompt_length, length)
        # one statement without calls: an interrupt comes before all of it or after all of it
        self.tiers, self.prompt_length, self.committed = tiers, prompt_length, length

    def reset(self) -> None:
        """Forget everything except settings."""
        self.record_past = False
        self._clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Select sequences of the batch, in the given order (beam search)."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence of the batch."""
        if self.seen:
            self.batch_select_indices(torch.arange(self.batch_size, device=self.device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given sequences of the batch, in that order (int64, or bool over the batch)."""
        if self.tiers is None or self.ring is None:
            return
        indices = sequences_of(indices, self.device)
        with self._on_device():
            tiers, ring = self.tiers.select_sequences(indices), self.ring.select_sequences(indices)
            self.tiers, self.ring, self.batch_size = tiers, ring, indices.shape[0]

    def offload(self) -> None:
        """Raise NotImplementedError: transformers' offloading would move a layer before its attention."""
        raise NotImplementedError("a layer of HardKVCache moves by itself: HardKVCache(..., offload=True)")

    prefetch = offload
