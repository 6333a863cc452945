"""When the layers of a cache run their events: several at once, as each wait for the device and each launch costs."""

from collections.abc import Sequence
from typing import Any, Protocol

from hardkv.cache.events.inputs import EventInputs
from hardkv.cache.events.run import Events
from hardkv.cache.storage.tiers import Tiers
from hardkv.config import HardKVConfig

# Bytes of keys and values of a prompt that layers may hold uncompressed, so that their events run together.
WAITING_BYTES = 128 << 20


class EventLayer(Protocol):
    """What a schedule needs of a layer."""

    settings: HardKVConfig
    tiers: Tiers | None

    @property
    def ready(self) -> bool:
        """Whether an event is due and nothing holds it."""
        ...

    def event_inputs(self) -> EventInputs:
        """What an event takes now."""
        ...

    def install(self, tiers: Tiers) -> None:
        """Hold what an event returned."""
        ...


class EventSchedule:
    """The layers of a cache, which run their events together. Copies and pickles of it start with nothing under way.

    After later tokens that is after the last layer's attention. After a prompt, as many layers as hold `WAITING_BYTES`
    of keys and values go through an event, which ends when the next layer begins: until then the device has work, and
    the host need not wait for it.

    Args:
        layers: in the order in which they attend.
    """

    def __init__(self, layers: Sequence[EventLayer]):
        self.layers = layers
        self.waiting_bytes = 0  # of layers that wait, in the prompt that layers are told of
        self.under_way: LayersEvents | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"under_way": None}

    def may_wait(self, layer: EventLayer, nbytes: int) -> bool:
        """Whether a layer with a prompt of `nbytes` waits for others: not where its scorer takes one at a time."""
        return getattr(layer.settings.scorer, "across_layers", False) and 2 * nbytes <= WAITING_BYTES

    def prefilled(self, layer: EventLayer, nbytes: int) -> None:
        """A layer has a prompt of `nbytes`, and waits for its event or has had it."""
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
        """A layer has attended."""
        if layer is self.layers[-1] and (ready := [each for each in self.layers if each.ready]):
            run_events(ready)

    def finish(self) -> None:
        """Finish what is under way.

        Raises:
            ValueError, NotImplementedError: see `Events.finish`.
        """
        if self.under_way is not None:
            under_way, self.under_way = self.under_way, None
            under_way.finish()


class LayersEvents:
    """The events of some layers, which install what these return.

    A failure leaves every layer as it was before its own event or after it, unless it has a `pool`.
    """

    def __init__(self, layers: Sequence[EventLayer]):
        self._layers = layers
        self._begun = [layer.tiers for layer in layers]
        self._events = Events([layer.event_inputs() for layer in layers])

    def finish(self) -> None:
        """Give every layer its new tiers; one that has changed since keeps what it has.

        Raises:
            ValueError, NotImplementedError: see `Events.finish`.
        """
        for i, tiers in self._events.finish(self._as_begun):
            self._layers[i].install(tiers)

    def _as_begun(self, i: int) -> bool:
        begun, self._begun[i] = self._begun[i], None  # so that each layer's old bytes go as soon as it has new ones
        return self._layers[i].tiers is begun


def run_events(layers: Sequence[EventLayer]) -> None:
    """An event of each layer, now.

    Raises:
        ValueError, NotImplementedError: see `Events.finish`.
    """
    LayersEvents(layers).finish()
