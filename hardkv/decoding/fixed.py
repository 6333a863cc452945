"""Storage at fixed addresses, and a decode step that does not change the host's numbers: what a CUDA graph replays.

Between two events only the dense tier's fill and the column of the next token change, and both live on the device.
`StaticDecoding.settle` updates the host's numbers (`Tiers.seen`, the dense tier's bound) later. An event makes new
tiers as usual, and the layer's `Pool` copies them to the old addresses.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicSlidingWindowLayer, LinearAttentionCacheLayerMixin

from hardkv.cache.layer import HardKVLayer
from hardkv.cache.schedule import run_events
from hardkv.cache.storage.pool import Pool
from hardkv.decoding.fixed_tokens import current
from hardkv.decoding.sliding import LAST, StaticWindow
from hardkv.kernels.append import append_step
from hardkv.kernels.autocast import suspended


class StaticDecoding:
    """The layers of a cache at fixed addresses, in pools and windows. They step one token at a time.

    Linear-attention layers already update their states in place.

    Args:
        layers: of the cache, after a prefill. length: the most columns that the cache will see; it bounds what budgets
            with fixed totals keep. attention: see `kernels.attention.backend_for`.
    """

    def __init__(self, layers: Sequence[Any], length: int, attention: str):
        self.layers = compressed_of(layers)
        self.linear = linear_of(layers)
        self.pools: dict[int, Pool] = {}
        self.windows = {idx: StaticWindow(layer, attention) for idx, layer in sliding_of(layers).items()}
        self.seen = 0  # columns, as the host's numbers say
        self.steps = 0  # steps that the host's numbers do not include yet
        self.midway = False  # whether a step has begun but not ended
        self.filled = torch.empty(0)  # int64 [layers, B], fill of the dense tiers, as the host's numbers say
        attended: list[Any] = [*self.layers.values(), *sliding_of(layers).values()]
        with torch.inference_mode(False):
            self.column = torch.zeros(1, dtype=torch.int64, device=attended[0].device)
        for idx, layer in self.layers.items():  # one by one: each frees its old tiers once its pool has them
            self.pools[idx] = _pool(layer, length)
            self._hold(idx)

    def fits(self, layers: Sequence[Any], length: int) -> bool:
        """Return whether the pools and windows fit these layers as they are now."""
        compressed, sliding = compressed_of(layers), sliding_of(layers)
        return (
            compressed.keys() == self.pools.keys()
            and sliding.keys() == self.windows.keys()
            and all(self.windows[idx].fits(layer) for idx, layer in sliding.items())
            and all(self.linear.get(idx) is layer for idx, layer in linear_of(layers).items())
            and all(
                self.layers[idx] is layer
                and layer.tiers is not None
                and layer.ring is not None
                and layer.ring.capacity == self.pools[idx].ring.capacity
                and self.pools[idx].fits(layer.tiers)
                and self.pools[idx].room >= _room(layer, length)
                for idx, layer in compressed.items()
            )
        )

    @property
    def addresses(self) -> tuple[int, ...]:
        """Addresses of the memory that may move. A graph captured with other addresses is stale."""
        held = [tensor for pool in self.pools.values() for tensor in pool.tokens]
        held += states_of(self.linear)
        return tuple(tensor.data_ptr() for tensor in held)

    @property
    def padded(self) -> tuple[bool, ...]:
        """Per window, whether it hides pads. Windows that do use other kernels."""
        return tuple(window.padded for window in self.windows.values())

    def hold(self, seen: int, padding: Tensor | None) -> None:
        """Copy every layer's tokens to its pool or window.

        Args:
            seen: columns so far. padding: bool `[B, seen]`, which columns hold tokens; None: all.
        """
        assert not self.steps
        self.seen, self.midway = seen, False
        self.column.fill_(seen)
        for idx in self.layers:
            self._hold(idx)
        self._note_fill()
        for window in self.windows.values():
            window.load(padding)

    def _hold(self, idx: int) -> None:
        self.layers[idx].hold_in(self.pools[idx])

    def _note_fill(self) -> None:
        if self.pools:
            self.filled = torch.stack([pool.dense.fill for pool in self.pools.values()])

    @property
    def event_due(self) -> bool:
        """Whether the tokens since the last event reach the interval."""
        first = next(iter(self.layers.values()), None)
        if first is None:
            return False
        assert first.tiers is not None
        last = first.tiers.compressed_at
        return last is None or self.seen + self.steps - last >= first.settings.interval

    def compress(self) -> None:
        """Run an event of every layer, and move the new tiers to the pools, one layer after the other."""
        self._count()
        with self.placing():
            run_events(list(self.layers.values()))
        self._note_fill()

    @contextmanager
    def placing(self) -> Iterator[None]:
        """Put the new tiers of events inside this block into the pools at once, so that they need no second copy.

        If something fails inside, the tiers are not usable any more.
        """
        for idx, layer in self.layers.items():
            layer.place_events(self.pools[idx])
        try:
            yield
        finally:
            for layer in self.layers.values():
                layer.place_events(None)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Run a forward of one new token per sequence inside this block: it reads and writes the pools.

        Raises:
            NotImplementedError: the model moved the state of a linear attention.
        """
        current.attend, self.midway, before = self.attend, True, self.addresses
        try:
            yield
        finally:
            current.attend = None
        if self.addresses != before:
            raise NotImplementedError(
                "custom_generate=graphed needs the states of linear attention to stay where they are, and this model "
                "makes new ones at every step: leave out custom_generate=graphed"
            )
        self.column += 1
        self.midway = False

    def attend(
        self,
        layer_idx: int,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        store: bool,
        *,
        scale: float,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """Store one token per sequence and attend, as `HardKVLayer.decode` does, without involving the host.

        Args:
            query: `[B, Hq, 1, D]`; keys: `[B, H, 1, D]`; values: `[B, H, 1, Dv]`, for latents the first part of the
                keys.
            store: whether the token is new; False if a later layer reads it again.
            scale, softcap, sinks: as in `kernels.attention.attend_tiers`.

        Returns:
            `[B, Hq, 1, Dv]`, in the query's dtype. Stored tokens keep the dtype of the storage.
        """
        window = self.windows.get(layer_idx)
        given, held = query.dtype, (self.pools[layer_idx].dense if window is None else window).keys.dtype
        query, keys, values = query.to(held), keys.to(held), values.to(held)
        with suspended(query.device):
            if window is None:
                out = self._attend(layer_idx, query, keys, values, store, scale=scale, softcap=softcap, sinks=sinks)
            else:
                out = window.attend(query, keys, values, self.column, store, scale=scale, softcap=softcap, sinks=sinks)
        return out.to(given)

    def _attend(
        self,
        layer_idx: int,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        store: bool,
        *,
        scale: float,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        layer, pool = self.layers[layer_idx], self.pools[layer_idx]
        assert layer.tiers is not None
        dense = layer.tiers.dense
        if store:
            stored = dense.keys, dense.values, dense.positions, dense.fill
            append_step(*stored, pool.ring.buffer, self.column, query, keys, values[..., : dense.values.shape[-1]])
        # pass the whole room: PyTorch gives an empty slice no address, and events may fill it without a new capture
        room = pool.tokens
        return layer.attend(query, dense.capacity, LAST, scale=scale, softcap=softcap, sinks=sinks, room=room)

    def settle(self) -> None:
        """Update the host's numbers and the sliding-window layers to the steps made."""
        self._count()
        for window in self.windows.values():
            window.give_back(self.seen)

    def _count(self) -> None:
        count, self.steps = self.steps, 0
        self.seen += count
        if not count:
            return
        for layer in self.layers.values():
            layer.advance(count)
        self.filled += count

    def recover(self) -> None:
        """Reset the host's numbers and every layer to the column, after an interrupt or a removed step."""
        self.steps = int(self.column) - self.seen
        for pool, filled in zip(self.pools.values(), self.filled, strict=True):
            pool.dense.fill.copy_(filled + self.steps)
        self.settle()

    def take_back(self) -> None:
        """Remove the newest step. No event may have followed it, and no linear-attention state may have changed."""
        assert not states_of(self.linear)
        self.column -= 1
        self.recover()

    def tensors(self) -> list[Tensor]:
        """Return all tensors held, for counting bytes."""
        held: list[Pool | StaticWindow] = [*self.pools.values(), *self.windows.values()]
        return [self.column, *(tensor for each in held for tensor in each.tensors())]


def compressed_of(layers: Sequence[Any]) -> dict[int, HardKVLayer]:
    """Return the layers that the cache compresses, by index."""
    return {idx: layer for idx, layer in enumerate(layers) if isinstance(layer, HardKVLayer)}


def sliding_of(layers: Sequence[Any]) -> dict[int, DynamicSlidingWindowLayer]:
    """Return the sliding-window layers that hold tokens, by index."""
    return {
        idx: layer
        for idx, layer in enumerate(layers)
        if isinstance(layer, DynamicSlidingWindowLayer) and layer.is_initialized
    }


def linear_of(layers: Sequence[Any]) -> dict[int, LinearAttentionCacheLayerMixin]:
    """Return the layers that hold the state of a linear attention, by index."""
    return {idx: layer for idx, layer in enumerate(layers) if isinstance(layer, LinearAttentionCacheLayerMixin)}


def states_of(linear: dict[int, LinearAttentionCacheLayerMixin]) -> list[Tensor]:
    """Return the states of linear attentions."""
    groups = [group for layer in linear.values() for group in (layer.conv_states, layer.recurrent_states)]
    return [state for group in groups for state in group.values() if state is not None]


def _room(layer: HardKVLayer, length: int) -> int:
    """Return how many tokens the condensed tier of a layer needs room for."""
    tiers = layer.tiers
    assert tiers is not None
    sequences, heads = tiers.shape
    most, fixed = layer.most_condensed(heads, length, layer.pinned(tiers.seen))
    return max(sequences * most if fixed else 0, tiers.condensed.rows.total)


def _pool(layer: HardKVLayer, length: int) -> Pool:
    tiers, ring, settings = layer.tiers, layer.ring, layer.settings
    assert tiers is not None
    assert ring is not None
    recent = tiers.dense_sinks + settings.window + settings.interval
    return Pool(tiers, ring, _room(layer, length), max(recent, tiers.dense.bound))
