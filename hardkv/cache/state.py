"""The state of one layer of the cache: settings, tiers, queries, and what it knows about the model."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from hardkv.cache.incoming import check_dims
from hardkv.cache.storage.codec import Codec
from hardkv.cache.storage.offload import Offload
from hardkv.cache.storage.pool import Pool
from hardkv.cache.storage.queries import QueryRing
from hardkv.cache.storage.tiers import Tiers
from hardkv.config import HardKVConfig
from hardkv.kernels.autocast import attended_dtype
from hardkv.selectors.budgets import Budget


class EventListener(Protocol):
    """An object that is called after every event of a layer."""

    def event(self, layer: Any) -> None: ...


class LayerState(CacheLayerMixin):
    """The state of one layer. `HardKVLayer` fills it.

    Args:
        settings: what to compress, and when. budget: this layer's budget.
        layer_idx: for messages.

    The cache that makes the layer may set:
        knows_model: whether the cache was built with a model config.
        first: whether it is the first compressed layer. This layer checks masks for all layers.
        shared: whether later layers read the layer's keys again. Its events then wait for its next `update()`.
        temperatures: `[H]`, from a calibration; the budget divides scores by them. None without.
        bits: of keys and of values; those of the settings by default.
        means: of keys and values, `[H, D]` and `[H, Dv]`, from a calibration; a codec subtracts them. None without.
        offloading: keeps the ragged tiers on the host while the layer does not attend. None: they stay on the device.
        latent: whether the model expands what the layer stores. "keys" are then latents and "values" are rotated keys;
            the layer stores both joined, as keys.
    """

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
        self.bits = settings.bits_of_both
        self.means: tuple[Tensor, Tensor] | None = None
        self.offloading: Offload | None = None
        self.pool: Pool | None = None
        self.listener: EventListener | None = None
        self.record_past = False
        self._clear()

    def _clear(self) -> None:
        self.tiers: Tiers | None = None
        self.is_initialized = False
        self.__dict__.pop("batch_size", None)  # Cache.batch_size reads it from layers that have one
        self.committed = 0  # logical length that no crop() of the current round goes below
        self.prompt_length: int | None = None  # columns of the prompt, once it has ended
        self.ring: QueryRing | None = None
        self.scale = 1.0
        self.softcap: float | None = None
        self._module: weakref.ref[torch.nn.Module] | None = None

    @property
    def seen(self) -> int:
        """Logical length: columns stored; pads and evicted tokens count."""
        return 0 if self.tiers is None else self.tiers.seen

    @property
    def events(self) -> int:
        """Selection events so far."""
        return 0 if self.tiers is None else self.tiers.events

    @property
    def codec(self) -> Codec | None:
        """How the ragged tiers quantise their tokens; None: not at all."""
        return None if self.bits == (16, 16) else Codec(self.bits, self.settings.sinks, self.means)

    @property
    def stay_in_dense(self) -> int:
        """How many tokens of a sequence stay in the dense tier at events, if it has so many."""
        return self.settings.window + (0 if self.bits == (16, 16) else self.settings.sinks)

    @property
    def key_dim(self) -> int:
        """Width of the vectors that queries are multiplied with."""
        return self.head_dim + self.value_dim if self.latent else self.head_dim

    def __getstate__(self) -> dict[str, Any]:
        if self.offloading is not None and self.is_initialized and self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()  # copies to the host may still be running
        return self.__dict__ | {"_module": None}  # weak references cannot be pickled

    def __repr__(self) -> str:
        held = f", seen={self.seen}, events={self.events}" if self.is_initialized else ""
        return f"{type(self).__name__}(scorer={self.settings.scorer}, budget={self.budget}{held})"

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Remember shapes, dtypes and device of the first keys `[B, H, q, D]` and values `[B, H, q, Dv]`.

        Under autocast keys and values may have different dtypes. DynamicCache keeps both; attention reads them in a
        third dtype, and this layer stores that one.

        Raises:
            ValueError: the cache quantises, and a head dim is not a multiple of 8.
        """
        check_dims(self.bits, key_states.shape[-1], value_states.shape[-1], self.layer_idx)
        self.dtype, self.device = attended_dtype(key_states), key_states.device
        dense = DynamicLayer().update(key_states[:, :, :0], value_states[:, :, :0])
        self.dense_dtypes = tuple(states.dtype for states in dense)
        self.batch_size, self.num_kv_heads, _, self.head_dim = key_states.shape
        self.value_dim = value_states.shape[-1]
        self.is_initialized = True

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        """Keep all tiers on the device during this block, if the cache keeps them elsewhere."""
        if self.offloading is None or self.tiers is None:
            yield
            return
        self.tiers = self.offloading.arrive(self.layer_idx, self.tiers, self.device)
        try:
            yield
        finally:
            self.tiers = self.offloading.leave(self.layer_idx, self.tiers)

    def tensors(self) -> list[Tensor]:
        """Return every tensor held: keys, values, positions, spare capacity, queries, schedules, data of the budget."""
        if self.tiers is None or self.ring is None:
            return []
        return [*self.tiers.tensors(), self.ring.buffer, self.ring.valid, *self.budget.tensors(self.device)]

    def host_tensors(self) -> list[Tensor]:
        """Return those of `tensors()` that offloading keeps in host memory."""
        if self.tiers is None or self.offloading is None:
            return []
        return [tensor for tier in (self.tiers.condensed, self.tiers.sparse) for tensor in (tier.keys, tier.values)]

    def dense_nbytes(self) -> int:
        """Return the bytes that DynamicCache would hold for the same columns."""
        if not self.seen:
            return 0
        keys, values = (dtype.itemsize for dtype in self.dense_dtypes)
        return self.batch_size * self.num_kv_heads * self.seen * (self.head_dim * keys + self.value_dim * values)
