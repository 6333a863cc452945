"""What a layer of the cache holds and when it is compressed next; what transformers' caches do with their layers."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from hardkv.cache.handles import HeldStates, LogicalLen
from hardkv.cache.handover import use_cache_of_forward
from hardkv.cache.offload import Offload
from hardkv.cache.pool import Pool
from hardkv.cache.queries import QueryRing
from hardkv.cache.tiers import Tiers, sequences_of
from hardkv.cache.trace import Recorder
from hardkv.config import HardKVConfig
from hardkv.kernels.autocast import attended_dtype
from hardkv.selectors.budgets import Budget


class LayerState(CacheLayerMixin):
    """The state of one layer, which crops, reorders, forgets and counts it; `HardKVLayer` fills it.

    Args:
        settings: what and when to compress. budget: this layer's budget.
        layer_idx: for messages.

    The cache that makes it may set:
        knows_model: whether the cache was built with a model config.
        first: whether it is the first that the cache compresses, which looks at masks for all.
        shared: the layer's keys are read again by later layers, so its events wait for its next `update()`.
        temperatures: `[H]`, calibrated before, that the budget divides scores by; None without.
        offloading: what keeps the ragged tiers on the host while they do not attend; None: they stay.
        latent: whether the model expands what it stores: "keys" are then latents, and "values" rotated keys; they are
            stored joined, as keys.
        recorder: is told after every event; None: nobody is.
        pool: where the tiers of an event shall lie; None: they stay where they were made.
    """

    is_compileable = False  # or generate() compiles the model around data-dependent shapes
    is_croppable = True
    is_sliding = False

    def __init__(self, settings: HardKVConfig, budget: Budget, layer_idx: int):
        super().__init__()
        self.settings = settings
        self.budget = budget
        self.layer_idx = layer_idx
        self.knows_model = True
        self.first = False
        self.shared = False
        self.latent = False
        self.temperatures: Tensor | None = None
        self.offloading: Offload | None = None
        self.pool: Pool | None = None
        self.recorder: Recorder | None = None
        self.record_past = False
        self._clear()

    def _clear(self) -> None:
        self.tiers: Tiers | None = None
        self.is_initialized = False
        self.__dict__.pop("batch_size", None)  # Cache.batch_size asks layers that have one
        self.committed = 0  # logical length that no crop() of the current round goes behind
        self.prompt_length: int | None = None  # columns of the prompt once it has ended
        self.ring: QueryRing | None = None
        self.scale = 1.0
        self.softcap: float | None = None
        self._module: weakref.ref[torch.nn.Module] | None = None

    @property
    def seen(self) -> int:
        """Logical length: columns stored, pads and evicted tokens counted."""
        return 0 if self.tiers is None else self.tiers.seen

    @property
    def events(self) -> int:
        """Selection events so far."""
        return 0 if self.tiers is None else self.tiers.events

    @property
    def key_dim(self) -> int:
        """Width of what queries are multiplied with."""
        return self.head_dim + self.value_dim if self.latent else self.head_dim

    # Some models look whether a layer holds any; transformers' constructors set None.
    keys = property(lambda self: self._show("head_dim"), lambda self, states: None)
    values = property(lambda self: self._show("value_dim"), lambda self, states: None)

    def _show(self, width: str) -> HeldStates | None:
        if not self.seen:
            return None
        shape = torch.Size((self.batch_size, self.num_kv_heads, self.seen, getattr(self, width)))
        return HeldStates(shape, self.dtype, self.device)

    def __getstate__(self) -> dict[str, Any]:
        if self.offloading is not None and self.is_initialized and self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # copies to the host may be under way
        return self.__dict__ | {"_module": None}  # weak references cannot be pickled

    def __repr__(self) -> str:
        held = f", seen={self.seen}, events={self.events}" if self.is_initialized else ""
        return f"{type(self).__name__}(scorer={self.settings.scorer}, budget={self.budget}{held})"

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Remember shapes, dtypes and device of the first keys `[B, H, q, D]` and values `[B, H, q, Dv]`.

        Under autocast they may come in two dtypes, which DynamicCache keeps, and attention reads both in a third, which
        is stored.
        """
        self.dtype, self.device = attended_dtype(key_states), key_states.device
        dense = DynamicLayer().update(key_states[:, :, :0], value_states[:, :, :0])
        self.dense_dtypes = tuple(states.dtype for states in dense)
        self.batch_size, self.num_kv_heads, _, self.head_dim = key_states.shape
        self.value_dim = value_states.shape[-1]
        self.is_initialized = True

    # ------------------------------------------------------------------ events

    @property
    def event_due(self) -> bool:
        """Whether the tokens since the last event reach the interval; also once after the first forward."""
        if self.tiers is None:
            return False
        last = self.tiers.compressed_at
        return last is None or self.tiers.seen - last >= self.settings.interval

    @property
    def _event_held(self) -> bool:
        return self.record_past or self.shared

    @property
    def ready(self) -> bool:
        """Whether an event is due and nothing holds it."""
        return self.event_due and not self._event_held

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        """All tiers on the device for a while, where the cache keeps them elsewhere."""
        if self.offloading is None or self.tiers is None:
            yield
            return
        self.tiers = self.offloading.arrive(self.layer_idx, self.tiers, self.device)
        try:
            yield
        finally:
            self.tiers = self.offloading.leave(self.layer_idx, self.tiers)

    def pinned(self, seen: int) -> int:
        """Columns of the prompt that every event keeps; `seen` columns are the prompt's while it has not ended."""
        if not self.settings.pin_prompt:
            return 0
        return seen if self.prompt_length is None else self.prompt_length

    def most_condensed(self, heads: int, length: int, pinned: int) -> tuple[int, bool]:
        """The most tokens that events keep of a sequence beside its window, and whether the budget's total is fixed.

        Args:
            heads: KV heads. length: columns that it will have at most. pinned: those of the prompt that are kept.
        """
        window = self.settings.window
        protected = window + self.settings.sinks + pinned
        total = self.budget.fixed_total(heads, length, protected)
        fixed = total is not None
        if total is None:
            limit = length if self.budget.limit is None else max(self.budget.limit, protected)
            total = heads * min(limit, length)
        return max(total - heads * min(window, length), 0), fixed

    # ------------------------------------------------------------------ cache protocol

    def get_seq_length(self) -> int:
        """Logical length: padding and evicted tokens included."""
        return self.seen

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    @torch.compiler.disable
    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Logical key length of the next forward, marked as ours, and offset 0.

        Raises:
            ValueError: past tokens seem to be fed again.
        """
        if 0 < self.seen < query_length and use_cache_of_forward() is False:
            raise ValueError(
                f"use_cache=False, and {query_length} tokens come after the {self.seen} that this HardKVCache holds: "
                "past tokens seem to be fed again, and would be held twice. Pass only new tokens and use_cache=True "
                "(where nobody passed False, the model's config.use_cache says so), or no past_key_values"
            )
        return LogicalLen(self.seen + query_length, self.layer_idx), 0

    def activate_past_recording(self) -> None:
        """Hold events until `crop()` or the next forward, so that a draft can be taken back (assisted decoding)."""
        self.record_past = True
        self.committed = self.seen

    def check_crop(self, tokens_to_remove: int) -> int:
        """The logical length after `crop(tokens_to_remove)`.

        Raises:
            ValueError: positive, or further back than the newest `window` columns before the last event.
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
        """Take back the newest columns; the cache then runs the events that were held for it.

        Args:
            tokens_to_remove: zero or negative, minus the columns to forget.

        Raises:
            ValueError: see `check_crop`.
        """
        length = self.check_crop(tokens_to_remove)
        if self.seen and length == 0:
            return self._clear()  # and go on recording
        tiers, prompt_length = self.tiers, self.prompt_length
        if tiers is not None and length < tiers.seen:
            tiers = tiers.cropped(length)
            prompt_length = None if prompt_length is None else min(prompt_length, length)
        # one statement without calls: an interrupt comes before all of it or after
        self.tiers, self.prompt_length, self.committed = tiers, prompt_length, length

    def reset(self) -> None:
        """Forget everything, settings apart."""
        self.record_past = False
        self._clear()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Pick sequences of the batch, in order (beam search)."""
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
        """Refused: transformers' offloading would take a layer away before its attention."""
        raise NotImplementedError("a layer of HardKVCache moves by itself: HardKVCache(..., offload=True)")

    prefetch = offload

    # ------------------------------------------------------------------ introspection

    def tensors(self) -> list[Tensor]:
        """Every tensor held: keys, values, positions, spare capacity, queries, schedules, what the budget needs."""
        if self.tiers is None or self.ring is None:
            return []
        return [*self.tiers.tensors(), self.ring.buffer, self.ring.valid, *self.budget.tensors(self.device)]

    def host_tensors(self) -> list[Tensor]:
        """Those of `tensors()` that offloading keeps in host memory."""
        if self.tiers is None or self.offloading is None:
            return []
        return [tensor for tier in (self.tiers.condensed, self.tiers.sparse) for tensor in (tier.keys, tier.values)]

    def dense_nbytes(self) -> int:
        """Bytes that DynamicCache would hold for the same columns."""
        if not self.seen:
            return 0
        keys, values = (dtype.itemsize for dtype in self.dense_dtypes)
        return self.batch_size * self.num_kv_heads * self.seen * (self.head_dim * keys + self.value_dim * values)
