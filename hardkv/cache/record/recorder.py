"""Record a running cache: a `Trace` gets a snapshot after every event."""

from typing import Any

import torch
from torch import Tensor

from hardkv.cache.record.snapshot import HeldByLayer, HoldingLayer, Snapshot
from hardkv.cache.record.trace import RecordedCache, Trace, used_layers
from hardkv.cache.storage.tiers import sequences_of


class Recorder:
    """Take the snapshots of a trace. Layers report their events, and the cache reports other changes.

    Copies and pickles of a cache are not recorded.

    Raises:
        ValueError: the cache compresses nothing, or does not know its layers yet.
    """

    def __init__(self, cache: RecordedCache):
        if not cache._compressed:
            raise ValueError(
                "record() finds no layer that this HardKVCache compresses: pass config=model.config, or run a forward "
                "pass first"
            )
        self.trace = Trace.of(cache)
        self._layers = cache._compressed
        # by event number, the layers that have had this event while others have not
        self._pending: dict[int, dict[int, HeldByLayer]] = {}

    def __reduce__(self) -> Any:
        return type(None), ()

    def listen(self) -> None:
        """Ask every layer to report its events."""
        for layer in self._layers:
            layer.listen(self)

    def stop(self) -> None:
        """Ask every layer to stop reporting its events."""
        for layer in self._layers:
            layer.listen(None)

    def event(self, layer: HoldingLayer) -> None:
        """Note that a layer has just had an event."""
        assert layer.tiers is not None
        done = self._pending.setdefault(layer.events, {})
        done[layer.layer_idx] = HeldByLayer.of(layer.tiers)
        used = used_layers(self._layers)
        if self._layers[-1].layer_idx in done and len(done) == len(used):
            self.trace.layers = [each.layer_idx for each in used]
            self.trace.snapshots.append(Snapshot.of(used, self._pending.pop(layer.events)))

    def select(self, indices: Tensor) -> None:
        """Select these sequences of the batch in every snapshot."""
        indices = sequences_of(indices, torch.device("cpu"))
        self.trace._change(lambda layer: layer.select(indices % layer.batch))  # negative ones count from the end

    def repeat(self, repeats: int) -> None:
        """Repeat every sequence of the batch in every snapshot."""
        self.trace._change(
            lambda layer: layer.select(torch.arange(layer.batch, device="cpu").repeat_interleave(repeats))
        )

    def crop(self) -> None:
        """Remove cropped columns from every snapshot, because new tokens will reuse their numbers."""
        length = max(layer.seen for layer in self._layers)
        if length == 0:
            self.trace.snapshots.clear()
            self._pending.clear()
        elif length < self.trace.columns:
            self.trace._change(lambda layer: layer.below(length))

    def finish(self, cache: RecordedCache) -> None:
        """Add a last snapshot, unless the newest one already shows the present state."""
        now = Trace.of(cache).snapshots
        before = self.trace.snapshots[-1:]
        self.trace.layers = self.trace.layers or [layer.layer_idx for layer in used_layers(self._layers)]
        if now and (not before or (before[0].seen, before[0].events) != (now[0].seen, now[0].events)):
            self.trace.snapshots += now
