"""Decide when the layers of a cache run their events: several at once, to save device waits and kernel launches."""

from collections.abc import Sequence
from typing import Any, Protocol

from hardkv.cache.events.inputs import EventInputs
from hardkv.cache.events.run import Events
from hardkv.cache.storage.tiers import Tiers
from hardkv.config import HardKVConfig

# Bytes of a prompt's keys and values that layers may hold uncompressed, so that their events can run together.
WAITING_BYTES = 128 << 20


class EventLayer(Protocol):
    """What a schedule needs from a layer."""

    settings: HardKVConfig
    tiers: Tiers | None

    @property
    def ready(self) -> bool:
        """Whether an event is due and nothing holds it back."""
        ...

    def event_inputs(self) -> EventInputs:
        """Return the inputs of an event that runs now."""
        ...

    def install(self, tiers: Tiers) -> None:
        """Store the tiers that an event returned."""
        ...


class EventSchedule:
    """Run the events of a cache's layers together. A copied or unpickled schedule has no events in progress.

    In later forwards, all events run after the last layer's attention. In a prompt, the events of several layers start
    as soon as these layers hold about `WAITING_BYTES` of keys and values. They finish when the next layer begins: until
    then the device has work, so the host need not wait.

    Args:
        layers: in the order in which they attend.
    """

    def __init__(self, layers: Sequence[EventLayer]):
        self.layers = layers
        self.waiting_bytes = 0  # bytes of layers of this prompt that wait for their event
        self.under_way: LayersEvents | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"under_way": None}

    def may_wait(self, layer: EventLayer, nbytes: int) -> bool:
        """Return whether a layer with a prompt of `nbytes` may wait for others. Its scorer must take several layers."""
        return getattr(layer.settings.scorer, "across_layers", False) and 2 * nbytes <= WAITING_BYTES

    def prefilled(self, layer: EventLayer, nbytes: int) -> None:
        """Note that a layer has stored a prompt of `nbytes`. It waits for its event or has had it."""
        if layer is self.layers[-1]:
            return self.decoded(layer)
        if layer is self.layers[0]:
            self.waiting_bytes = 0
        if layer.ready:
            assert layer.tiers is not None
            self.waiting_bytes += layer.tiers.dense.nbytes
            if self.waiting_bytes + nbytes > WAITING_BYTES:
                self.under_way, self.waiting_bytes = LayersEvents([each for each in self.layers if each.ready]), 0

    def decoded(self, layer: EventLayer) -> None:
        """Note that a layer has attended."""
        if layer is self.layers[-1] and (ready := [each for each in self.layers if each.ready]):
            run_events(ready)

    def finish(self) -> None:
        """Finish the events in progress.

        Raises:
            ValueError, NotImplementedError: see `Events.finish`.
        """
        if self.under_way is not None:
            under_way, self.under_way = self.under_way, None
            under_way.finish()


class LayersEvents:
    """Run the events of some layers and install the new tiers.

    A failure leaves every layer either before or after its own event, unless the layer has a `pool`.
    """

    def __init__(self, layers: Sequence[EventLayer]):
        self._layers = layers
        self._begun = [layer.tiers for layer in layers]
        self._events = Events([layer.event_inputs() for layer in layers])

    def finish(self) -> None:
        """Give every layer its new tiers. A layer that has changed since keeps its tiers.

        Raises:
            ValueError, NotImplementedError: see `Events.finish`.
        """
        for i, tiers in self._events.finish(self._as_begun):
            self._layers[i].install(tiers)

    def _as_begun(self, i: int) -> bool:
        begun, self._begun[i] = self._begun[i], None  # frees each layer's old tiers as soon as it has new ones
        return self._layers[i].tiers is begun


def run_events(layers: Sequence[EventLayer]) -> None:
    """Run an event of each layer now.

    Raises:
        ValueError, NotImplementedError: see `Events.finish`.
    """
    LayersEvents(layers).finish()
