"""HardKVCache, the cache that users pass to `generate(past_key_values=...)`."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from os import PathLike
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, LinearAttentionCacheLayerMixin

from hardkv.cache.build import LayerFactory, build_layers, build_unknown_layer, check_unknown, make_layer
from hardkv.cache.handover import GivenCache
from hardkv.cache.hybrid import HybridLayer
from hardkv.cache.incoming import check_rows, check_shape
from hardkv.cache.layer import HardKVLayer
from hardkv.cache.model import Traits
from hardkv.cache.record.contents import batch_size_of, tensors_of
from hardkv.cache.record.recorder import Recorder
from hardkv.cache.record.stats import Stats, Steps
from hardkv.cache.record.trace import Trace
from hardkv.cache.routing.handles import KVHandle, LogicalLen
from hardkv.cache.routing.registry import install
from hardkv.cache.schedule import EventSchedule, run_events
from hardkv.cache.storage.memory import storage_nbytes
from hardkv.cache.storage.offload import Offload
from hardkv.cache.storage.tiers import TIERS
from hardkv.calibration.file import Calibration
from hardkv.config import HardKVConfig
from hardkv.selectors.budgets import Budget
from hardkv.selectors.observation import Observation
from hardkv.selectors.scorers.scorer import Scorer


class HardKVCache(GivenCache):
    """Head-adaptive KV-cache compression at decoding time: each KV head keeps its own tokens, the rest is freed.

    Pass it to any forward or `generate()` of an unmodified decoder. Full-attention layers are compressed after the
    prompt and every `interval` tokens; sliding-window and linear-attention layers stay as DynamicCache has them. With
    latent attention (MLA), the cache keeps or drops latents, for all heads at once. `output_attentions=True` gives
    weights for the first forward only. Gradients in the first forward equal those of DynamicCache. Stored tokens carry
    no autograd graph, so `backward()` through a later forward raises RuntimeError.

    Args:
        config: `model.config`, or the model, which `calibration="auto"` needs. Without it, every layer of the model
            must use full attention.
        scorer, budget, window, sinks, interval, patience, pin_prompt, calibration, refit, attention, offload, bits: see
            `HardKVConfig`.

    Raises:
        ValueError, TypeError: an argument is not allowed.

    Example:
        ```python
        >>> from hardkv import HardKVCache
        >>> cache = HardKVCache(config=model.config, scorer="snapkv", budget=512)
        >>> out = model.generate(**inputs, past_key_values=cache, max_new_tokens=1024)
        >>> print(cache.stats())
        ```
    """

    _make_layer: LayerFactory = staticmethod(make_layer)

    def __init__(
        self,
        config: Any = None,
        *,
        scorer: "str | Scorer | dict[str, Any]" = HardKVConfig.scorer,
        budget: "int | Budget | dict[str, Any]" = HardKVConfig.budget,
        window: int = HardKVConfig.window,
        sinks: int = HardKVConfig.sinks,
        interval: int = HardKVConfig.interval,
        patience: int = HardKVConfig.patience,
        pin_prompt: bool = HardKVConfig.pin_prompt,
        calibration: "str | PathLike[str] | Calibration | None" = HardKVConfig.calibration,
        refit: int = HardKVConfig.refit,
        attention: str = HardKVConfig.attention,
        offload: bool = HardKVConfig.offload,
        bits: "int | tuple[int, int] | str" = HardKVConfig.bits,
    ):
        self.settings = HardKVConfig(
            scorer, budget, window, sinks, interval, patience, pin_prompt, calibration, refit, attention, offload, bits
        )
        self._offload = Offload() if offload else None
        self._schedule: EventSchedule | None = None
        self.steps: Steps | None = None  # set by hardkv.decoding.generate
        self.warnings: list[str] = []
        self._recorder: Recorder | None = None
        model = config if isinstance(config, torch.nn.Module) else None
        config = getattr(model, "config", config)
        super().__init__(config=config)
        install()
        if config is None:
            check_unknown(self.settings)
            return
        traits = Traits.of(config)
        self._cross = traits.cross_attention_layers
        make, warn = self._make_layer, self._warn
        self.layers = build_layers(traits, self.settings, self.layers, self._offload, make, warn, model)
        if not offload:
            self._schedule = EventSchedule(self._compressed)

    def _warn(self, message: str) -> None:
        """Warn once, and list the message in `stats()` from then on."""
        if message not in self.warnings:
            self.warnings.append(message)
            warnings.warn(message, stacklevel=4)  # points at the call of HardKVCache(...)

    @property
    def _compressed(self) -> list[HardKVLayer]:
        return [layer for layer in self.layers if isinstance(layer, HardKVLayer)]

    # ------------------------------------------------------------------ cache protocol

    @torch.compiler.disable
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> "tuple[KVHandle, KVHandle] | tuple[Tensor, Tensor]":
        """Take new keys `[B, H, q, D]` and values of a layer. A HardKV layer returns handles for attention.

        Raises:
            RuntimeError: an earlier forward pass failed between layers, or the model has more layers than the config.
            ValueError: shapes differ from what the cache holds.
        """
        if self.layer_class_to_replicate is not None:  # built without a config: make layers when they are first used
            while len(self.layers) <= layer_idx:
                idx = len(self.layers)
                self.layers.append(build_unknown_layer(idx, self.settings, self._offload, self._make_layer))
        elif layer_idx >= len(self.layers):
            raise RuntimeError(
                f"layer {layer_idx} asks for a cache of {len(self.layers)} layers: it was built with another model's "
                "config; use HardKVCache(config=model.config)"
            )
        layer = self.layers[layer_idx]
        if isinstance(layer, CacheLayerMixin) and layer_idx not in self._cross:
            self._check_whole(layer)
            if not isinstance(layer, HardKVLayer):
                check_shape(layer, layer_idx, key_states)
                with self._whole_or_broken():
                    return layer.update(key_states, value_states, *args, **kwargs)
        if self._offload is not None and isinstance(layer, HardKVLayer):
            for each in (layer, self._after(layer_idx)):  # fetch the next layer while this one computes
                if each is not None and each.tiers is not None:
                    self._offload.fetch(each.layer_idx, each.tiers, each.device)
        if self._schedule is not None:
            self._schedule.finish()
        if isinstance(layer, HardKVLayer):
            return layer.update(key_states, value_states, *args, schedule=self._schedule, **kwargs)
        return layer.update(key_states, value_states, *args, **kwargs)  # type: ignore[union-attr]

    def _after(self, layer_idx: int) -> HardKVLayer | None:
        """Return the next compressed layer, or None."""
        return next((layer for layer in self.layers[layer_idx + 1 :] if isinstance(layer, HardKVLayer)), None)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return the key length and offset that the layer's mask must cover; see `HardKVLayer.get_mask_sizes`."""
        if not self._is_next(layer_idx):  # most models make masks before the first layer runs, some in each layer
            self._check_whole()
        if layer_idx >= len(self.layers):
            return LogicalLen(query_length, layer_idx), 0
        return super().get_mask_sizes(query_length, layer_idx)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the newest `-tokens_to_remove` columns from all layers, or (ValueError) none; see `HardKVLayer.crop`.

        Then run the events that were held back for it.
        """
        self._check_whole()
        for ours in self._compressed:
            ours.check_crop(tokens_to_remove)
        self.forget_ids()

        def ours_alone(layer: Any) -> bool:
            return isinstance(layer, HardKVLayer) and not isinstance(layer, HybridLayer)

        layers: list[Any] = sorted(self.layers, key=ours_alone)  # ours last: transformers' layers may refuse
        with self._whole_or_broken():
            for layer in layers:
                try:
                    layer.crop(tokens_to_remove)
                except (RuntimeError, ValueError) as error:
                    if layer is layers[0] and not isinstance(error, torch.OutOfMemoryError):
                        self._broken = None  # the first layer refused, so nothing has changed
                    raise
            self._linear_starts.clear()
            if self._recorder is not None:
                self._recorder.crop()
        due = [layer for layer in self._compressed if layer.record_past and layer.event_due]
        if self._offload is None:
            run_events(due)
        else:
            for layer in due:  # one at a time on the device
                layer.compress()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Select sequences of the batch, in the given order (beam search).

        Raises:
            IndexError: the batch has no such sequence.
        """
        self._check_rows(beam_idx)
        with self._whole_or_broken():
            super().reorder_cache(beam_idx)
            if self._recorder is not None:
                self._recorder.select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence of the batch."""
        self._check_whole()
        with self._whole_or_broken():
            super().batch_repeat_interleave(repeats)
            if self._recorder is not None:
                self._recorder.repeat(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given sequences of the batch, in that order (int64, or bool over the batch).

        Raises:
            IndexError: the batch has no such sequence.
        """
        self._check_rows(indices)
        with self._whole_or_broken():
            super().batch_select_indices(indices)
            if self._recorder is not None:
                self._recorder.select(indices)

    def _check_rows(self, indices: Tensor) -> None:
        self._check_whole()
        check_rows(indices, max((batch_size_of(layer) for layer in self.layers), default=0))

    def reset(self) -> None:
        """Forget every token. Settings stay."""
        with self._whole_or_broken():
            if self._offload is not None:
                self._offload.forget()
            super().reset()
            for layer in self.layers:
                if isinstance(layer, DynamicLayer) and not isinstance(layer, LinearAttentionCacheLayerMixin):
                    # transformers 5.17 sets these to zero and keeps their length
                    layer.is_initialized = False  # first: an interrupt after it leaves a layer that can be reset
                    layer.keys = layer.values = None
            self._linear_starts.clear()
            if self._recorder is not None:
                self._recorder.crop()

    # ------------------------------------------------------------------ introspection

    @contextmanager
    def record(self) -> Iterator[Trace]:
        """Record what every KV head holds after every selection event, for `hardkv.viz` or to `save`.

        The trace gets a snapshot at the start, if the cache holds tokens, after every event, and at the end. While
        recording, each event copies its positions to the host and waits for the copy. Steps between events cost nothing
        extra. Caches that are not recorded pay nothing. After a reorder of the batch (beam search), the trace shows the
        sequences that are left. `crop()` removes its columns from the trace, and `reset()` empties it.

        Returns:
            A context manager that gives the `Trace`, which grows while the block runs.

        Raises:
            RuntimeError: the cache is recorded already. ValueError: nothing is compressed, or the cache was built
                without `config` and does not know the model's layers yet.

        Example:
            ```python
            >>> with cache.record() as trace:
            ...     out = model.generate(**inputs, past_key_values=cache, max_new_tokens=1024)
            >>> trace.save("run.npz")
            ```
        """
        if self._recorder is not None:
            raise RuntimeError("this HardKVCache is recorded already: leave the other record() block first")
        recorder = self._recorder = Recorder(self)
        recorder.listen()
        try:
            yield recorder.trace
            if self._broken is None:
                recorder.finish(self)
        finally:
            self._recorder = None
            recorder.stop()

    def kept(self, layer_idx: int) -> list[list[Tensor]]:
        """Return the positions (columns, pads counted) that a layer reads: ascending int64 `[batch][kv_head]`.

        Raises:
            ValueError: this cache does not compress the layer.
        """
        layer = self._layer(layer_idx)
        return [] if layer.tiers is None else layer.tiers.kept()

    def observe(self, layer_idx: int) -> Observation:
        """Return what an event would show the scorer now: the layer's held tokens and its newest queries.

        Raises:
            ValueError: this cache does not compress the layer, or the layer holds nothing yet.
        """
        layer = self._layer(layer_idx)
        if layer.tiers is None:
            raise ValueError(f"layer {layer_idx} holds nothing yet: run a forward pass with this cache first")
        return layer.observe()

    def _layer(self, layer_idx: int) -> HardKVLayer:
        layer = self.layers[layer_idx] if -len(self.layers) <= layer_idx < len(self.layers) else None
        if not isinstance(layer, HardKVLayer):
            which = [idx for idx, other in enumerate(self.layers) if isinstance(other, HardKVLayer)]
            raise ValueError(f"layer_idx={layer_idx} is not compressed by this cache; compressed layers: {which}")
        return layer

    def lengths(self, tier: str | None = None) -> Tensor:
        """Return the tokens held per layer, sequence and KV head, int64 `[layers, batch, kv_heads]` on the CPU.

        Only layers that this cache compresses are listed, in order; layers with fewer heads are padded with 0.

        Args:
            tier: None for what attention reads (condensed and dense), or "condensed", "sparse", "dense".

        Raises:
            ValueError: `tier` is something else.
        """
        if tier is not None and tier not in TIERS:
            raise ValueError(f"tier={tier!r} must be None or one of {TIERS}")
        layers = [layer.tiers.lengths(tier).cpu() for layer in self._compressed if layer.tiers is not None]
        if not layers:
            return torch.zeros(0, 0, 0, dtype=torch.int64, device="cpu")
        heads = max(layer.shape[1] for layer in layers)
        return torch.stack([F.pad(layer, (0, heads - layer.shape[1])) for layer in layers])

    def nbytes(self) -> int:
        """Return the bytes truly held by all layers, compressed or not. Each storage counts once."""
        pools = [] if self.steps is None else self.steps.tensors()
        return storage_nbytes([*pools, *(tensor for layer in self.layers for tensor in tensors_of(layer))])

    def host_nbytes(self) -> int:
        """Return the part of `nbytes()` that `offload=True` keeps in host memory. The rest is on the devices."""
        return storage_nbytes(tensor for layer in self._compressed for tensor in layer.host_tensors())

    def dense_nbytes(self) -> int:
        """Return the bytes that DynamicCache would hold for the same sequences."""
        return sum(
            layer.dense_nbytes() if isinstance(layer, HardKVLayer) else storage_nbytes(tensors_of(layer))
            for layer in self.layers
        )

    def stats(self) -> Stats:
        """Return a snapshot to print or to log."""
        return Stats.of(self)
